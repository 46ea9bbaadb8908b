"""What each way of scoring should give, by other means and in float64: dense matrices, one example at a time.

`tests.reference` has the gradients and the factors' curvature; where a method's own tests have its truth, it is theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import wherefrom as wf
from tests.contract.settings import LENGTH, RATES, Setting
from tests.dense_gauss_newton import dense as dense_gauss_newton
from tests.dense_gauss_newton import token_logits
from tests.reference import BruteForce
from tests.test_baselines import bm25 as bm25_formula
from tests.test_conditioning import numbers
from tests.test_gradient_flow import flow_matrix
from tests.test_magic import by_one_graph
from tests.test_projected import damped, measured, projected
from tests.test_sampled_fisher import dense as dense_fisher
from tests.test_source import adam_steps, by_matrix_exponentials
from tests.test_trajectory import dense as dense_trajectory
from tests.test_trajectory import parameters_of
from tests.test_trajectory_flow import dense_steps
from wherefrom.engine.modules.layers import select_layers
from wherefrom.methods.projected.projections import Compression, Projection
from wherefrom.store.weights import load_weights

# So much that solvers need few iterations.
SOLVER_DAMPING = 300.0
RANK = 2
SAMPLES = 2

Truth = Callable[[Setting], Tensor]


def brute_force(setting: Setting, model: Any = None) -> BruteForce:
    """Every gradient of the setting, and of the factors' targets."""
    layers = list(select_layers(setting.model, setting.task.layers))
    seed = None if setting.empirical else setting.seed
    return BruteForce(model or setting.model, setting.task, layers, setting.case.train, setting.case.queries, seed)


def study_of(setting: Setting, run: str) -> wf.Study[Any]:
    """For what knows layers by their study."""
    return wf.Study(run, setting.model, setting.task, train=setting.train, execution=wf.Execution(progress=False))


def factored(strategy: str) -> Truth:
    """Scores by dense curvature of a strategy."""
    return lambda setting: brute_force(setting).scores(strategy, setting.damping)


def summed(axis: int) -> Truth:
    """The same, added up."""
    return lambda setting: factored("ekfac")(setting).sum(axis, keepdim=True)


def mean_of_training(setting: Setting) -> Tensor:
    return factored("ekfac")(setting).mean(1, keepdim=True)


def of_candidates(candidates: Callable[[Setting], Tensor]) -> Truth:
    """Those of candidates alone; the others are 0."""

    def truth(setting: Setting) -> Tensor:
        whole, chosen = factored("ekfac")(setting), candidates(setting)
        return torch.zeros_like(whole).scatter_(1, chosen, whole.gather(1, chosen))

    return truth


def conditioned(setting: Setting) -> Tensor:
    return brute_force(setting).conditioned(numbers(setting.model)).scores("shampoo", setting.damping)


def inverse(brute: BruteForce, layer: str, damping: float | None) -> Tensor:
    """(H + damping)^-1 of EK-FAC, [weights, weights]."""
    found: Tensor = torch.linalg.inv(damped(brute.curvature("ekfac", layer).detach(), damping))
    return found


def self_influence(setting: Setting) -> Tensor:
    brute, total = brute_force(setting), torch.zeros(len(setting.train), dtype=torch.float64)
    for layer in brute.layers:
        rows = torch.stack([each[layer].flatten() for each in brute.train])
        total += ((rows @ inverse(brute, layer, setting.damping)) * rows).sum(1)
    return total


def of_tokens(setting: Setting) -> Tensor:
    """What each position's own product adds, [query, train, LENGTH]."""
    brute, own = brute_force(setting), BruteForce(
        setting.model, setting.task, list(select_layers(setting.model, setting.task.layers)), setting.case.train, []
    )  # fmt: skip
    total = torch.zeros(len(setting.queries), len(setting.train), LENGTH, dtype=torch.float64)
    for layer in brute.layers:
        queries = torch.stack([each[layer].flatten() for each in brute.queries]) @ inverse(
            brute, layer, setting.damping
        )
        for row, example in enumerate(own.tokens):
            activations, gradients = example[layer]
            each = torch.einsum("to,ti->toi", gradients, activations).flatten(1)  # [tokens, weights]
            total[:, row, : len(each)] += queries @ each.T
    return total


def gauss_newton(setting: Setting) -> Tensor:
    return _with_gauss_newton(setting, lambda matrix, damping: torch.linalg.inv(damped(matrix, damping)))


def flow(setting: Setting) -> Tensor:
    """Training for a finite time, by matrix exponentials."""
    return _with_gauss_newton(setting, lambda matrix, damping: flow_matrix(matrix, torch.full_like(matrix[0], damping)))


