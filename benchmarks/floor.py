"""Each sweep of a fit and a score against a plain forward and backward pass of the same batches, the floor.

    python benchmarks/floor.py --repeats 5

The plain pass is a training step without the optimiser: Hugging Face's own loss, gradients of all weights. One process,
all in turn, medians. The training sweep is measured as planned, where few training examples make it cheaper to rotate
their gradients, and with query gradients that were rotated back beforehand. Written to `results/floor.json`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor
from workload import Stopwatch, Workload, medians, save_results

import wherefrom as wf
from wherefrom.curvature.collectors import CovarianceCollector, EigenvalueCollector
from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Collector, Sweep
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import PairwiseCollector


@dataclass
class Arguments:
    """Sweeps against plain passes."""

    work: Workload = field(default_factory=Workload)
    repeats: int = 5
    batch: int = 32


class Nothing(Collector):
    """Collects nothing: what the passes of a sweep cost by themselves."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def collect(self, *_: object) -> None:
        """Leave everything as it is."""


class Sweeps:
    """Everything to be timed, as functions without arguments."""

    def __init__(self, arguments: Arguments, folder: Path) -> None:
        self.work, self.batch = arguments.work, arguments.batch
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.work.model().to(self.device)  # type: ignore[arg-type]
        self.train, self.queries = self.work.sequences(self.work.train, 1), self.work.sequences(self.work.queries, 2)
        self.task = wf.CausalLM()
        execution = wf.Execution(train_batch_size=self.batch, progress=False)
        study = wf.Study(folder, self.model, self.task, train=self.train, execution=execution)
        self.layers, self.factors = study.layers, study.fit(wf.EKFAC(empirical=True))
        self.sweep: Sweep[Any] = Sweep(self.model, self.task, self.layers, execution)
        self.plan = study.plan(self.queries)

    def plain(self) -> None:
        """Training steps without the optimiser."""
        for start in range(0, len(self.train), self.batch):
            tokens = torch.stack([row["input_ids"] for row in self.train[start : start + self.batch]]).to(self.device)
            self.model.zero_grad()
            self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.model.zero_grad()

    def run(self, collector: Collector, compiled: bool = False) -> None:
        """A sweep over the training set, with activation functions compiled or as they are."""
        sweep = replace(self.sweep, execution=replace(self.sweep.execution, compile_activations=compiled))
        sweep.run("sweep", Examples(self.train, self.task), collector, batch_size=self.batch)

    def bank(self, rotated_back: bool | None) -> GradientBank:
        """All query gradients; in the form that was planned, or rotated back everywhere or nowhere."""
        form = self.plan.form
        if rotated_back is not None:
            form = replace(form, rotated_back=dict.fromkeys(self.layers, (rotated_back, rotated_back)))
        bank = GradientBank(self.layers, self.factors.preconditioner(), len(self.queries), form)
        self.sweep.run("queries", Examples(self.queries, self.task), bank, batch_size=self.batch)
        return bank

    def fit_stages(self) -> dict[str, Callable[[], None]]:
        """The floor, and the sweeps of a fit."""
        place = (self.sweep.dtype, self.device)
        bases, count = self.factors.bases, len(self.train)
        return {
            "plain forward and backward": self.plain,
            "sweep that collects nothing": lambda: self.run(Nothing()),
            "the same, activations compiled": lambda: self.run(Nothing(), compiled=True),
            "covariance sweep": lambda: self.run(CovarianceCollector(self.layers, *place)),
            "eigenvalue sweep": lambda: self.run(EigenvalueCollector(self.layers, bases, count, *place)),
        }

    def score_stages(self, bank: GradientBank, name: str) -> dict[str, Callable[[], None]]:
        """The floor, and the training sweep against a bank."""
        place = (self.sweep.dtype, self.device)
        return {
            "plain forward and backward": self.plain,
            name: lambda: self.run(PairwiseCollector(bank, len(self.train), *place)),
        }


def measure(stages: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Median wall and user CPU seconds of each stage, in turn, and their ratios to the first."""
    runs = []
    for _ in range(repeats + 1):
        watch = Stopwatch()
        for name, stage in stages.items():
            with watch.stage(name):
                stage()
        runs.append(watch.stages)
    runs = runs[1:]  # the first was to warm up
    floor = next(iter(stages))
    return {
        name: {
            **asdict(middle),
            "wall_ratio": median(run[name].wall_seconds / run[floor].wall_seconds for run in runs),
            "user_ratio": median(run[name].user_seconds / run[floor].user_seconds for run in runs),
        }
        for name, middle in medians(runs).items()
    }


def main(arguments: Arguments) -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        sweeps = Sweeps(arguments, Path(folder))
    found = measure(sweeps.fit_stages(), arguments.repeats)
    for name, rotated_back in (("training sweep, as planned", None), ("training sweep, queries rotated back", True)):
        bank = sweeps.bank(rotated_back)
        found[name] = measure(sweeps.score_stages(bank, name), arguments.repeats)[name]
        del bank
    operations = {stage.name: stage.flop for stage in sweeps.plan.stages()}
    passes = sweeps.plan.job.example.flop * arguments.work.train
    save_results(
        "floor",
        {
            "workload": asdict(arguments.work),
            "batch": arguments.batch,
            "repeats": arguments.repeats,
            "stages": found,
            "planned_operations": operations,
            "operations_of_the_passes": passes,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
