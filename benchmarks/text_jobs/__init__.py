"""What jobs are worth on texts: audit, poison, provenance, preferences. `run_text_jobs.py` runs them."""

import sys

from workload import ROOT

# Before any module of this folder, which use the examples' models, texts and poisons.
sys.path += [str(ROOT / "examples" / name) for name in ("wikitext", "poison")]
