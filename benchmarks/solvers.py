"""What Gauss-Newton products cost for many queries at once, and how fast solvers come to a converged solve.

    make demo && python benchmarks/solvers.py --checkpoint_dir runs/demo/checkpoints

Products: a GPT-2 with random weights, user CPU time, medians. Solvers: the example's trained GPT-2, on the first
tokens of a few of its training sequences, so that a converged solve is at hand. Written to `results/solvers.json`.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import Tensor
from workload import ROOT, Workload, save_results

import wherefrom as wf
from wherefrom.curvature import Preconditioner
from wherefrom.gauss_newton import DampedGaussNewton
from wherefrom.gradients import BankForm, GradientBank
from wherefrom.solvers import Solver
from wherefrom.sweep import Objective, Sweep

sys.path.append(str(ROOT / "examples" / "wikitext"))


@dataclass
class Arguments:
    """Products and solvers."""

    checkpoint_dir: Path = ROOT / "runs" / "demo" / "checkpoints"
    work: Workload = field(default_factory=lambda: Workload(layers=2, width=128, vocabulary=1024, tokens=64, train=16))
    repeats: int = 3
    vectors: tuple[int, ...] = (1, 8, 64)
    examples: int = 8
    queries: int = 4
    tokens: int = 32
    reference: int = 150
    """Iterations of the converged solve."""


def user_seconds(action: Callable[[], object], repeats: int) -> float:
    """The median user CPU time of an action, after once to warm up."""
    action()
    found = []
    for _ in range(repeats):
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        action()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime - start)
    return median(found)


def product_costs(arguments: Arguments) -> list[dict[str, float]]:
    """Products for several vectors at once, against as many products, and against a forward and backward pass."""
    work, rows = arguments.work, []
    train = work.sequences(work.train, 1)
    model = work.model()
    with tempfile.TemporaryDirectory() as folder:
        sweep = wf.Study(folder, model, wf.CausalLM(), train=train)._sweep
    batch = sweep.task.collate(train)

    def plain_pass() -> None:
        sweep.task.train_loss(model, batch).backward()

    floor = user_seconds(plain_pass, arguments.repeats)
    for count in arguments.vectors:
        system = DampedGaussNewton(sweep, Preconditioner({}, {}), train, 1.0, pairs=max(count, work.train))
        vectors = torch.randn(count, sum(system.space.sizes.values()))
        together = user_seconds(lambda: system.product(vectors), arguments.repeats)  # noqa: B023
        alone = user_seconds(lambda: [system.product(each) for each in vectors.split(1)], arguments.repeats)  # noqa: B023
        rows.append({"vectors": count, "together": together, "alone": alone, "forward_backward": floor})
        print(rows[-1])
    return rows


def gradients(sweep: Sweep[dict[str, Tensor]], system: DampedGaussNewton[dict[str, Tensor]], data: Sequence[object],
              objective: Objective[dict[str, Tensor]]) -> Tensor:  # fmt: skip
    """[examples, weights]."""
    bank = GradientBank(sweep.layers, Preconditioner({}, {}), len(data), BankForm(sweep.dtype, sweep.device))
    sweep.run("gradients", data, bank, objective, batch_size=8)
    return system.space.join(bank.sums)


def convergence(arguments: Arguments) -> list[dict[str, object]]:
    """How far solvers' scores are from those of a converged solve, and their residuals."""
    from models import load_example  # noqa: PLC0415  (from the example's folder)

    model, _, train_set, query_set = load_example(arguments.checkpoint_dir)
    train, queries = (
        [{"input_ids": rows[place]["input_ids"][: arguments.tokens]} for place in range(count)]
        for rows, count in ((train_set, arguments.examples), (query_set, arguments.queries))
    )
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, model, wf.CausalLM(), train=train)
        filtered = study.fit("ekfac").preconditioner()
    plain = Preconditioner({}, {}, damping=filtered.damping)
    systems = {
        name: DampedGaussNewton(study._sweep, each, train, None, pairs=64)
        for name, each in (("ekfac", filtered), ("identity", plain))
    }
    task, system = study._sweep.task, systems["ekfac"]
    asked = gradients(study._sweep, system, queries, lambda model, batch, rows: task.measurement(model, batch))
    given = gradients(study._sweep, system, train, lambda model, batch, rows: task.train_loss(model, batch))
    solved = wf.ConjugateGradients(arguments.reference, 1e-6).solve(system, asked)
    print("reference", len(solved.residuals) - 1, solved.residuals[-1])
    expected = solved.vectors @ given.T

    def row(name: str, vectors: Tensor, residual: float | None) -> dict[str, object]:
        scores = vectors @ given.T
        found = {
            "solver": name,
            "score_error": float(((scores - expected).norm(dim=1) / expected.norm(dim=1)).median()),
            "correlation": float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1]
                                              for pair in zip(scores, expected, strict=True)]).median()),
            "residual": residual,
        }  # fmt: skip
        print(found, flush=True)
        return found

    def residual(vectors: Tensor) -> float:
        return float(((asked - system.product(vectors)).norm(dim=1) / asked.norm(dim=1)).median())

    first = system.precondition(asked)
    rows = [row("ekfac", first, residual(first))]
    runs: list[tuple[str, str, Solver]] = [
        *(("cg", name, wf.ConjugateGradients(count, 0)) for name in systems for count in (1, 5, 20, 60)),
        *(("astra", "ekfac", replace(wf.Astra(batch_size=4), iterations=count)) for count in (30, 100, 300)),
    ]
    for label, name, solver in runs:
        vectors = solver.solve(systems[name], asked).vectors
        rows.append({"iterations": vars(solver)["iterations"], **row(f"{name}+{label}", vectors, residual(vectors))})
    return [{"reference_residual": float(solved.residuals[-1].median())}, *rows]


def main(arguments: Arguments) -> None:
    """Measure both."""
    measured = {"products": product_costs(arguments), "solvers": convergence(arguments)}
    save_results("solvers", {"repeats": arguments.repeats, **measured})


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
