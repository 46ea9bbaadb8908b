"""Query gradients of low rank: exact where the rank is enough, otherwise as far off as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wherefrom as wf
from tests.models import CaseMaker, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.curvature.operators import Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.modules.layers import select_layers
from wherefrom.planning.forms import BankForm, truncated
from wherefrom.runtime.memory import Workspace
from wherefrom.scoring.bank import GradientBank
from wherefrom.store.artifacts import stored_matrices
from wherefrom.store.cache import Blocks, Unfinished

CPU = torch.device("cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", [mlp_case, gpt2_case])
def test_a_rank_that_is_enough_changes_nothing(tmp_path: Path, make: CaseMaker, strategy: str) -> None:
    """Layers that would take more memory as two matrices stay whole; others have no more directions than the rank."""
    case = make(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, factored(strategy)).values
    found = study.score(case.queries, factored(strategy, query_rank=100))
    assert relative_error(found.values, expected) < 1e-9
    assert found.query_errors is not None
    assert float(found.query_errors.max()) < 1e-6


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_scores_of_low_rank_are_those_of_the_best_approximation(tmp_path: Path, strategy: str) -> None:
    """numpy's singular value decomposition of each preconditioned gradient, found by brute force."""
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = factored(strategy, empirical=True, query_rank=1, damping=0.1)
    scores = study.score(case.queries, method, execution=wf.Execution(train_batch_size=5))
    layers = list(select_layers(case.model, case.task.layers))
    brute = BruteForce(case.model, case.task, layers, case.train, case.queries)
    expected = torch.zeros(len(case.queries), len(case.train), dtype=torch.float64)
    rest, norm = torch.zeros(len(case.queries)), torch.zeros(len(case.queries))
    for layer in layers:
        shape = study.layers[layer].shape
        for row, query in enumerate(brute.queries):
            whole = query[layer].detach()
            if strategy == "ekfac":
                matrix = brute.curvature(strategy, layer)
                damped = matrix.detach() + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
                whole = torch.linalg.solve(damped, whole.flatten()).view(shape)
            best = whole
            if 1 not in shape:  # two vectors would take more than one
                left, values, right = torch.linalg.svd(whole, full_matrices=False)
                best = values[0] * torch.outer(left[:, 0], right[0])
                rest[row] += float((whole - best).square().sum())
                norm[row] += float(whole.square().sum())
            for column, train in enumerate(brute.train):
                expected[row, column] += float((best * train[layer].detach()).sum())
    # Power iterations find the first direction up to how close the second comes.
    assert relative_error(scores.values, expected) < 1e-3
    assert scores.query_errors is not None
    assert relative_error(scores.query_errors, (rest / norm).sqrt()) < 1e-4


def captured(batch: int, tokens: int, outputs: int, inputs: int, seed: int) -> Captured:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(batch, tokens, inputs, generator=generator, dtype=torch.float64)
    gradients = torch.randn(batch, tokens, outputs, generator=generator, dtype=torch.float64)
    return Captured(activations, gradients, batch * tokens)


@given(
    queries=st.integers(1, 5), batch=st.integers(1, 5), tokens=st.integers(1, 12),
    outputs=st.integers(2, 24), inputs=st.integers(2, 24), rank=st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_products_are_those_of_the_rebuilt_gradients(
    queries: int, batch: int, tokens: int, outputs: int, inputs: int, rank: int
) -> None:
    """By tokens or by rebuilding, in pieces of one query or all: the same as with dense matrices."""
    layers = select_layers(nn.Sequential(nn.Linear(inputs, outputs, bias=False)))
    bank = GradientBank(layers, Operator({}, {}), queries, BankForm(torch.float64, CPU, rank=rank))
    bank.collect("0", captured(queries, 3, outputs, inputs, 0), slice(0, queries))
    dense = bank.sums["0"] if "0" in bank.sums else bank.sums["0.left"] @ bank.sums["0.right"]
    train = captured(batch, tokens, outputs, inputs, 1)
    expected = torch.einsum("qoi,bto,bti->qb", dense, train.gradients, train.activations)
    assert relative_error(bank.product("0", train), expected) < 1e-9
    per_token = torch.stack([bank.token_products("0", q, bank.in_basis("0", train)) for q in range(queries)])
    assert relative_error(per_token.sum(-1), expected) < 1e-9


@given(batch=st.integers(1, 4), rows=st.integers(1, 30), columns=st.integers(1, 30), rank=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_truncation_is_orthonormal_and_does_not_depend_on_the_batch(
    batch: int, rows: int, columns: int, rank: int
) -> None:
    matrices = captured(batch, rows, 1, columns, seed=3).activations
    rank = min(rank, rows, columns)
    left, right = truncated(matrices, rank)
    assert (
        relative_error(left.transpose(1, 2) @ left, torch.eye(rank, dtype=torch.float64).expand(batch, -1, -1)) < 1e-9
    )
    best = torch.linalg.svdvals(matrices)[:, rank:].square().sum(1)
    found = (matrices - left @ right).square().sum((1, 2))
    assert bool((found <= 1.5 * best + 1e-9 * matrices.square().sum((1, 2))).all())
    alone = torch.cat([(one @ other) for one, other in (truncated(each[None], rank) for each in matrices)])
    assert relative_error(alone, left @ right) < 1e-6
    state = torch.get_rng_state()
    truncated(matrices, rank)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_highest_scores_are_computed_again_at_full_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 300)  # some examples of five queries
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 1)
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    exact = study.score(case.queries, wf.EKFAC()).values
    low = study.score(case.queries, wf.EKFAC(query_rank=1)).values
    for budget, name in ((None, "again"), (1e-9, "query-by-query")):
        method, execution = wf.EKFAC(query_rank=1, rescore=4), wf.Execution(memory_budget=budget)
        found = study.score(case.queries, method, name=name, execution=execution)
        chosen = low.topk(4, dim=1).indices
        assert relative_error(found.values.gather(1, chosen), exact.gather(1, chosen)) < 1e-9
        rest = torch.ones_like(low).scatter(1, chosen, 0).bool()
        assert relative_error(found.values[rest], low[rest]) < 1e-9
        assert relative_error(low.gather(1, chosen), exact.gather(1, chosen)) > 1e-3
        assert found.changes is not None
        assert relative_error(found.changes, exact.gather(1, chosen) - low.gather(1, chosen)) < 1e-9
    loaded = wf.Scores.load(tmp_path / "scores" / "again")
    assert loaded.fingerprint["query rank"] == "1, the top 4 whole" and loaded.changes is not None
    with pytest.raises(wf.WherefromError, match="query rank: stored 1, the top 4 whole, now nothing"):
        study.score(case.queries, wf.EKFAC(), name="again")


