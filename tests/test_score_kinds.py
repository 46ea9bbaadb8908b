"""What kinds of scores must not depend on: blocks, shards, batches, ranks, kills; and what goes with what.

`test_scores` holds them against brute force.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import wherefrom as wf
from tests.models import Case, CaseMaker, gpt2_case, mlp_case, relative_error
from tests.runs import factored, labels, only, with_factors
from tests.test_layers import CASES as LAYER_CASES
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import extremes

STRATEGIES = ["identity", "diagonal", "kfac", "ekfac", "shampoo"]
CASES: list[CaseMaker] = [mlp_case, gpt2_case]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_case = pytest.mark.parametrize("make_case", CASES)


def study_of(path: Path, case: Case, **execution: Any) -> wf.Study[object]:
    return wf.Study(path, case.model, case.task, train=case.train, execution=wf.Execution(**execution))


# Self-influence and norms.


def test_a_training_example_as_query_has_a_cosine_of_one(tmp_path: Path) -> None:
    case = gpt2_case()
    study = study_of(tmp_path, case)
    cosine = study.score(case.train, wf.EKFAC(), keep=wf.Pairs(self_influence=True)).normalized("cosine").values
    assert relative_error(cosine.diagonal(), torch.ones(len(case.train))) < 1e-9
    assert int((cosine.argmax(1) == torch.arange(len(case.train))).sum()) == len(case.train)


def test_self_influence_comes_with_pairwise_scores_and_changes_none(tmp_path: Path) -> None:
    case = gpt2_case()
    study = study_of(tmp_path, case)
    method = with_factors(study.fit())
    plain = study.score(case.queries, method)
    one = wf.Execution(train_batch_size=3)
    several = wf.Execution(train_batch_size=3, memory_budget=1e-9)  # one resident query at a time
    for name, execution in (("one-block", one), ("blocks", several)):
        scores = study.score(case.queries, method, keep=wf.Pairs(self_influence=True), name=name, execution=execution)
        assert scores.self_influence is not None
        assert scores.query_self_influence is not None
        assert relative_error(scores.values, plain.values) < 1e-9
        assert relative_error(scores.self_influence, study.self_influence(method)) < 1e-9
        as_train = wf.Study(tmp_path / f"queries-{name}", case.model, case.task, train=case.queries)
        assert relative_error(scores.query_self_influence, as_train.self_influence(method)) < 1e-9


def test_an_example_without_a_gradient_has_normalized_scores_of_zero() -> None:
    values = torch.tensor([[0.0, 2.0], [0.0, -4.0]])
    own = torch.tensor([0.0, 4.0])
    scores = wf.Scores(
        values, {}, self_influence=own, query_self_influence=torch.tensor([4.0, 16.0]), preconditioned_norms=own
    )
    assert scores.normalized("cosine").values.tolist() == [[0, 0.5], [0, -0.5]]
    assert scores.normalized("relatif").values.tolist() == [[0, 1], [0, -2]]
    assert scores.normalized("theta-relatif").values.tolist() == [[0, 0.5], [0, -1]]


# Parts by layer.


def test_groups_sum_their_layers_in_every_block(tmp_path: Path) -> None:
    case = gpt2_case()
    layers = study_of(tmp_path, case).score(case.queries, keep=wf.Pairs(layers=True)).layers
    groups = {"attention": ["*.attn.*"], "mlp": ["*.0.mlp.c_fc", "*.0.mlp.c_proj"]}
    small = study_of(tmp_path, case, memory_budget=1e-9)
    found = small.score(case.queries, keep=wf.Pairs(layers=groups))
    assert set(found.layers) == {"attention", "mlp", "other"}
    expected = {
        "attention": [name for name in layers if ".attn." in name],
        "mlp": [name for name in layers if ".0.mlp." in name],
        "other": [name for name in layers if ".attn." not in name and ".0.mlp." not in name],
    }
    for group, names in expected.items():
        assert relative_error(found.layers[group], torch.stack([layers[name] for name in names]).sum(0)) < 1e-9
    mlp = found.of_layers("mlp")
    assert torch.equal(mlp.values, found.layers["mlp"])
    assert len(mlp.top(2)) == 2 * len(case.queries)
    with pytest.raises(InputError, match=r"'mpl'.*attention, "):
        found.of_layers("mpl")


# Sums over examples.


@pytest.mark.parametrize(("strategy", "how"), [("identity", "sum"), ("diagonal", "mean"), ("kfac", "sum")])
def test_aggregated_scores_do_not_depend_on_the_batch(tmp_path: Path, strategy: str, how: Any) -> None:
    case = gpt2_case()
    study, method = study_of(tmp_path, case), factored(strategy)
    values = study.score(case.queries, method).values
    reduce: Callable[[Tensor, int], Tensor] = {
        "sum": lambda tensor, axis: tensor.sum(axis, keepdim=True),
        "mean": lambda tensor, axis: tensor.mean(axis, keepdim=True),
    }[how]
    for size in (1, 4, None):
        execution = wf.Execution(query_batch_size=size, train_batch_size=size)
        queries, train, both = (
            study.score(case.queries, method, keep=keep, overwrite=True, execution=execution).values
            for keep in (wf.Aggregated(queries=how), wf.Aggregated(train=how), wf.Aggregated(how, how))
        )
        assert queries.shape == (1, len(case.train))
        assert relative_error(queries, reduce(values, 0)) < 1e-9
        assert train.shape == (len(case.queries), 1)
        assert relative_error(train, reduce(values, 1)) < 1e-9
        assert both.shape == (1, 1)
        assert relative_error(both, reduce(reduce(values, 0), 1)) < 1e-9


def test_aggregation_in_blocks_shards_layers_ranks_and_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case(torch.float32)
    study = study_of(tmp_path, case)
    factors = study.fit()
    plain = study.score(case.queries, keep=wf.Pairs(layers=True))
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 4)
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
    small = study_of(tmp_path, case, memory_budget=1e-9)
    train = small.score(case.queries, keep=wf.Aggregated(train="sum", layers=True))
    assert relative_error(train.values, plain.values.sum(1, keepdim=True)) < 1e-4
    queries = small.score(case.queries, keep=wf.Aggregated(queries="sum", layers=True))
    assert relative_error(queries.values, plain.values.sum(0, keepdim=True)) < 1e-4
    for layer, part in plain.layers.items():
        assert relative_error(train.layers[layer], part.sum(1, keepdim=True)) < 1e-4
        assert relative_error(queries.layers[layer], part.sum(0, keepdim=True)) < 1e-4
    low = study.score(case.queries, wf.EKFAC(query_rank=2)).values.sum(1, keepdim=True)
    low_sum = study.score(case.queries, wf.EKFAC(query_rank=2), keep=wf.Aggregated(train="sum")).values
    assert relative_error(low_sum, low) < 1e-4
    in_half = study_of(tmp_path, case, half_precision=True)
    half = in_half.score(case.queries, with_factors(factors)).values
    for keep, axis in ((wf.Aggregated(queries="sum"), 0), (wf.Aggregated(train="sum"), 1)):
        found = in_half.score(case.queries, with_factors(factors), keep=keep)
        assert relative_error(found.values, half.sum(axis, keepdim=True)) < 0.05


# The extremes of each query.


def expected_extremes(values: Tensor, k: int) -> tuple[list[list[int]], list[list[int]]]:
    """Training positions of the highest and the lowest scores, earlier ones first among equals."""
    rows = [list(enumerate(row)) for row in values.tolist()]
    highest = [[place for place, _ in sorted(row, key=lambda pair: (-pair[1], pair[0]))[:k]] for row in rows]
    lowest = [[place for place, _ in sorted(row, key=lambda pair: (pair[1], pair[0]))[:k]] for row in rows]
    return highest, lowest


@pytest.mark.parametrize("method", [wf.Dot(), wf.EKFAC()], ids=["dot", "ekfac"])
def test_top_scores_are_the_extremes_of_the_matrix(
    tmp_path: Path, method: wf.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case()
    case.train += case.train[:6]  # equal examples have equal scores
    study = study_of(tmp_path, case)
    study.fit(method)
    values = study.score(case.queries, method, execution=wf.Execution(train_batch_size=1)).values
    highest, lowest = expected_extremes(values, 5)
    for shard, size, budget in ((512, 1, None), (7, 3, None), (4, 2, 1e-9)):
        monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", shard)
        monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
        execution = wf.Execution(memory_budget=budget, train_batch_size=size)
        top = study.score(case.queries, method, keep=wf.Top(5), overwrite=True, execution=execution)
        assert relative_error(top.values, values.gather(1, torch.tensor(highest))) < 1e-9
        assert relative_error(top.lowest_values, values.gather(1, torch.tensor(lowest))) < 1e-9
        assert relative_error(values.gather(1, top.train), top.values) < 1e-9
        assert relative_error(values.gather(1, top.lowest_train), top.lowest_values) < 1e-9
        if size == 1:
            assert top.train.tolist() == highest
            assert top.lowest_train.tolist() == lowest
    loaded = wf.TopScores.load(tmp_path / "scores" / f"{method.name}-top5")
    assert torch.equal(loaded.train, top.train)
    hits = loaded.top(2)
    assert [(hit.query, hit.rank) for hit in hits[:4]] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [hit.train for hit in hits[:2]] == top.train[0, :2].tolist()


def test_top_scores_of_few_examples_are_all_of_them(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(tmp_path, case)
    top = study.score(case.queries, keep=wf.Top())
    values = study.score(case.queries).values
    assert top.values.shape == values.shape
    assert [hit[:3] for hit in top.top(4)] == [hit[:3] for hit in wf.Scores(values, {}).top(4)]
    with pytest.raises(InputError, match="k=0"):
        wf.Top(0)


def test_top_scores_of_low_rank_and_half_precision(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    method = with_factors(study_of(tmp_path, case).fit(), query_rank=2)
    study = study_of(tmp_path, case, half_precision=True)
    low, top = study.score(case.queries, method), study.score(case.queries, method, keep=wf.Top(3))
    assert torch.equal(top.values, low.values.topk(3, dim=1).values)
    assert top.query_errors is not None
    assert low.query_errors is not None
    assert torch.equal(top.query_errors, low.query_errors)


def test_top_scores_are_merged_shard_by_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards there are, the highest and lowest of two at most are in memory."""
    case = mlp_case()
    case.train = case.train * 8  # 96
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 12)
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
    sizes: list[int] = []

    def watched(values: Tensor, train: Tensor, k: int) -> dict[str, Tensor]:
        sizes.append(values.shape[1])
        return extremes(values, train, k)

    monkeypatch.setattr("wherefrom.scoring.results.extremes", watched)
    study_of(tmp_path, case, train_batch_size=4).score(case.queries, wf.Dot(), keep=wf.Top(5))
    assert len(sizes) > 7
    assert max(sizes) == 2 * 5


