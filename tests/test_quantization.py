"""Query gradients in 8 bits: their rounding is bounded, and so is what it does to scores; nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.runs import only, with_factors
from wherefrom.engine.capture import Captured
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.planning.forms import BankForm, dequantized, quantized
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.bank import GradientBank

CPU = torch.device("cpu")


@given(
    exponent=st.integers(-200, 200), columns=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float64])
)
@settings(deadline=None, max_examples=60)
def test_no_number_moves_by_more_than_half_a_scale(exponent: int, columns: int, dtype: torch.dtype) -> None:
    """Each row by a scale of its own, a 127th of its largest magnitude, however small or large that is."""
    exponent = exponent if dtype == torch.float64 else exponent // 8
    rows = torch.tensor([1.0, 1e-6, 0.0, 1e6], dtype=dtype) * 10.0**exponent
    matrices = torch.randn(3, 4, columns, dtype=dtype) * rows.unsqueeze(1)
    values, scales = quantized(matrices)
    assert values.dtype == torch.int8
    assert relative_error(scales, matrices.abs().amax(-1) / 127) < 1e-6
    moved = (dequantized(values, scales, torch.empty_like(matrices)) - matrices).abs()
    assert bool((moved <= 0.50001 * scales.unsqueeze(-1)).all())


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_what_is_not_finite_has_no_finite_scale(wrong: float) -> None:
    scales = quantized(torch.tensor([[1.0, wrong], [1.0, 2.0]]))[1]
    assert scales.isfinite().tolist() == [False, True]


def captured_batches(case: Case, rows: list[object], study: Any) -> dict[str, Captured]:
    """All examples in one batch, layer by layer."""
    found: dict[str, Captured] = {}
    study._sweep.probe(Examples(rows, case.task), lambda layer, each: found.update({layer: each}), count=len(rows))
    return found


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("pieces", [2**28, 1])
def test_scores_move_by_no_more_than_the_rounding_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool, pieces: int
) -> None:
    """Half a scale for each number of a training gradient in the same row, all queries together or one by one."""
    monkeypatch.setattr("wherefrom.planning.forms.PIECE_BYTES", pieces)
    case = gpt2_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    layers = select_layers(case.model, case.task.layers)
    preconditioner = study.fit(wf.EKFAC()).preconditioner()
    rotated_back = dict.fromkeys(layers, (back, back))
    exact, rounded = (
        GradientBank(layers, preconditioner, 5, BankForm(torch.float64, CPU, rotated_back=rotated_back, bits=bits))
        for bits in (None, 8)
    )
    queries, train = (captured_batches(case, rows, study) for rows in (case.queries, case.train))
    for layer, each in queries.items():
        for bank in (exact, rounded):
            bank.collect(layer, each, slice(0, 5))
        expected, found = (bank.product(layer, train[layer]) for bank in (exact, rounded))
        gradients = torch.einsum("bto,bti->boi", train[layer].gradients, train[layer].activations)
        if not back:
            basis = preconditioner.bases[layer]
            inputs = layers[layer].shape[1]
            gradients = basis.rotate(gradients[..., :inputs])
        allowed = 0.5 * rounded.sums[f"{layer}.scales"] @ gradients.abs().sum(2).T  # [queries, batch]
        assert bool(((found - expected).abs() <= 1.0001 * allowed + 1e-12).all())
        assert 0 < relative_error(found, expected) < 0.05
        in_basis = rounded.in_basis(layer, train[layer])
        tokens = torch.stack([rounded.token_products(layer, query, in_basis).sum(1) for query in range(5)])
        assert relative_error(tokens, found) < 1e-9
    held = sum(each.numel() * each.element_size() for name, each in rounded.sums.items() if "squared" not in name)
    form = BankForm(torch.float64, CPU, bits=8)
    assert held == 5 * form.bytes_per_query(layers)
    # The norm of what was left out, over all layers.
    rest = norm = torch.zeros(5, dtype=torch.float64)
    for layer in layers:
        whole, values = exact.sums[layer], rounded.sums[layer] * rounded.sums[f"{layer}.scales"].unsqueeze(2)
        rest, norm = rest + (whole - values).square().sum((1, 2)), norm + whole.square().sum((1, 2))
    errors = rounded.relative_errors()
    assert errors is not None
    assert relative_error(errors, (rest / norm).sqrt()) < 1e-9


@pytest.mark.parametrize("half", [False, True])
def test_a_study_keeps_them_apart_and_computes_the_highest_again(tmp_path: Path, half: bool) -> None:
    case = gpt2_case(torch.float32)
    factors = wf.Study(tmp_path, case.model, case.task, train=case.train).fit()
    execution = wf.Execution(half_precision=half)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    exact = study.score(case.queries, with_factors(factors))
    found = study.score(case.queries, with_factors(factors, query_bits=8))
    assert found.query_errors is not None
    assert 0 < float(found.query_errors.max()) < 0.01
    assert 0 < relative_error(found.values, exact.values) < 0.02
    ending = "-half" * half
    assert only(tmp_path / "scores", f"ekfac-8bit{ending}").name == found.name
    assert found.fingerprint["query bits"] == "8"
    assert "query bits" not in exact.fingerprint
    again = study.score(case.queries, with_factors(factors, query_bits=8, rescore=3), name="again")
    chosen = found.values.topk(3, dim=1).indices
    assert relative_error(again.values.gather(1, chosen), exact.values.gather(1, chosen)) < 1e-5
    top = study.score(case.queries, with_factors(factors, query_bits=8), keep=wf.Top(2))
    assert relative_error(top.values, found.values.topk(2, dim=1).values) < 1e-5
    with pytest.raises(wf.WherefromError, match="query bits: stored 8, the top 3 whole, now nothing"):
        study.score(case.queries, with_factors(factors), name="again")


def test_several_blocks_and_one_hot_layers(tmp_path: Path) -> None:
    """Embeddings stay as they are, and queries may be resident one after another."""
    from tests.test_layers import embedding_case

    case = embedding_case()
    factors = wf.Study(tmp_path / "0", case.model, case.task, train=case.train).fit(wf.EKFAC())
    found = []
    for budget, bits in ((None, None), (None, 8), (1e-9, 8)):
        folder, execution = tmp_path / f"{budget}{bits}", wf.Execution(memory_budget=budget)
        study = wf.Study(folder, case.model, case.task, train=case.train, execution=execution)
        found.append(study.score(case.queries, with_factors(factors, query_bits=bits)).values)
    assert 0 < relative_error(found[1], found[0]) < 0.02
    assert relative_error(found[2], found[1]) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_bits": 4}, "query_bits=4: expected 8, or None"),
        ({"query_bits": 8, "query_rank": 2}, "query_bits=8 with query_rank=2: matrices of low rank"),
        ({"query_bits": 8, "solver": wf.Astra()}, "query_bits=8 with a solver"),
    ],
)
def test_what_cannot_be_done_in_8_bits_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wf.EKFAC(**options)


def test_sums_and_candidates_are_scored_without(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with pytest.raises(InputError, match=r"query_bits=8 with keep=Aggregated\(queries='sum'.*Leave query_bits out"):
        study.score(case.queries, wf.Dot(query_bits=8), keep=wf.Aggregated(queries="sum"))
    with pytest.raises(InputError, match=r"then=.*query_bits=8.*: candidates are scored with whole gradients"):
        wf.TwoStage(first=torch.zeros(5, 1).long(), then=wf.Dot(query_bits=8))
