"""Try every model family of the zoo, and write the table of `docs/how-to/models.md`. Some minutes on two cores.

python benchmarks/run_zoo.py                           # `make zoo`
python benchmarks/run_zoo.py --families Llama BERT     # only says what comes of these
python benchmarks/run_zoo.py --only_page               # only writes the table again
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict
from importlib.metadata import version

import torch
import tyro
from tables import rendered, with_block
from workload import ROOT, save_results
from zoo.families import FAMILIES
from zoo.family import Family
from zoo.measure import outcome, score_error, tracked

import wherefrom as wf

DOCUMENT = ROOT / "docs" / "how-to" / "models.md"


def main(families: tuple[str, ...] = (), only_page: bool = False) -> None:
    """Measure, and write.

    Args:
        families: names of families, which are printed; none are all, which are written.
        only_page: write the table of what was measured before.
    """
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.ERROR)  # transformers' remarks on tiny configurations
    warnings.simplefilter("ignore")
    for name in families:
        print(json.dumps(measured(next(each for each in every() if each.name == name)), indent=1))
    if not families and not only_page:
        found = {group: {each.name: measured(each) for each in members} for group, members in FAMILIES.items()}
        save_results("zoo", {"transformers": version("transformers"), "families": found})
    if not families:
        DOCUMENT.write_text(page())


def every() -> list[Family]:
    """All families."""
    return [each for members in FAMILIES.values() for each in members]


def measured(family: Family) -> dict[str, object]:
    """All that the table says of a family."""
    found = outcome(family)
    layers, share = tracked(family, found.idle)
    scores = None if found.refused else score_error(family, wf.EKFAC())
    print(f"{family.name}: {found.refused or found.error}", flush=True)
    return {**asdict(found), "layers": layers, "share": share, "scores": scores, "note": family.note}


def page() -> str:
    """The document with its table as it has to be."""
    return with_block(DOCUMENT.read_text(), "zoo", rendered("zoo.md.jinja"))


if __name__ == "__main__":
    tyro.cli(main)
