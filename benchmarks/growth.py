"""How time and memory of a fit and a score grow: training sequences, queries, tokens and width doubled in turn.

    python benchmarks/growth.py

Every run is a process of its own. Written to `results/growth.json` and, as a log-log plot, `docs/images/growth.png`.
The last series, up to 100,000 training sequences, shows that memory does not follow them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor
from workload import ROOT, PeakMemory, Stopwatch, Workload, save_results

import wherefrom as wf
from wherefrom.evaluate.plots import save_png

BASE = Workload(layers=2, width=128, heads=4, vocabulary=1024, tokens=64, train=256, queries=64)
SERIES = {"train": (256, 2048), "queries": (64, 512), "tokens": (64, 512), "width": (128, 1024)}
MANY = Workload(layers=1, width=32, heads=2, vocabulary=128, tokens=8, train=1_000, queries=512)
LABELS = {"train": "training sequences", "queries": "queries", "tokens": "tokens of a sequence", "width": "width"}
# What the arithmetic of the passes, gradients and products says of time and memory, for large sizes. Batches have as
# many tokens whatever the length of a sequence.
EXPONENTS = {"train": (1, 0), "queries": (1, 1), "tokens": (1, 0), "width": (2, 2)}


@dataclass
class Arguments:
    """Growth of time and memory."""

    repeats: int = 3
    turn: str | None = None
    """Run this workload, given as JSON, in this process (the benchmark starts itself with it)."""
    output: Path | None = None
    """Where a turn writes its figures."""


@dataclass
class Drawn:
    """Random sequences that are made when they are read, so that they take no memory."""

    work: Workload
    seed: int
    count: int
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        self.generator.manual_seed(self.seed * 2**32 + row)
        return {"input_ids": torch.randint(self.work.vocabulary, (self.work.tokens,), generator=self.generator)}


def take_turn(work: Workload, output: Path) -> None:
    """A fit and a score in this process."""
    train, queries = Drawn(work, 1, work.train), Drawn(work, 2, work.queries)
    watch, model = Stopwatch(), work.model()
    with tempfile.TemporaryDirectory() as folder:
        peak = PeakMemory()
        peak.start()
        study = wf.Study(folder, model, wf.CausalLM(), train=train, execution=wf.Execution(progress=False))
        with watch.stage("fit"):
            factors = study.fit(wf.EKFAC(empirical=True))
        with watch.stage("score"):
            study.score(queries, wf.EKFAC(factors=factors))
        watch.write(output, own_peak_bytes=peak.stop())


def start_turn(work: Workload, repeats: int) -> dict[str, object]:
    """A workload in processes of their own; the medians."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            output = Path(folder) / "figures.json"
            command = [sys.executable, __file__, "--turn", json.dumps(asdict(work)), "--output", str(output)]
            subprocess.run(command, check=True)
            runs.append(json.loads(output.read_text()))
    middle = {
        f"{stage}_{kind}": float(np.median([run["stages"][stage][kind] for run in runs]))
        for stage in ("fit", "score")
        for kind in ("wall_seconds", "user_seconds")
    }
    found = {**asdict(work), **middle, "own_peak_bytes": float(np.median([run["own_peak_bytes"] for run in runs]))}
    print({name: round(value, 2) for name, value in found.items()})
    return found


def plot(series: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Time and memory against each size, on logarithmic axes."""
    figure, axes = plt.subplots(2, len(SERIES), figsize=(3.1 * len(SERIES), 5.4), sharex="col", sharey="row")
    for column, (name, rows) in enumerate(series.items()):
        sizes = [row[name] for row in rows]
        for row, (kind, label, scale) in enumerate(
            (("score_user_seconds", "score, CPU seconds", 1.0), ("own_peak_bytes", "peak memory, GiB", 2.0**30))
        ):
            values = [each[kind] / scale for each in rows]
            axis = axes[row][column]
            axis.loglog(sizes, values, marker="o", color="#2a6f97")
            exponent = EXPONENTS[name][row]
            line = [values[-1] * (size / sizes[-1]) ** exponent for size in sizes]
            axis.loglog(sizes, line, linestyle=":", color="#8a8f98", label=f"slope {exponent}")
            axis.legend(frameon=False, loc="upper left", fontsize=8)
            axis.grid(True, which="major", alpha=0.25)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(LABELS[name])
        axes[1][column].set_xticks(sizes, [f"{size:,.0f}" for size in sizes], minor=False)
        axes[1][column].minorticks_off()
    figure.tight_layout()
    save_png(figure, file)


def main(arguments: Arguments) -> None:
    """All series, the table and the plot."""
    if arguments.turn:
        assert arguments.output is not None
        take_turn(Workload(**json.loads(arguments.turn)), arguments.output)
        return
    series = {}
    for name, (first, last) in SERIES.items():
        sizes = [first * 2**step for step in range(10) if first * 2**step <= last]
        series[name] = [start_turn(replace(BASE, **{name: size}), arguments.repeats) for size in sizes]
    many = [start_turn(replace(MANY, train=train), 1) for train in (1_000, 10_000, 100_000)]
    save_results("growth", {"base": asdict(BASE), "series": series, "many": many})
    plot(series, ROOT / "docs" / "images" / "growth.png")  # type: ignore[arg-type]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
