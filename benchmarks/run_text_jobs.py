"""What jobs are worth on texts: audit, poison, provenance and preferences, on the small GPT-2 of examples/wikitext.

    python benchmarks/run_text_jobs.py
    python benchmarks/run_text_jobs.py --jobs poison

Written to `results/text_JOB.json`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

import tyro
from text_jobs import audits, poison, preferences, provenance
from text_jobs.texts import Size, Tuner
from workload import save_results

Job = Literal["audit", "poison", "provenance", "preferences"]
REPORTS: dict[Job, Callable[[Tuner, int], dict[str, object]]] = {
    "audit": audits.report,
    "poison": poison.report,
    "provenance": provenance.report,
    "preferences": preferences.report,
}


@dataclass
class Arguments:
    """Jobs on texts."""

    jobs: tuple[Job, ...] = tuple(REPORTS)
    seeds: int = 3
    size: Size = field(default_factory=Size)


def main(arguments: Arguments) -> None:
    """Each job, one after another."""
    logging.getLogger("wherefrom").setLevel(logging.ERROR)
    size = {name: str(value) for name, value in asdict(arguments.size).items() if name != "cache_dir"}
    for job in arguments.jobs:
        measured = REPORTS[job](Tuner(arguments.size), arguments.seeds)
        save_results(f"text_{job}", {"size": size, **measured})


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
