"""Gradient flow for a finite time, and when to stop, against dense algebra in float64."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import wherefrom as wf
from tests.dense_gauss_newton import dense, gpt2_case, label_rows, token_logits
from tests.models import mlp_case, relative_error
from tests.reference import BruteForce
from tests.test_solvers import recorded
from wherefrom.curvature.conditioning import adam_conditioning
from wherefrom.curvature.solvers.solver import MOST_CHANGE, not_converged
from wherefrom.runtime.errors import InputError, LossError
from wherefrom.scoring.results import Scores


def flow_matrix(curvature: Tensor, damping: Tensor) -> Tensor:
    """(1 - exp(-D^-1 H)) H^-1 as the time integral of exp(-t D^-1 H) D^-1 over [0, 1], by matrix exponentials."""
    size = len(damping)
    generator = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    generator[:size, :size] = -curvature / damping.unsqueeze(1)
    generator[:size, size:] = (1 / damping).diag()
    whole: Tensor = torch.linalg.matrix_exp(generator)  # Van Loan 1978
    return whole[:size, size:]


class Dense:
    """A system of dense matrices."""

    examples = 1

    def __init__(self, curvature: Tensor, damping: Tensor) -> None:
        self.curvature, self.damping, self.products = curvature, damping, 0

    def product(self, vectors: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
        self.products += len(vectors)
        return vectors @ self.curvature + vectors * self.damping

    def precondition(self, vectors: Tensor) -> Tensor:
        return vectors / self.damping


def a_system(size: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Dense, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    damping = torch.rand(size, generator=generator, dtype=torch.float64) * 3 + 0.01
    return Dense((root.T @ root / rank).to(dtype), damping.to(dtype)), generator


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 7), block=st.integers(1, 4), rank=st.integers(1, 12), seed=st.integers(0, 99),
    same=st.booleans(),
)  # fmt: skip
def test_a_complete_space_has_the_whole_flow(queries: int, block: int, rank: int, seed: int, same: bool) -> None:
    system, generator = a_system(30, rank, seed)
    gradients = torch.randn(queries, 30, generator=generator, dtype=torch.float64)
    gradients[-1] *= 1e-7
    if same:
        gradients[0] = 2 * gradients[queries // 2]
    if queries > 3:
        gradients[1] = 0
    found = wf.GradientFlow(40, 0.0, block_size=block).solve(system, gradients)
    expected = gradients @ flow_matrix(system.curvature, system.damping).T
    error = (found.vectors - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    assert float(error.max()) < 1e-6
    # A space that is complete costs nothing more.
    assert system.products <= -(-queries // block) * (rank + 2) * min(block, queries)


def test_float32_loses_nothing_but_its_rounding() -> None:
    system, generator = a_system(400, 300, 0)
    gradients = torch.randn(8, 400, generator=generator, dtype=torch.float64)
    gradients[3] = gradients[2] + 1e-3 * gradients[3]
    expected = gradients @ flow_matrix(system.curvature, system.damping).T
    single = Dense(system.curvature.float(), system.damping.float())
    found = wf.GradientFlow(60, 0.0, block_size=8).solve(single, gradients.float())
    assert relative_error(found.vectors.double(), expected) < 1e-4
    difference = (found.vectors[3] - found.vectors[2]).double()
    assert relative_error(difference, expected[3] - expected[2]) < 1e-2


@pytest.mark.parametrize("name", ["classification", "gpt2"])
def test_scores_are_those_of_dense_exponentials_in_adams_coordinates(tmp_path: Path, name: str) -> None:
    case, logits = (mlp_case(), label_rows) if name == "classification" else (gpt2_case(), token_logits)
    history = recorded(case, tmp_path)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train, history=history)
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries)
    queries, train = brute.vectors(brute.queries), brute.vectors(brute.train)
    preconditioner = adam_conditioning(history[-1])
    inverse = torch.cat([1 / brute.matrix(name, preconditioner).flatten() for name in brute.layers])
    method = wf.Dot(adam=True, damping=0.05, solver=wf.GradientFlow(300, 0.0, block_size=3))
    found = study.score(case.queries, method)
    expected = queries @ flow_matrix(dense(case, study, logits).detach(), 0.05 * inverse).T @ train.T
    assert relative_error(found.values, expected) < 1e-6
    assert found.residuals is None and found.last_changes is not None and found.name.startswith("dot-conditioned-flow")
    stored = Scores.load(tmp_path / "run" / "scores" / found.name).last_changes
    assert stored is not None and torch.equal(stored, found.last_changes)
    total = study.score(case.queries, method, keep=wf.Aggregated(queries="sum"))
    assert relative_error(total.values[0], expected.sum(0)) < 1e-6
    assert study.score(case.queries, method, keep=wf.Top(2)).last_changes is not None


@pytest.mark.parametrize("solver", [wf.ConjugateGradients, wf.GradientFlow])
def test_changes_are_those_of_scores_of_the_gradients_that_the_curvature_is_of(
    solver: type[wf.ConjugateGradients | wf.GradientFlow],
) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(50, 60, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 60)
    system = Dense(train.T @ train / len(train), torch.full((60,), 0.02, dtype=torch.float64))
    gradients = torch.randn(5, 60, generator=generator, dtype=torch.float64)
    steps = [
        solver(count, 0.0, block_size=2).solve(system, gradients).vectors @ train.T for count in (1, 2, 3, 4)
    ]  # [queries, train]
    found = solver(4, 0.0, block_size=2).solve(system, gradients).changes
    assert found is not None
    for number, (before, after) in enumerate(pairwise(steps), 1):
        assert relative_error(found[number], (after - before).norm(dim=1) / after.norm(dim=1)) < 1e-6
    assert torch.allclose(found[0], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(
    "solver",
    [wf.ConjugateGradients(40, 0.0, change=0.05, block_size=2), wf.GradientFlow(40, 0.05, block_size=2)],
    ids=str,
)
def test_a_block_is_done_when_an_iteration_changes_its_scores_by_little(
    solver: wf.ConjugateGradients | wf.GradientFlow,
) -> None:
    system, generator = a_system(60, 50, 1)
    gradients = torch.randn(4, 60, generator=generator, dtype=torch.float64)
    gradients[2:] = system.damping  # nothing but a start, of whose scores there is little to change
    found = solver.solve(system, gradients)
    changes = found.changes
    assert changes is not None and 1 < found.iterations < 40
    assert float(changes[-1].max()) <= 0.05 < float(changes[-2].max())
    alone = solver.solve(system, gradients[:2])
    assert relative_error(found.vectors[:2], alone.vectors) < 1e-12


def test_what_is_solved_or_nothing_is_not_said_to_change() -> None:
    system = Dense(2 * torch.eye(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    gradients = torch.eye(6, dtype=torch.float64)[:3].clone()
    gradients[2] = 0
    for solver in (wf.GradientFlow(4), wf.GradientFlow(1), wf.ConjugateGradients(4), wf.ConjugateGradients(1)):
        found = solver.solve(system, gradients)
        assert found.iterations == 1 and found.vectors[2].count_nonzero() == 0
        assert not_converged(found.accuracy, solver, "1") is None
    nothing = wf.GradientFlow(4).solve(system, torch.zeros_like(gradients))
    assert not nothing.vectors.any() and float(nothing.accuracy["last_changes"].max()) == 0


@pytest.mark.parametrize("ratio", [1e4, 1e6, 1e7])
def test_curvature_that_is_lost_in_rounding_ends_nothing(ratio: float) -> None:
    """Weights that training has hardly seen, of little damping, beside those with curvature, in float32."""
    generator = torch.Generator().manual_seed(3)
    train = torch.randn(40, 100, generator=generator, dtype=torch.float64)
    curvature = torch.block_diag(torch.zeros(100, 100, dtype=torch.float64), train.T @ train / 40)
    damping = torch.cat([torch.full((100,), 1 / ratio), torch.ones(100)]).double()
    system = Dense(curvature.float(), damping.float())
    gradients = torch.randn(20, 200, generator=generator)
    usual, watched = (wf.ConjugateGradients(50, change=each).solve(system, gradients) for each in (0.0, 1e-30))
    assert torch.equal(usual.vectors, watched.vectors)
    assert usual.changes is not None and usual.residuals is not None
    assert bool(((usual.changes[-1] > 0) | (usual.residuals[-1] <= 1e-3)).all())


def test_a_released_space_holds_none_of_its_directions() -> None:
    system, generator = a_system(30, 20, 0)
    (space,), _ = wf.GradientFlow(3, 0.0, block_size=4).spaces(
        system, torch.randn(4, 30, generator=generator, dtype=torch.float64)
    )
    directions, curvature = space.release(), space.curvature
    added = directions * system.damping @ directions.T
    assert relative_error(added, torch.eye(12, dtype=torch.float64)) < 1e-12
    assert relative_error(directions @ system.curvature @ directions.T, curvature) < 1e-10
    assert not any(each.untyped_storage().nbytes() for each in (space._next, *space._further, *space.directions))


def test_scores_that_still_change_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with caplog.at_level(logging.WARNING, "wherefrom"):
        found = study.score(case.queries, wf.Dot(damping=1e-3, solver=wf.GradientFlow(2)))
    assert found.last_changes is not None and float(found.last_changes.max()) > MOST_CHANGE
    assert str(wf.GradientFlow(2)) in caplog.text and "has not converged: the last iteration" in caplog.text
    assert "larger damping" not in caplog.text
    caplog.clear()
    done = study.score(case.queries, wf.Dot(damping=1e-3, solver=wf.GradientFlow(100)))
    assert done.last_changes is not None and float(done.last_changes.max()) <= wf.GradientFlow().tolerance
    assert "converged" not in caplog.text


def test_products_that_are_not_finite_are_an_error() -> None:
    system, _ = a_system(30, 5, 0)
    system.curvature[3] = torch.inf
    with pytest.raises(LossError, match="not finite"):
        wf.GradientFlow(3).solve(system, torch.ones(2, 30, dtype=torch.float64))


def test_factors_that_it_would_not_use_are_refused() -> None:
    with pytest.raises(InputError, match="fitted for nothing. Take Dot"):
        wf.EKFAC(solver=wf.GradientFlow())
    for options in ({"iterations": 0}, {"tolerance": -1.0}, {"block_size": 0}, {"examples": 0}):
        with pytest.raises(InputError, match=f"GradientFlow: {next(iter(options))}="):
            wf.GradientFlow(**options)
