"""Put many faults into runs, and write what came of them into `docs/reliability.md`. An hour or two on two cores.

python benchmarks/reliability.py                      # --parts kills files: only these; the others stay as they were
python benchmarks/reliability.py --parts              # only write the page again
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tyro
from tables import rendered
from workload import RESULTS, ROOT, provenance, save_results

sys.path.insert(0, str(ROOT))

from tests.reliability import files, inputs, kills, memory, space, stops
from tests.reliability.outcomes import Outcome

DOCUMENT = ROOT / "docs" / "reliability.md"

Measure = Callable[[Path, int, int], list[Outcome]]


# How many faults, of each kind where there are kinds. What they are, the template says.
PARTS: dict[str, tuple[Measure, int]] = {
    "kills": (kills.measure, 100),
    "stops": (stops.measure, 60),
    "files": (files.measure, 40),
    "space": (space.measure, 40),
    "memory": (memory.measure, 40),
    "inputs": (inputs.measure, 10_000),
}


def main(parts: tuple[str, ...] = tuple(PARTS), seed: int = 1) -> None:
    """Measure parts and write the page.

    Args:
        parts: names of parts.
        seed: of all that is drawn.
    """
    file = RESULTS / "reliability.json"
    measured = json.loads(file.read_text())["parts"] if file.exists() else {}
    for name in parts:
        measure, count = PARTS[name]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = measure(Path(folder), count, seed)
        minutes = (time.perf_counter() - start) / 60
        measured[name] = {
            **provenance(),
            "seed": seed,
            "minutes": minutes,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        save_results("reliability", {"parts": measured})
        print(f"{name}: {sum(outcome.times for outcome in outcomes):,} in {minutes:.1f} min", flush=True)
    DOCUMENT.write_text(page())


def page() -> str:
    """The document."""
    measured = json.loads((RESULTS / "reliability.json").read_text())["parts"]
    total = sum(outcome["times"] for part in measured.values() for outcome in part["outcomes"])
    return rendered("reliability.md.jinja", parts=[name for name in PARTS if name in measured], total=total)


if __name__ == "__main__":
    tyro.cli(main)
