"""Kinds of scores: self-influence, normalised, by layer, aggregated, the highest alone; each against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import wherefrom as wf
from tests.models import Case, CaseMaker, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored, labels, only, with_factors
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.scoring.results import extremes, merged_extremes

CASES: dict[str, CaseMaker] = {"mlp": mlp_case, "gpt2": gpt2_case}


def study_of(case: Case, folder: Path, **execution: Any) -> wf.Study[object]:
    return wf.Study(folder, case.model, case.task, train=case.train, execution=wf.Execution(**execution))


def brute_force(case: Case, study: wf.Study[object], strategy: str) -> dict[str, Tensor]:
    """Scores of train x train, queries x queries and queries x train, and the norms of preconditioned gradients."""
    found = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries, seed=0)
    rows = {"train": found.train, "queries": found.queries}
    total: dict[str, Tensor] = {}
    for layer in found.layers:
        gradients = {name: torch.stack([row[layer].flatten() for row in each]) for name, each in rows.items()}
        size = gradients["train"].shape[1]
        inverse = torch.eye(size, dtype=torch.float64)
        if strategy != "identity":
            matrix = found.curvature(strategy, layer)
            damping = 0.1 * matrix.diagonal().mean()
            inverse = torch.linalg.inv(matrix + damping * inverse)
        conditioned = gradients["train"] @ inverse
        parts = {
            "train": gradients["train"] @ conditioned.T,
            "queries": gradients["queries"] @ inverse @ gradients["queries"].T,
            "pairs": gradients["queries"] @ conditioned.T,
            "squared norms": conditioned.square().sum(1),
        }
        for name, part in parts.items():
            total[name] = total.get(name, torch.zeros_like(part)) + part
        total[f"pairs of {layer}"] = parts["pairs"]
    return {name: each.detach() for name, each in total.items()}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_self_influence_and_norms_equal_brute_force(tmp_path: Path, make: CaseMaker, strategy: str) -> None:
    case = make(torch.float64)
    study = study_of(case, tmp_path, train_batch_size=4)
    expected = brute_force(case, study, strategy)
    alone = study.self_influence(factored(strategy), execution=wf.Execution(train_batch_size=5))
    assert relative_error(alone, expected["train"].diagonal()) < 1e-8
    scores = study.score(case.queries, factored(strategy), keep=wf.Pairs(self_influence=True))
    assert scores.self_influence is not None and scores.query_self_influence is not None
    assert relative_error(scores.values, expected["pairs"]) < 1e-8
    assert relative_error(scores.self_influence, expected["train"].diagonal()) < 1e-8
    assert relative_error(scores.query_self_influence, expected["queries"].diagonal()) < 1e-8
    queries, train = expected["queries"].diagonal().sqrt(), expected["train"].diagonal().sqrt()
    cosine = scores.normalized("cosine")
    assert relative_error(cosine.values, expected["pairs"] / torch.outer(queries, train)) < 1e-8
    assert cosine.values.abs().max() <= 1 + 1e-12
    assert relative_error(scores.normalized("relatif").values, expected["pairs"] / train) < 1e-8
    norms = expected["squared norms"].sqrt()
    assert relative_error(scores.normalized("theta-relatif").values, expected["pairs"] / norms) < 1e-8
    assert len(cosine.top(2)) == 2 * len(case.queries)


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_parts_of_layers_equal_brute_force_and_add_up(tmp_path: Path, strategy: str) -> None:
    case = gpt2_case()
    study = study_of(case, tmp_path, train_batch_size=3)
    expected = brute_force(case, study, strategy)
    scores = study.score(case.queries, factored(strategy), keep=wf.Pairs(layers=True))
    assert list(scores.layers) == list(study.layers)
    for layer in study.layers:
        assert relative_error(scores.of_layers(layer).values, expected[f"pairs of {layer}"]) < 1e-8
    assert relative_error(sum(scores.layers.values(), torch.zeros(())), scores.values) < 1e-12
    groups = {"attention": ["*.attn.*"], "mlp": ["*.mlp.c_fc", "*.mlp.c_proj"]}
    grouped = study.score(case.queries, factored(strategy), keep=wf.Pairs(layers=groups))
    attention = sum((each for name, each in scores.layers.items() if ".attn." in name), torch.zeros(()))
    assert relative_error(grouped.of_layers("attention").values, attention) < 1e-12
    with pytest.raises(InputError, match=r"expected a layer or group whose part was stored: other, attention, mlp"):
        grouped.of_layers("mpl")


@pytest.mark.parametrize(
    ("queries", "train"), [("sum", None), ("mean", None), (None, "sum"), (None, "mean"), ("mean", "sum")]
)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_aggregated_scores_equal_sums_of_the_matrix(tmp_path: Path, make: CaseMaker, queries: Any, train: Any) -> None:
    case = make(torch.float64)
    study = study_of(case, tmp_path)
    expected = study.score(case.queries).values
    if queries:
        expected = expected.sum(0, keepdim=True) / (len(case.queries) if queries == "mean" else 1)
    if train:
        expected = expected.sum(1, keepdim=True) / (len(case.train) if train == "mean" else 1)
    keep = wf.Aggregated(queries=queries, train=train, layers=True)
    scores = study.score(case.queries, keep=keep, execution=wf.Execution(query_batch_size=2, train_batch_size=5))
    assert scores.values.shape == expected.shape
    assert relative_error(scores.values, expected) < 1e-9
    assert relative_error(sum(scores.layers.values(), torch.zeros(())), expected) < 1e-9


def test_summed_queries_may_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's gradients are added to one before the next block's are made."""
    from wherefrom.planning.plan import Plan

    case = mlp_case()
    study = study_of(case, tmp_path)
    expected = study.score(case.queries).values.sum(0, keepdim=True)
    original = Plan.__init__

    def smaller(self: Plan, *arguments: object, **keywords: object) -> None:
        original(self, *arguments, **keywords)  # type: ignore[arg-type]
        object.__setattr__(self, "block", 2)

    monkeypatch.setattr(Plan, "__init__", smaller)
    scores = study.score(case.queries, keep=wf.Aggregated(queries="sum"))
    assert relative_error(scores.values, expected) < 1e-9


