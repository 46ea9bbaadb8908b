"""What Gauss-Newton products cost for many queries at once, and how fast solvers come to a converged solve.

    python benchmarks/solvers.py

Products: a GPT-2 with random weights, user CPU time, medians. Solvers: a classifier of scikit-learn's digits, small
enough for a converged solve. Written to `results/solvers.json`.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from workload import Workload, save_results

import wherefrom as wf
from wherefrom.curvature.gauss_newton import DampedGaussNewton
from wherefrom.curvature.operators import Operator
from wherefrom.curvature.solvers.solver import Solver
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.evaluate.agreement import compare_scores
from wherefrom.runtime.errors import LossError


@dataclass
class Arguments:
    """Products and solvers."""

    work: Workload = field(default_factory=lambda: Workload(layers=2, width=128, vocabulary=1024, tokens=64, train=4))
    repeats: int = 3
    vectors: tuple[int, ...] = (1, 8, 64)
    examples: int = 600
    queries: int = 8
    width: int = 32
    steps: int = 300


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
    task = wf.CausalLM()
    sweep, batch = Sweep(model, task, select_layers(model, head=task.head(model))), task.collate(train)

    def plain_pass() -> None:
        task.train_loss(model, batch).backward()

    floor = user_seconds(plain_pass, arguments.repeats)
    for count in arguments.vectors:
        examples = Examples(train, task)
        system = DampedGaussNewton(sweep, Operator({}, {}), examples, 1.0, pairs=max(count, work.train))
        vectors = torch.randn(count, sum(system.space.sizes.values()))
        together = user_seconds(lambda: system.product(vectors), arguments.repeats)  # noqa: B023
        alone = user_seconds(lambda: [system.product(each) for each in vectors.split(1)], arguments.repeats)  # noqa: B023
        rows.append({"vectors": count, "together": together, "alone": alone, "forward_backward": floor})
        print(rows[-1])
    return rows


Digits = Sequence[tuple[Tensor, Tensor]]


def digits(arguments: Arguments) -> tuple[nn.Module, Digits, Digits]:
    """A trained classifier, what it was trained on, and queries."""
    count = arguments.examples
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, arguments.width), nn.Tanh(), nn.Linear(arguments.width, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(images[:count]), labels[:count]).backward()
        optimizer.step()
    train = list(zip(images[:count], labels[:count], strict=True))
    return model, train, list(zip(images[-arguments.queries :], labels[-arguments.queries :], strict=True))


def convergence(arguments: Arguments) -> list[dict[str, object]]:
    """How far the scores of solvers are from those of a converged solve, after how many iterations."""
    model, train, queries = digits(arguments)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, model.double(), wf.Classification(), train=[(x.double(), y) for x, y in train])
        queried = [(x.double(), y) for x, y in queries]
        factors = study.fit(wf.EKFAC())
        damping = 0.1 * float(torch.cat([each.flatten() for each in factors.eigenvalues.values()]).mean())
        methods: dict[str, wf.Factored] = {"ekfac": wf.EKFAC(damping=damping), "identity": wf.Dot(damping=damping)}
        pairs = len(train) * len(queried)  # all in one pass

        def scores(strategy: str, solver: Solver | None) -> Tensor:
            execution = wf.Execution(train_batch_size=pairs)
            return study.score(queried, replace(methods[strategy], solver=solver), execution=execution).values

        expected = scores("ekfac", wf.ConjugateGradients(1000, 1e-7))
        again = scores("identity", wf.ConjugateGradients(1000, 1e-7))  # the same, if both have converged
        rows.append({"reference_difference": float((again - expected).norm() / expected.norm()), "damping": damping})
        runs: list[tuple[str, Solver | None, int]] = [
            ("ekfac", None, 0),
            *((name, wf.ConjugateGradients(each, 0), each) for name in methods for each in (1, 5, 20, 80)),
            ("ekfac", wf.Astra(learning_rate=0.011), 300),
            *(("ekfac", wf.Astra(learning_rate=0.001, batch_size=each), 300) for each in (16, 128)),
        ]
        for strategy, solver, iterations in runs:
            try:
                found = scores(strategy, solver)
            except LossError as reason:
                rows.append({"strategy": strategy, "solver": str(solver), "diverged": str(reason)})
                print(rows[-1], flush=True)
                continue
            error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).median()
            agreement = compare_scores(expected, found).spearman.mean.value
            rows.append({"strategy": strategy, "solver": str(solver), "iterations": iterations,
                         "score_error": float(error), "spearman": agreement})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main(arguments: Arguments) -> None:
    """Measure both."""
    measured = {"solvers": convergence(arguments), "products": product_costs(arguments)}
    save_results("solvers", {"repeats": arguments.repeats, **measured})


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