def test_an_interrupted_rescore_keeps_to_the_scores_that_it_has_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interrupt low-rank scores may be found anew, by other batches, and rounding decides between equals."""
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 300)  # some examples of five queries
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 1)
    case = gpt2_case(torch.float64)
    execution = wf.Execution(train_batch_size=5)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    exact = study.score(case.queries, wf.EKFAC()).values
    low = study.score(case.queries, wf.EKFAC(query_rank=1)).values
    best, rewritten = 0, 0
    change = Blocks._changed

    def highest(result: Unfinished, count: int) -> dict[str, Tensor]:
        values = stored_matrices(result.part)["values"][:, best : best + count]
        return {"positions": torch.full_like(values, best).long(), "values": values}

    def changed(*arguments: Any) -> Any:
        nonlocal rewritten
        rewritten += 1
        if rewritten == 2:
            raise KeyboardInterrupt
        return change(*arguments)

    monkeypatch.setattr("wherefrom.scoring.rescoring._highest", highest)
    monkeypatch.setattr(Blocks, "_changed", changed)
    method = wf.EKFAC(query_rank=1, rescore=1)
    with pytest.raises(KeyboardInterrupt):
        study.score(case.queries, method)
    best = len(case.train) - 1
    found = study.score(case.queries, method)
    expected = torch.cat([exact[:, :1], low[:, 1:]], 1)
    assert relative_error(low, expected) > 1e-3
    assert relative_error(found.values, expected) < 1e-9
    assert found.changes is not None
    assert relative_error(found.changes, (exact - low)[:, :1]) < 1e-9


def test_low_rank_in_half_precision(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = wf.EKFAC(factors=study.fit(wf.EKFAC()), query_rank=2)
    full = study.score(case.queries, method).values
    half = study.score(case.queries, method, execution=wf.Execution(half_precision=True)).values
    assert 0 < relative_error(half, full) < 0.1


def test_a_workspace_is_reused_and_grows() -> None:
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.empty((2, 3), like)
    assert workspace.empty((3, 2), like).data_ptr() == first.data_ptr()
    assert workspace.empty((30, 2), like).shape == (30, 2)
    assert workspace.empty((2, 2), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    kept = workspace.empty((30, 2), like)
    workspace.release()
    assert workspace.empty((2, 2), like).data_ptr() != kept.data_ptr()


def test_errors_are_none_without_a_rank(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores = study.score(case.queries, wf.Dot())
    assert scores.query_errors is None
    assert scores.changes is None
    assert isinstance(scores.values, Tensor)


def test_a_rescore_of_scores_that_are_all_zero_is_no_share_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = gpt2_case()
    ignored = [{**query, "labels": [-100] * len(query["input_ids"])} for query in case.queries]  # type: ignore[dict-item, index]
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with caplog.at_level("INFO", "wherefrom"):
        found = study.score(ignored, wf.Dot(query_rank=2, rescore=3))
    assert not bool(found.values.any())
    assert "the 3 highest scores were all 0." in caplog.text and "nan" not in caplog.text