def test_the_highest_alone_equal_those_of_the_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case()
    case.train += [case.train[3], case.train[3]]  # equal scores: the earlier comes first
    study = study_of(case, tmp_path, train_batch_size=1)
    values = study.score(case.queries).values
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 3)
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
    top = study.score(case.queries, keep=wf.Top(5))
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :5]
    assert torch.equal(top.train, order)
    assert relative_error(top.values, values.gather(1, order)) < 1e-12
    assert torch.equal(top.lowest_train, values.sort(dim=1, stable=True).indices[:, :5])
    assert [hit.train for hit in top.top(2)] == order[:, :2].flatten().tolist()
    sizes = [file.stat().st_size for file in (tmp_path / "scores" / top.name).rglob("*")]
    assert max(sizes) < 4000
    with pytest.raises(InputError, match=r"k=6: expected 1 to 5"):
        top.top(6)
    with pytest.raises(InputError, match=r"only the highest and lowest"):
        wf.Scores.load(tmp_path / "scores" / "ekfac-top5")


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=30), k=st.integers(1, 5), cut=st.integers(1, 7))
def test_merged_extremes_are_those_of_the_whole(values: list[int], k: int, cut: int) -> None:
    row = torch.tensor([values], dtype=torch.float64)
    positions = torch.arange(len(values))
    runs = zip(row.split(cut, 1), positions.split(cut), strict=True)
    merged = merged_extremes([extremes(part, place, k) for part, place in runs], k)
    ordered = sorted(range(len(values)), key=lambda place: (-values[place], place))[:k]
    assert merged["train"].tolist() == [ordered]
    lowest = sorted(range(len(values)), key=lambda place: (values[place], place))[:k]
    assert merged["lowest_train"].tolist() == [lowest]
    assert merged["lowest_values"].tolist() == [[values[place] for place in lowest]]


