"""What part of a large product's speed each stage reaches: the default of `wherefrom plan --efficiency`.

    python benchmarks/efficiency.py

The stages of `floor.py`, each right after large products on the same cores, so that a slow moment slows down both. A
stage's part is its planned operations a second over those of the products: the median of the repeats. Written to
`results/efficiency.json`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import tyro
from floor import Arguments, Sweeps
from workload import save_results

from wherefrom.planning.machine import matmul_speed


@dataclass
class Stage:
    """What was measured of one stage."""

    seconds: float
    operations: float
    speed_of_products: float
    part: float


def measure(arguments: Arguments) -> dict[str, Stage]:
    """Medians of every stage."""
    with tempfile.TemporaryDirectory() as folder:
        sweeps = Sweeps(arguments, Path(folder))
    operations = {stage.name: stage.flop for stage in sweeps.plan.stages()}
    bank = sweeps.bank(None)
    stages = {
        "covariance": sweeps.fit_stages()["covariance sweep"],
        "eigenvalues": sweeps.fit_stages()["eigenvalue sweep"],
        "pairwise scores": sweeps.score_stages(bank, "pairwise scores")["pairwise scores"],
    }
    found: dict[str, list[Stage]] = {name: [] for name in stages}
    for _ in range(arguments.repeats):
        for name, stage in stages.items():
            speed = matmul_speed(sweeps.device, sweeps.sweep.dtype)
            start = time.perf_counter()
            stage()
            seconds = time.perf_counter() - start
            found[name].append(Stage(seconds, operations[name], speed, operations[name] / seconds / speed))
    return {name: sorted(runs, key=lambda run: run.part)[len(runs) // 2] for name, runs in found.items()}


def main(arguments: Arguments) -> None:
    """Measure and write."""
    found = measure(arguments)
    save_results(
        "efficiency",
        {
            "workload": asdict(arguments.work),
            "batch": arguments.batch,
            "repeats": arguments.repeats,
            "stages": {name: asdict(stage) for name, stage in found.items()},
            "median_part": median(stage.part for stage in found.values()),
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
