"""Factors of conditioned gradients: against dense matrices in float64, and what they have in common with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored, labels, with_factors
from tests.test_layers import CASES
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, MismatchError

SEED = 7
STRATEGIES = ["identity", "diagonal", "shampoo"]
MAKERS: dict[str, Callable[[], Case]] = {**CASES, "mlp": mlp_case, "gpt2": gpt2_case}


def numbers(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """P from 0.1 to 10, for each weight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 10 ** (2 * torch.rand(each.shape, dtype=torch.float64, generator=generator) - 1)
        for name, each in model.named_parameters()
    }


def brute_force(case: Case, conditioning: dict[str, Tensor]) -> BruteForce:
    layers = list(select_layers(case.model, case.task.layers))
    return BruteForce(case.model, case.task, layers, case.train, case.queries, SEED).conditioned(conditioning)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "conv2d", "norms", "embedding", "tied gpt2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_equal_brute_force(tmp_path: Path, name: str, strategy: str) -> None:
    case = MAKERS[name]()
    conditioning = numbers(case.model)
    execution = wf.Execution(query_batch_size=2, train_batch_size=5)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    factors = study.fit(factored(strategy, seed=SEED, conditioning=conditioning))
    expected = brute_force(case, conditioning)
    for damping in (None, 0.01):
        scores = study.score(case.queries, with_factors(factors, damping=damping))
        assert relative_error(scores.values, expected.scores(strategy, damping)) < 1e-8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_score_says_the_same(tmp_path: Path, strategy: str) -> None:
    """Low rank that is no lower than the gradients', a large index, tokens' parts and norms, from the same factors."""
    case = gpt2_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(factored(strategy, seed=SEED, conditioning=numbers(case.model)))
    scores = study.score(case.queries, with_factors(factors))
    assert labels(tmp_path / "scores") == [f"{factored(strategy).name}-conditioned"]
    low = study.score(case.queries, with_factors(factors, query_rank=4, rescore=len(case.train)))
    assert relative_error(low.values, scores.values) < 1e-9
    sketched = study.index(with_factors(factors), wf.Sketch(numbers=2**16, bits=32, focus=0)).query(case.queries, k=14)
    assert relative_error(sketched.values, scores.values.sort(1, descending=True).values) < 1e-9
    tokens = study.score(case.queries, with_factors(factors), keep=wf.Tokens())
    sums = torch.tensor([[float(tokens[query, row].sum()) for row in range(14)] for query in range(5)])
    assert relative_error(sums, scores.values) < 1e-5
    among = study.score(case.train, with_factors(factors))
    assert relative_error(study.self_influence(with_factors(factors)), among.values.diagonal()) < 1e-9


def test_norms_are_of_preconditioned_gradients_in_the_weights_own_coordinates(tmp_path: Path) -> None:
    case = mlp_case()
    conditioning = numbers(case.model)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores = study.score(
        case.queries, wf.Shampoo(seed=SEED, conditioning=conditioning, damping=0.1), keep=wf.Pairs(self_influence=True)
    )
    brute, total = brute_force(case, conditioning), torch.zeros(len(case.train), dtype=torch.float64)
    for layer in brute.layers:
        roots = brute.matrix(layer, conditioning).sqrt().flatten()
        damped = brute.curvature("shampoo", layer)
        damped = damped + 0.1 * torch.eye(len(damped), dtype=torch.float64)
        rows = torch.stack([each[layer].flatten() for each in brute.train])
        total += (torch.linalg.solve(damped, rows.T).T * roots).square().sum(1)
    expected = scores.values / total.sqrt()
    assert relative_error(scores.normalized("theta-relatif").values, expected) < 1e-9


def test_one_number_for_all_weights_is_a_scale_of_damping(tmp_path: Path) -> None:
    """P = c: c (c H + d)^-1 = (H + d / c)^-1; and with damping in units of the curvature, c is gone."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    constant = {name: torch.full_like(each, 5.0) for name, each in case.model.named_parameters()}
    for damping, other in ((None, None), (0.1, 0.5)):
        found = study.score(case.queries, wf.Shampoo(conditioning=constant, damping=other)).values
        expected = study.score(case.queries, wf.Shampoo(damping=damping)).values
        assert relative_error(found, expected) < 1e-9


def test_a_fit_is_reused_and_another_conditioning_refused(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    conditioning = numbers(case.model)
    plain, first = study.fit(wf.Shampoo()), study.fit(wf.Shampoo(conditioning=conditioning), name="mine")
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    again = study.fit(wf.Shampoo(conditioning=conditioning), name="mine")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == files
    values = study.score(case.queries, with_factors(first)).values
    assert torch.equal(study.score(case.queries, with_factors(again), name="again").values, values)
    with pytest.raises(MismatchError, match="conditioning: stored"):
        study.fit(wf.Shampoo(conditioning=numbers(case.model, seed=1)), name="mine")
    with pytest.raises(MismatchError, match="conditioning: stored"):
        study.score(case.queries, with_factors(plain), name="again")
    other = study.fit(wf.Shampoo(conditioning=numbers(case.model, seed=1)))
    assert relative_error(study.score(case.queries, with_factors(other)).values, values) > 1e-3
    assert torch.equal(study.score(case.queries, with_factors(first)).values, values)


def test_what_cannot_be_conditioned_is_named(tmp_path: Path) -> None:
    case = mlp_case()
    run = tmp_path / "run"
    study = wf.Study(run, case.model, case.task, train=case.train)
    conditioning = numbers(case.model)
    for strategy in ("kfac", "ekfac"):
        with pytest.raises(InputError, match=f"strategy='{strategy}' with a conditioning"):
            study.fit(factored(strategy, conditioning=conditioning))
    lacking = {name: each for name, each in conditioning.items() if name != "first.bias"}
    with pytest.raises(InputError, match=r"has nothing for first.bias \[5\], which layer 'first' uses"):
        study.fit(wf.Shampoo(conditioning=lacking))
    with pytest.raises(InputError, match=r"has nothing for first.bias \[5\]"):
        study.fit(wf.Shampoo(conditioning={**conditioning, "first.bias": torch.ones(4)}))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="numbers of first.bias"):
            study.fit(wf.Shampoo(conditioning={**conditioning, "first.bias": torch.full((5,), bad)}))
    assert not (run / "factors").exists()
