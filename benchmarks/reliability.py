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
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tables import rendered
from workload import RESULTS, ROOT, provenance, save_results

sys.path.insert(0, str(ROOT))

from tests.reliability import files, inputs, kills, memory, space, stops
from tests.reliability.outcomes import Outcome

DOCUMENT = ROOT / "docs" / "reliability.md"

Measure = Callable[[Path, int, int], list[Outcome]]


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        count: how many faults, of each kind where there are kinds.
    """

    measure: Measure
    count: int
    title: str
    text: str


PARTS = {
    "kills": Part(
        kills.measure,
        100,
        "Kills",
        "Real processes that fit, score and retrain are killed with SIGKILL, at random times and in the middle of writing, "
        "and started again, some of them several times.",
    ),
    "stops": Part(
        stops.measure,
        60,
        "Ctrl-C and SIGTERM",
        "Processes that save nothing by the clock are asked to stop in the middle of a random batch. They finish it, save "
        "their sums, say how to go on and leave with 128 plus the signal's number.",
    ),
    "files": Part(
        files.measure,
        40,
        "Damaged, forged and misplaced files",
        "One file or directory of a finished or an interrupted run is damaged, and everything is asked for again: results, "
        "sums under way, recordings of other runs. *Refused by name* means an error that names the file, which stays as it "
        "is; after the way out that the message gives, results were the undisturbed ones. *Without effect* means that the "
        "damage was in what nothing needs any more, or in blanks, and results were the undisturbed ones.",
    ),
    "space": Part(
        space.measure,
        40,
        "Disks",
        "Jobs on a file system that fills up, under a limit of file sizes as a quota would set it, and in directories that "
        "cannot be written.",
    ),
    "memory": Part(
        memory.measure,
        40,
        "Memory",
        "Operations that raise what PyTorch raises when a device has no memory left, once or for everything above a size.",
    ),
    "inputs": Part(
        inputs.measure,
        10_000,
        "Command lines, texts, tasks and bytes",
        "Drawn with hypothesis: arguments and files for every subcommand, valid and nasty; studies whose task, model or data "
        "misbehave; and the bytes of every kind of metadata, mutated.",
    ),
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
        part = PARTS[name]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = part.measure(Path(folder), part.count, seed)
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
    return rendered("reliability.md.jinja", sections={name: PARTS[name] for name in measured}, total=total)


if __name__ == "__main__":
    tyro.cli(main)