def _with_gauss_newton(setting: Setting, function: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Scores with what a function makes of the dense matrix and the damping."""
    damping = SOLVER_DAMPING if setting.damping is None else setting.damping
    brute = brute_force(setting)
    queries, train = brute.vectors(brute.queries), brute.vectors(brute.train)
    with tempfile.TemporaryDirectory() as run:
        matrix = dense_gauss_newton(setting.case, study_of(setting, run), token_logits)
    return queries @ function(matrix.detach(), damping) @ train.T


def at_checkpoints(setting: Setting) -> list[BruteForce]:
    """Every gradient at each checkpoint."""
    found, model = [], brute_force(setting).model
    for checkpoint in setting.checkpoints:
        load_weights(model, checkpoint.path)
        found.append(brute_force(setting, model))
    return found


def over_checkpoints(setting: Setting) -> Tensor:
    parts = [brute.scores("diagonal", setting.damping) for brute in at_checkpoints(setting)]
    return sum((rate * part for rate, part in zip(RATES, parts, strict=True)), torch.zeros(()))


def source(adam: bool) -> Truth:
    """By matrix exponentials; each checkpoint is a segment."""

    def truth(setting: Setting) -> Tensor:
        cuts = [[brute] for brute in at_checkpoints(setting)]
        strategy, steps = ("shampoo", [adam_steps([each]) for each in setting.checkpoints]) if adam else ("ekfac", None)
        return by_matrix_exponentials(cuts, RATES, strategy, steps, setting.weight_decay)

    return truth


Rows = Mapping[str, Tensor]


def directions(setting: Setting, factors: wf.Factors | None = None) -> dict[str, Projection]:
    """Those of a seed, or the leading ones of factors; the tests of the index say what these are."""
    layers = select_layers(setting.model, setting.task.layers)
    kind: Any = "random" if factors is None else "eigenvectors"
    return Compression(directions=kind, rank=RANK, seed=setting.seed).projections(layers, factors)


def projected_rows(setting: Setting, found: Mapping[str, Projection]) -> tuple[Rows, Rows]:
    """Projected gradients [examples, numbers] of queries and of training examples, layer by layer."""
    brute = brute_force(setting)
    return projected(brute.queries, found), projected(brute.train, found)


def logra(setting: Setting, factors: wf.Factors | None = None) -> Tensor:
    queries, train = projected_rows(setting, directions(setting, factors))
    total = torch.zeros(len(setting.queries), len(setting.train), dtype=torch.float64)
    for name, rows in train.items():
        total += queries[name] @ torch.linalg.solve(damped(rows.T @ rows / len(rows), setting.damping), rows.T)
    return total


def logra_of_eigenvectors(setting: Setting) -> Tensor:
    with tempfile.TemporaryDirectory() as run:
        return logra(setting, study_of(setting, run).fit(wf.KFAC(seed=setting.seed, empirical=setting.empirical)))


def trak(setting: Setting) -> Tensor:
    """The loss is what is measured, so that the weights of training examples are 1."""
    brute, found = brute_force(setting), directions(setting)
    queries, outputs = (
        torch.cat(list(projected(each, found).values()), 1)
        for each in (brute.queries, measured(brute, setting.case.train))
    )
    kernel = damped(outputs.T @ outputs / len(outputs), setting.damping) * len(outputs)
    products: Tensor = queries @ torch.linalg.solve(kernel, outputs.T)
    return products


def trackstar(setting: Setting, mixing: float = 0.9) -> Tensor:
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    queries, train = projected_rows(setting, directions(setting))
    for name, rows in train.items():
        queried = queries[name]
        mixed = mixing * queried.T @ queried / len(queried) + (1 - mixing) * rows.T @ rows / len(rows)
        numbers, vectors = torch.linalg.eigh(damped(mixed, setting.damping))
        for side, each in zip(sides, (queried, rows), strict=True):
            side.append(each @ vectors @ (numbers**-0.5).diag())
    first, second = (functional.normalize(torch.cat(side, 1), dim=1) for side in sides)
    return first @ second.T


def sampled_fisher(setting: Setting) -> Tensor:
    with tempfile.TemporaryDirectory() as run:
        study = study_of(setting, run)
        return dense_fisher(setting.case, study, setting.damping, seed=setting.seed, samples=SAMPLES)


def magic(training_of: Callable[[Setting], wf.ReplayableTraining[Any]]) -> Truth:
    """By one graph of all steps."""
    return lambda setting: by_one_graph(setting.case, training_of(setting).recipe)


def trajectory(training_of: Callable[[Setting], wf.ReplayableTraining[Any]]) -> Truth:
    """By dense matrices, forwards through all steps."""

    def truth(setting: Setting) -> Tensor:
        with tempfile.TemporaryDirectory() as run:
            names = parameters_of(study_of(setting, run))
        return dense_trajectory(
            setting.case, training_of(setting), setting.checkpoints, names, seed=setting.seed, draws=SAMPLES
        )

    return truth


def trajectory_flow(training_of: Callable[[Setting], wf.ReplayableTraining[Any]]) -> Truth:
    """By dense steps with a dense Gauss-Newton matrix."""

    def truth(setting: Setting) -> Tensor:
        with tempfile.TemporaryDirectory() as run:
            layers = list(study_of(setting, run).layers)
        return dense_steps(setting.case, training_of(setting), setting.checkpoints[-1], layers, token_logits)

    return truth


def bm25(setting: Setting) -> Tensor:
    return torch.tensor(bm25_formula(*setting.texts), dtype=torch.float64)
