"""Factors and scores against dense matrices in float64, and cases where K-FAC is the Gauss-Newton matrix itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import CaseMaker, gpt2_case, mlp_case, relative_error, widened
from tests.reference import BruteForce
from tests.runs import factored, only, with_factors
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError

CASES = {"mlp": mlp_case, "gpt2": gpt2_case}


SEED = 5

ExactCase = Callable[[], tuple[nn.Linear, wf.Task[Any], list[object]]]


@functools.cache
def brute_force(make: CaseMaker, dtype: torch.dtype, seed: int | None) -> BruteForce:
    case = make(dtype)
    layers = list(select_layers(case.model, case.task.layers))
    return BruteForce(case.model, case.task, layers, widened(case.train), widened(case.queries), seed)


@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("make", "empirical"), [(mlp_case, False), (mlp_case, True), (gpt2_case, True)])
def test_scores_equal_brute_force(
    tmp_path: Path, make: CaseMaker, strategy: str, damping: float | None, empirical: bool
) -> None:
    """With drawn targets of a language model, the contract of all methods says it."""
    case = make(torch.float64)
    execution = wf.Execution(train_batch_size=5, query_batch_size=3)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    scores = study.score(case.queries, factored(strategy, empirical=empirical, seed=SEED, damping=damping))
    expected = brute_force(make, torch.float64, None if empirical else SEED).scores(strategy, damping)
    assert scores.values.dtype == torch.float64
    assert relative_error(scores.values, expected) < 1e-8


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_float32_scores_are_close_to_brute_force(tmp_path: Path, make: CaseMaker, strategy: str) -> None:
    case = make(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores = study.score(case.queries, factored(strategy, seed=SEED))
    assert scores.values.dtype == torch.float32
    assert relative_error(scores.values, brute_force(make, torch.float32, SEED).scores(strategy)) < 1e-4


def exact_regression() -> tuple[nn.Linear, wf.Regression, list[object]]:
    """A linear model whose residuals are a full factorial: S is the identity, independent of the inputs."""
    torch.manual_seed(0)
    inputs, outputs = 4, 3
    model = nn.Linear(inputs, outputs).double()
    examples: list[object] = []
    for features in torch.randn(6, inputs, dtype=torch.float64):
        prediction = model(features).detach()
        for residual in torch.eye(outputs, dtype=torch.float64) * outputs**0.5:
            examples += [(features, prediction + residual), (features, prediction - residual)]
    return model, wf.Regression(), examples


def exact_classification() -> tuple[nn.Linear, wf.Classification, list[object]]:
    """A softmax model with uniform predictions, every input with every label once."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.zeros_(model.weight)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    return model, wf.Classification(), [(x, torch.tensor(label)) for x in inputs for label in range(3)]


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
@pytest.mark.parametrize("damping", [None, 0.3])
@pytest.mark.parametrize("make", [exact_regression, exact_classification])
def test_kfac_is_the_hessian_where_it_should_be(
    tmp_path: Path, make: ExactCase, strategy: str, damping: float | None
) -> None:
    model, task, examples = make()
    # One wrapper, so that the layer has a name.
    study = wf.Study(tmp_path, nn.Sequential(model), task, train=examples)
    factors = study.fit(factored(strategy, empirical=True))
    hessian = _hessian(model, task, examples)  # of the mean loss, [out * in, out * in]
    added = 0.1 * float(hessian.diagonal().mean()) if damping is None else damping
    gradients = torch.randn(7, *study.layers["0"].shape, dtype=torch.float64)
    expected = torch.linalg.solve(
        hessian + added * torch.eye(len(hessian), dtype=torch.float64), gradients.flatten(1).T
    ).T
    found = factors.preconditioner(damping).apply("0", gradients).flatten(1)
    assert relative_error(found, expected) < 1e-10


def _hessian(model: nn.Linear, task: wf.Task[Any], examples: list[object]) -> Tensor:
    """The Hessian of the mean loss with respect to [weight, bias] as one flattened matrix."""
    batch = task.collate(examples)
    biased = model.bias is not None
    matrix = torch.cat([model.weight, model.bias[:, None]], 1) if biased else model.weight

    def loss(flat: Tensor) -> Tensor:
        weight = flat.view_as(matrix)
        state = {"weight": weight[:, :-1], "bias": weight[:, -1]} if biased else {"weight": weight}
        return task.train_loss(lambda x: torch.func.functional_call(model, state, (x,)), batch) / len(examples)  # type: ignore[arg-type]

    hessian: Tensor = torch.func.hessian(loss)(matrix.detach().flatten())
    return hessian


def test_damping_is_applied_after_the_fit(tmp_path: Path) -> None:
    """Raw factors are stored once; a zero eigenvalue without damping is a direction that is left out."""
    model, task, examples = exact_classification()
    study = wf.Study(tmp_path, nn.Sequential(model), task, train=examples)
    factors = study.fit(wf.KFAC(empirical=True))
    # Softmax gradients sum to zero over classes: one third of the eigenvalues is exactly or nearly zero.
    pseudo_inverse = torch.linalg.pinv(_hessian(model, task, examples), rtol=1e-10)
    gradients = study.score(examples, wf.Dot(), name="raw").values
    scores = study.score(examples, with_factors(factors, damping=1e-13)).values
    brute = BruteForce(nn.Sequential(model), task, ["0"], examples, [])
    flat = torch.stack([each["0"].flatten() for each in brute.train])
    assert relative_error(gradients, flat @ flat.T) < 1e-12
    assert relative_error(scores, flat @ pseudo_inverse @ flat.T) < 1e-8


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_impossible_damping_is_refused(tmp_path: Path, damping: float) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with pytest.raises(wf.WherefromError, match="damping="):
        study.score(case.queries, wf.Diagonal(damping=damping))


@pytest.mark.parametrize("method", ["ekfac", wf.EKFAC])
def test_what_is_no_method_is_refused(tmp_path: Path, method: Any) -> None:
    """A name, or a method that nobody has made: the parentheses are missing."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    calls: list[Callable[[], object]] = [
        lambda: study.fit(method),
        lambda: study.score(case.queries, method),
        lambda: study.plan(case.queries, method),
        lambda: study.self_influence(method),
        lambda: study.index(method),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"method=.*: expected .*, such as EKFAC\(\)"):
            call()


def test_factors_of_another_strategy_are_refused(tmp_path: Path) -> None:
    case = mlp_case()
    factors = wf.Study(tmp_path, case.model, case.task, train=case.train).fit(wf.KFAC())
    with pytest.raises(InputError, match="factors are of the strategy 'kfac': expected those of EKFAC, 'ekfac'"):
        wf.EKFAC(factors=factors)


def test_strategies_lie_beside_each_other(tmp_path: Path) -> None:
    """Two bases in one folder: neither is taken for the other, and beginning one anew leaves the other."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = {strategy: study.score(case.queries, factored(strategy)).values for strategy in ("ekfac", "shampoo")}
    folder = only(tmp_path / "factors", "sampled")
    assert relative_error(expected["shampoo"], expected["ekfac"]) > 1e-3
    shared = {"covariance", "eigenbasis", "eigenvalues"}
    assert {path.name for path in folder.iterdir()} == shared | {f"gradient-{name}" for name in shared}
    before = {name: (folder / name / "tensors.safetensors").stat().st_mtime_ns for name in shared}
    study.fit(wf.Shampoo(), overwrite=True)
    assert before == {name: (folder / name / "tensors.safetensors").stat().st_mtime_ns for name in shared}
    for strategy, values in expected.items():
        assert torch.equal(study.score(case.queries, factored(strategy), name=f"{strategy}-again").values, values)