def test_kinds_are_kept_apart_and_loaded(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    study.score(case.queries)
    study.score(case.queries, keep=wf.Pairs(layers=True, self_influence=True))
    study.score(case.queries, keep=wf.Top(3))
    study.self_influence()
    assert labels(tmp_path / "scores") == ["ekfac", "ekfac-layers-self", "ekfac-top3"]
    again = wf.Scores.load(tmp_path / "scores" / "ekfac-layers-self")
    assert again.self_influence is not None and list(again.layers) == list(study.layers)
    file = only(tmp_path / "self_influence", "ekfac") / "tensors.safetensors"
    before = file.stat().st_mtime_ns
    study.self_influence()
    assert file.stat().st_mtime_ns == before


def test_an_unknown_sum_is_refused() -> None:
    median: Any = "median"
    with pytest.raises(InputError, match="queries='median': expected 'sum', 'mean' or None"):
        wf.Aggregated(queries=median)
    with pytest.raises(InputError, match="neither queries nor train"):
        wf.Aggregated()


@pytest.mark.parametrize(
    ("fields", "keep", "message"),
    [
        ({"query_rank": 2}, wf.Aggregated(queries="sum"), r"query_rank=2 with keep=Aggregated\(queries='sum'"),
        ({"query_rank": 2, "rescore": 2}, wf.Pairs(layers=True), "rescore=2 with .*: it replaces single scores"),
        ({}, wf.Pairs(layers={"one": ["first"], "two": ["f*"]}), "'first' is in the groups 'one' and 'two'"),
        ({}, wf.Pairs(layers={"one": ["nothing*"]}), r"'nothing\*' of group 'one' matches no tracked layer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, fields: dict[str, Any], keep: wf.Keep[Any], message: str
) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    with pytest.raises(InputError, match=message):
        study.score(case.queries, wf.Dot(**fields), keep=keep)
    assert not list((tmp_path / "scores").glob("*/*.safetensors"))


def test_scores_without_norms_say_how_to_get_them(tmp_path: Path) -> None:
    case = mlp_case()
    scores = study_of(case, tmp_path).score(case.queries, wf.Dot())
    with pytest.raises(InputError, match=r"score with keep=Pairs\(self_influence=True\)"):
        scores.normalized("cosine")


def test_half_precision_and_low_rank_keep_what_they_are_asked_for(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = study_of(case, tmp_path)
    exact = study.self_influence()
    half_precision = wf.Execution(half_precision=True)
    factors = study.fit(execution=half_precision)
    half = study.self_influence(with_factors(factors), execution=half_precision)
    assert relative_error(half, exact) < 0.05
    keep = wf.Pairs(layers=True, self_influence=True)
    approximated = study.score(case.queries, with_factors(factors, query_rank=1), keep=keep)
    assert approximated.query_errors is not None and approximated.self_influence is not None
    assert relative_error(sum(approximated.layers.values(), torch.zeros(())), approximated.values) < 1e-5


@pytest.mark.parametrize("name", ["b.blocks", "b.part", "b.partial-0of2"])
def test_names_of_what_is_deleted_in_the_end_are_refused(tmp_path: Path, name: str) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    for call in (
        lambda: study.score(case.queries, wf.Dot(), name=name),
        lambda: study.score(case.queries, wf.Dot(), keep=wf.Tokens(), name=name),
        lambda: study.score(case.queries, wf.TracIn(checkpoints=[tmp_path]), name=name),
        lambda: study.fit(wf.Dot(), name=name),
        lambda: study.self_influence(wf.Dot(), name=name),
        lambda: study.index(wf.Dot(), name=name),
    ):
        with pytest.raises(InputError, match="expected another ending"):
            call()


class Weighted(wf.Classification):
    """Classification with a weight before the loss."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def train_loss(self, *arguments: object) -> Tensor:
        return self.weight * super().train_loss(*arguments)  # type: ignore[arg-type]


def test_scores_with_factors_of_another_task_are_others(tmp_path: Path) -> None:
    case = mlp_case()
    studies = [wf.Study(tmp_path / str(w), case.model, Weighted(w), train=case.train) for w in (1.0, 3.0)]
    own, other = (study.fit(wf.Diagonal()) for study in studies)
    studies[0].score(case.queries, with_factors(own), name="mine")
    with pytest.raises(MismatchError, match="factors' task: stored .*1.0.* now .*3.0"):
        studies[0].score(case.queries, with_factors(other), name="mine")
