"""Scores with the sampled Fisher matrix: against the dense matrix of gradients drawn one example at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from wherefrom.runtime.errors import InputError

SAMPLES, SEED = 2, 5

each_case = pytest.mark.parametrize("make_case", [mlp_case, gpt2_case])


def study_of(case: Case, path: Path) -> wf.Study[Any]:
    return wf.Study(path, case.model, case.task, train=case.train)


def gradients(study: wf.Study[Any], losses: list[Tensor]) -> Tensor:
    """Of each loss by all tracked weights, [losses, weights]."""
    weights = [part.parameter for layer in study.layers.values() for part in layer.parts]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(each, weights)]) for each in losses])


def dense(
    case: Case,
    study: wf.Study[Any],
    damping: float | None,
    scale: Tensor | None = None,
    seed: int = SEED,
    samples: int = SAMPLES,
) -> Tensor:
    """g_q^T (F + damping P^-1)^-1 g_t with the matrix itself."""
    task, model = case.task, case.model

    def alone(example: object) -> Any:
        return task.collate([example])

    count = samples * len(case.train)
    drawn = gradients(
        study,
        [
            task.train_loss(model, alone(case.train[row % len(case.train)]), wf.Sampler(seed, [row]))
            for row in range(count)
        ],
    )
    trained = gradients(study, [task.train_loss(model, alone(each)) for each in case.train])
    queried = gradients(study, [task.measurement(model, alone(each)) for each in case.queries])
    scale = torch.ones_like(drawn[0]) if scale is None else scale
    added = damping or 0.01 * float((drawn.square() * scale).sum(1).mean()) / count
    matrix = drawn.T @ drawn / count + (added / scale).diag()
    found: Tensor = queried @ torch.linalg.solve(matrix, trained.T)
    return found


@each_case
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_scores_are_those_of_the_dense_matrix(make_case: Any, damping: float | None, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = study_of(case, tmp_path)
    found = study.score(case.queries, wf.Fisher(samples=SAMPLES, damping=damping, seed=SEED))
    assert relative_error(found.values, dense(case, study, damping)) < 1e-8


@each_case
def test_scores_in_the_coordinates_of_an_optimizer(make_case: Any, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = study_of(case, tmp_path)
    generator = torch.Generator().manual_seed(1)
    given = {
        name: torch.rand(each.shape, generator=generator, dtype=torch.float64) + 0.1
        for name, each in case.model.named_parameters()
    }
    of_weights = {id(each): given[name] for name, each in case.model.named_parameters()}
    weights = [part.parameter for layer in study.layers.values() for part in layer.parts]
    scale = torch.cat([of_weights[id(each)].flatten() for each in weights])
    found = study.score(case.queries, wf.Fisher(samples=SAMPLES, conditioning=given, damping=0.01, seed=SEED))
    assert relative_error(found.values, dense(case, study, 1e-2, scale)) < 1e-8


def test_products_serve_another_damping(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = study_of(case, tmp_path)
    first = study.score(case.queries, wf.Fisher(samples=SAMPLES, damping=0.01))
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "fisher").rglob("*.safetensors")}
    again = study.score(case.queries, wf.Fisher(samples=SAMPLES, damping=0.001))
    assert relative_error(again.values, first.values) > 1e-3
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "fisher").rglob("*.safetensors")} == kept


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = study_of(case, tmp_path)
    with pytest.raises(InputError, match="samples=0: expected at least 1"):
        wf.Fisher(samples=0)
    with pytest.raises(InputError, match=r"damping=0\.0: expected a number above 0"):
        wf.Fisher(damping=0.0)
    with pytest.raises(InputError, match="name='a.blocks'"):
        study.score(case.queries, wf.Fisher(), name="a.blocks")
    with pytest.raises(InputError, match="queries is empty"):
        study.score([], wf.Fisher())
    assert not (tmp_path / "scores").exists()