def test_top_scores_leave_no_matrix_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that is ever written holds fewer numbers than the matrix would; they are looked at as they appear."""
    from wherefrom.store import files

    case = mlp_case()
    case.train = case.train * 8  # 96
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 12)
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
    study = study_of(tmp_path, case, checkpoint_seconds=0, train_batch_size=4)
    written: list[int] = []
    original = files.save_tensors

    def watched(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        written.append(max(tensor.numel() for tensor in tensors.values()))
        original(file, tensors, metadata)

    def refused(*arguments: object) -> None:
        raise AssertionError("a matrix was made")

    for module in ("files", "artifacts"):
        monkeypatch.setattr(f"wherefrom.store.{module}.save_tensors", watched)
    monkeypatch.setattr("wherefrom.store.artifacts.preallocated", refused)
    study.score(case.queries, wf.Dot(), keep=wf.Top(3))
    assert len(written) > 8
    assert max(written) == 12 * len(case.queries)  # the sums of a shard under way
    assert labels(tmp_path / "scores") == ["dot-top3"]
    with safe_open(only(tmp_path / "scores", "dot-top3") / "tensors.safetensors", "pt") as file:
        assert {tuple(file.get_tensor(name).shape) for name in file.keys()} == {(len(case.queries), 3)}  # noqa: SIM118


# All kinds of layers.


@pytest.mark.parametrize("name", LAYER_CASES)
def test_every_kind_of_score_of_every_kind_of_layer(tmp_path: Path, name: str) -> None:
    """Against pairwise scores, which `test_layers` holds against brute force."""
    case = LAYER_CASES[name]()
    study = study_of(tmp_path, case)
    values = study.score(case.queries).values
    itself = study.score(case.train).values.diagonal()
    four, three = (wf.Execution(train_batch_size=size, query_batch_size=2) for size in (4, 3))
    assert relative_error(study.self_influence(execution=four), itself) < 1e-9
    groups = study.score(case.queries, keep=wf.Pairs(layers=True, self_influence=True), execution=three)
    assert groups.self_influence is not None
    assert relative_error(groups.self_influence, itself) < 1e-9
    assert relative_error(torch.stack(list(groups.layers.values())).sum(0), values) < 1e-9
    queries = study.score(case.queries, keep=wf.Aggregated(queries="sum"), execution=three)
    assert relative_error(queries.values, values.sum(0, keepdim=True)) < 1e-9
    train = study.score(case.queries, keep=wf.Aggregated(train="sum"), execution=four)
    assert relative_error(train.values, values.sum(1, keepdim=True)) < 1e-9
    assert relative_error(study.score(case.queries, keep=wf.Top(3)).values, values.topk(3).values) < 1e-9


# Wrong use.


@pytest.mark.parametrize(
    ("method", "keep", "message"),
    [
        (wf.Fisher(), wf.Tokens(), r"Tokens\(top=None\) with Fisher: its scores cannot be had so; expected Pairs"),
        (wf.Trak(), wf.Aggregated(train="sum"), r"Aggregated\(.*\) with Trak: its scores cannot be had so"),
        (wf.Cosine(), wf.Pairs(layers=True), "with Cosine, whose scores have no parts by layer"),
        (wf.LoGra(), wf.Pairs(self_influence=True), "with LoGra, whose scores have no parts by layer and no norms"),
        (wf.Dot(query_rank=2, rescore=2), wf.Top(3), r"rescore=2 with keep=Top\(k=3\)"),
        (wf.Dot(query_rank=2, rescore=2), wf.Aggregated(train="sum"), r"rescore=2 with keep=Aggregated\("),
    ],
)
def test_what_a_method_cannot_keep_is_refused(
    tmp_path: Path, method: wf.Method, keep: wf.Keep[Any], message: str
) -> None:
    """What would change nothing must not be taken for something that did."""
    case = mlp_case()
    with pytest.raises(InputError, match=message):
        study_of(tmp_path, case).score(case.queries, method, keep=keep)
    assert not list(tmp_path.glob("*/*/manifest.json"))


def test_tokens_belong_to_scores_that_keep_more_beside_the_same_values(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(tmp_path, case)
    tokens = study.score(case.queries, keep=wf.Tokens())
    for keep in (wf.Pairs(self_influence=True), wf.Pairs(layers=True)):
        assert not tokens.differences(study.score(case.queries, keep=keep).fingerprint)
    aggregated = study.score(case.queries, keep=wf.Aggregated(train="sum"))
    assert tokens.differences(aggregated.fingerprint)
