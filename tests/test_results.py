"""What results are about, what they are called, and what overwriting one replaces."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.runs import factored, with_factors
from wherefrom.evaluate.agreement import compare_scores
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.removal import evaluate_removal
from wherefrom.evaluate.retrain import Retraining
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.report.html import render_report
from wherefrom.report.passages import DatasetPassages, DatasetTokens, Passage
from wherefrom.report.text import token_tables, top_tables
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.store.names import found_result, result_name

RECIPE = wf.TrainingRecipe(batch_size=6, learning_rates=[0.1, 0.1])


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + each) for each in token_ids)


def other_model(model: torch.nn.Module) -> torch.nn.Module:
    found = copy.deepcopy(model)
    with torch.no_grad():
        next(found.parameters()).mul_(1.5)
    return found


# Shown beside its own alone.


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[wf.Study[Any], Case, wf.Scores, wf.TokenScores]:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path_factory.mktemp("scored"), case.model, case.task, train=case.train)
    factors = study.fit(wf.Dot())
    return (
        study,
        case,
        study.score(case.queries, with_factors(factors)),
        study.score(case.queries, with_factors(factors), keep=wf.Tokens()),
    )


def printed(table: Any) -> str:
    console = Console(width=400, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


Scored = tuple[wf.Study[Any], Case, wf.Scores, wf.TokenScores]


@pytest.mark.parametrize("what", ["queries", "training data"])
def test_other_texts_are_refused_everywhere(scored: Scored, what: str) -> None:
    """As many of them, so that nothing but their content tells; also the same ones in another order."""
    study, case, scores, tokens = scored
    queries, train = list(case.queries), list(case.train)
    changed = queries if what == "queries" else train
    changed[:2] = changed[1::-1]
    passages = DatasetPassages(queries), DatasetPassages(train)
    mine = DatasetTokens(tokens, case.train, Characters())
    changed_study = wf.Study(study.path, case.model, case.task, train=train)
    shown: list[Callable[[], object]] = [
        lambda: changed_study.report(scores, queries),
        lambda: top_tables(scores, *passages, shown=[0]),
        lambda: token_tables(scores, mine, *passages, shown=[0]),
        lambda: render_report(title="", queries=passages[0], train=passages[1], scores=scores),
    ]
    if what == "training data":
        shown.append(lambda: DatasetTokens(tokens, train, Characters()))
    for show in shown:
        with pytest.raises(MismatchError, match=f"{what}: scored .* examples .*, given .* Give the queries"):
            show()
    assert not (study.path / "reports").exists()


def test_scores_of_another_model_are_not_reported(scored: Scored) -> None:
    study, case, scores, _ = scored
    other = wf.Study(study.path, other_model(case.model), case.task, train=case.train)
    with pytest.raises(MismatchError, match="model: scored "):
        other.report(scores, case.queries)


def test_texts_in_another_form_are_shown_where_they_are_as_many(scored: Scored) -> None:
    scores = scored[2]
    queries, train = (
        [Passage(f"{kind} {row}") for row in range(count)] for kind, count in (("query", 5), ("text", 14))
    )
    best = int(scores.values[0].argmax())
    assert f"text {best}" in printed(top_tables(scores, queries, train, shown=[0], k=1))
    for wrong in ((queries[:4], train), (queries, train[:13])):
        with pytest.raises(InputError, match="expected a row for each of"):
            top_tables(scores, *wrong, shown=[0])


def test_tokens_of_other_scores_are_not_shown_beside_these(scored: Scored) -> None:
    study, case, scores, tokens = scored
    other = study.score(case.queries, wf.Dot(), execution=replace(study.execution, half_precision=True))
    pieces = DatasetTokens(tokens, case.train, Characters())
    queries, train = DatasetPassages(case.queries), DatasetPassages(case.train)
    with pytest.raises(MismatchError, match="tokens belong to other scores than these. precision: stored"):
        token_tables(other, pieces, queries, train, shown=[0])
    with pytest.raises(MismatchError, match="tokens belong to other scores than these. precision: stored"):
        render_report(title="", queries=queries, train=train, scores=other, tokens=pieces)
    assert printed(token_tables(scores, pieces, queries, train, shown=[0], k=1)).count("train ") == 1


def test_answers_of_an_index_are_not_shown_beside_other_texts(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = study.index(wf.Dot(), wf.Compression(rank=2)).query(case.queries, k=2)
    top_tables(found, DatasetPassages(case.queries), DatasetPassages(case.train), shown=[0], k=2)
    with pytest.raises(MismatchError, match="queries: scored"):
        top_tables(found, DatasetPassages(case.queries[::-1]), DatasetPassages(case.train), shown=[0], k=2)
    with pytest.raises(MismatchError, match="queries: scored"):
        study.report(found, case.queries[::-1])


def untrained(retrainings: Sequence[Retraining]) -> torch.Tensor:
    raise AssertionError("what is refused was trained")


def test_scores_of_other_queries_are_not_evaluated_side_by_side(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    one = study.score(case.queries, wf.Dot())
    two, other = (study.score(queries, wf.Diagonal()) for queries in (case.queries, case.queries[::-1]))
    generator = torch.Generator().manual_seed(0)
    truth = GroundTruth(
        torch.rand(6, 12, generator=generator) < 0.5, torch.rand(6, 1, 5, generator=generator, dtype=torch.float64)
    )
    found = evaluate_lds({"one": one, "two": two}, truth, resamples=10)
    expected = evaluate_lds({"one": one.values, "two": two.values}, truth, resamples=10)
    assert found.means == expected.means
    assert compare_scores(one, two).spearman.mean == compare_scores(one.values, two.values).spearman.mean
    with pytest.raises(MismatchError, match="queries: scored .* side by side with 'other'"):
        evaluate_lds({"one": one, "other": other}, truth)
    with pytest.raises(MismatchError, match="queries: scored .* side by side with 'other'"):
        compare_scores(one, other)
    with pytest.raises(MismatchError, match="queries: scored .* side by side with 'other'"):
        evaluate_removal(tmp_path / "bank", untrained, {"one": one, "other": other}, [1], [0], fingerprint={})


# Pages of every kind of scores.


def test_top_scores_have_a_page_of_the_same_hits(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    top, scores = (
        study.score(case.queries, with_factors(factors), keep=wf.Top(3)),
        study.score(case.queries, with_factors(factors)),
    )
    page, whole = (study.report(each, case.queries, k=3).read_text() for each in (top, scores))
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {f"{top.name}.html", f"{scores.name}.html"}

    def lists(source: str) -> list[str]:
        return source.split('<div class="columns">')[1:]

    hits = [part.partition("</section>")[0] for part in lists(page)]
    assert hits == [part.partition("</section>")[0] for part in lists(whole)]
    assert len(hits) == len(case.queries)
    assert page.count("only these were kept: the 3 highest and lowest of each query.") == len(case.queries)
    assert "only these were kept" not in whole
    assert 'class="histogram"' in whole and 'class="histogram"' not in page


def test_candidates_have_a_page_that_says_that_the_others_were_not_scored(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = study.score(
        case.queries, wf.TwoStage(first=torch.tensor([[1, 4, 7]] * 5), then=wf.Dot()), keep=wf.Top(10000)
    )
    page = study.report(found, case.queries).read_text()
    assert page.count("only these were kept: 3 candidates of each query") == 5
    assert {line.split('"')[1] for line in page.split("<article ")[1:]} <= {"train-1", "train-4", "train-7"}


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_aggregated_queries_have_a_page_of_one_row(tmp_path: Path, how: Any) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores = study.score(case.queries, wf.Dot(), keep=wf.Aggregated(queries=how))
    page = study.report(scores, case.queries).read_text()
    assert page.count('<section class="query') == 1
    assert f"The {how} of 5 queries." in page
    with pytest.raises(MismatchError, match="queries: scored 5 examples"):
        study.report(scores, case.queries[:4])


def test_aggregated_training_examples_have_no_page(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores = study.score(case.queries, wf.Dot(), keep=wf.Aggregated(train="sum"))
    with pytest.raises(InputError, match="add up all training examples, so none stands beside its score"):
        study.report(scores, case.queries)


# Names.


def test_a_name_changes_with_each_entry_of_the_fingerprint() -> None:
    one = {"queries": "a", "damping": "1.0"}
    assert result_name("ekfac", one) == result_name("ekfac", dict(reversed(one.items())))
    assert len({result_name("ekfac", each) for each in (one, {**one, "damping": "2.0"}, {**one, "seed": "0"}, {})}) == 4
    assert result_name("ekfac", one, "mine") == "mine"


def test_a_result_is_found_by_its_label_but_not_by_that_of_another(tmp_path: Path) -> None:
    for name in ("ekfac-half-01234567", "ekfac-cg-89abcdef", "ekfac-cg-89ab0000", "ekfac"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    assert found_result(tmp_path / "ekfac").name == "ekfac"  # a given name
    for name in ("ekfac-half", "ekfac-half-", "ekfac-half-012", "ekfac-half-01234567"):
        assert found_result(tmp_path / name).name == "ekfac-half-01234567"
    assert found_result(tmp_path / "ekfac-cg-89abc").name == "ekfac-cg-89abcdef"
    shutil.rmtree(tmp_path / "ekfac")
    for name in ("ekfac", "ekfac-ha", "half"):  # where half precision is no answer to "ekfac"
        assert not found_result(tmp_path / name).exists()
    for name in ("ekfac-cg", "ekfac-cg-89ab"):
        with pytest.raises(InputError, match="2 results are called so: ekfac-cg-89ab0000, ekfac-cg-89abcdef"):
            found_result(tmp_path / name)


def test_what_is_new_beside_others_says_what_differs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.Diagonal())
    study.score(case.queries, with_factors(factors))
    assert "is new" not in caplog.text
    with caplog.at_level("INFO", "wherefrom"):
        study.fit(wf.Diagonal(seed=1))
        study.score(case.queries, with_factors(factors, damping=0.5))
        study.fit(wf.Diagonal())
        study.score(case.queries, with_factors(factors))
    said = [record.message for record in caplog.records if "is new" in record.message]
    assert len(said) == 2  # what is loaded says nothing
    assert "targets: stored sampled, seed 0, now sampled, seed 1" in said[0]
    assert "damping: stored 0.1 x mean eigenvalue, now 0.5" in said[1]


# A second use of a run directory lies beside the first.

Method = Callable[..., wf.Scores]


def checkpoints(case: Case, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.pt" for name in ("one", "two")]
    for path in paths:
        torch.save(case.model.state_dict(), path)
    return paths


def by_checkpoints(study: wf.Study[Any], queries: list[object], **options: Any) -> wf.Scores:
    paths = sorted(study.path.with_name("weights").iterdir())
    return wf.score_checkpoints(study, paths, queries, "diagonal", **options)


def by_source(study: wf.Study[Any], queries: list[object], **options: Any) -> wf.Scores:
    paths = sorted(study.path.with_name("weights").iterdir())
    return wf.score_source(study, paths, queries, 1, times=[0.1, 0.1], **options)


def by_magic(study: wf.Study[Any], queries: list[object], **options: Any) -> wf.Scores:
    training = wf.ReplayableTraining(study._sweep.model, study._sweep.task, study.train, RECIPE)
    return wf.magic_scores(study.path, training, queries, **options)


METHODS: dict[str, Method] = {
    "checkpoints": by_checkpoints,
    "source": by_source,
    "fisher": lambda study, queries, **options: wf.fisher_scores(study, queries, 1, **options),
    "logra": lambda study, queries, **options: wf.logra_scores(study, queries, rank=2, **options),
    "trak": lambda study, queries, **options: wf.trak_scores(study, queries, rank=2, **options),
    "trackstar": lambda study, queries, **options: wf.trackstar_scores(study, queries, rank=2, **options),
    "magic": by_magic,
    "score": lambda study, queries, **options: study.score(queries, study.fit(wf.Diagonal()), **options),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_queries_and_training_examples_lie_side_by_side(tmp_path: Path, method: str) -> None:
    case = mlp_case()
    checkpoints(case, tmp_path / "weights")
    score = METHODS[method]
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    other = wf.Study(tmp_path / "run", case.model, case.task, train=case.train[::-1])
    first = score(study, case.queries)
    fresh = wf.Study(tmp_path / "fresh", case.model, case.task, train=case.train)
    for queries, name in ((case.queries[:3], None), (case.queries[1:], "pinned")):
        found = score(study, queries, name=name)
        assert relative_error(found.values, score(fresh, queries).values) < 1e-12
    assert score(other, case.queries).name != first.name
    assert torch.equal(score(study, case.queries).values, first.values)
    assert torch.equal(wf.Scores.load(tmp_path / "run" / "scores" / first.name).values, first.values)
    with pytest.raises(MismatchError, match="queries: stored"):
        score(study, case.queries, name="pinned")


# What overwriting replaces.


def everything(study: wf.Study[Any], queries: list[object]) -> None:
    """Every kind of result, with every strategy's factors."""
    for strategy in ("identity", "diagonal", "ekfac", "shampoo"):
        study.fit(factored(strategy))
    for act in (*DIRECT.values(), *(METHODS[name] for name in METHODS if name != "score")):
        act(study, queries)


DIRECT: dict[str, Callable[..., object]] = {
    "score": METHODS["score"],
    "score_top": lambda study, queries, **options: study.score_top(queries, study.fit(wf.Diagonal()), 2, **options),
    "score_candidates": lambda study, queries, **options: study.score_candidates(
        queries, study.fit(wf.Diagonal()), torch.tensor([[0, 1]] * len(queries)), **options
    ),
    "score_tokens": lambda study, queries, **options: study.score_tokens(queries, study.fit(wf.Diagonal()), **options),
    "self_influence": lambda study, queries, **options: study.self_influence(study.fit(wf.Diagonal()), **options),
    "index": lambda study, queries, **options: study.index(study.fit(wf.Diagonal()), rank=2, **options),
}

_SUM = "checkpoints/{}.pt/scores/{}"
REPLACED: dict[str, set[str]] = {
    "fit identity": set(),
    "fit diagonal": {"factors/sampled/diagonal"},
    "fit kfac": {"factors/sampled/covariance", "factors/sampled/eigenbasis", "factors/sampled/eigenvalues"},
    "fit ekfac": {"factors/sampled/covariance", "factors/sampled/eigenbasis", "factors/sampled/eigenvalues"},
    "fit shampoo": {f"factors/sampled/gradient-{stage}" for stage in ("covariance", "eigenbasis", "eigenvalues")},
    "score": {"scores/diagonal"},
    "score_top": {"scores/diagonal-top2"},
    "score_candidates": {"scores/diagonal-candidates"},
    "score_tokens": {"scores/diagonal.all.tokens/index", "scores/diagonal.all.tokens/part"},
    "self_influence": {"self_influence/diagonal"},
    "index": {"index/random-rank2-int8/projections", "index/random-rank2-int8/0-12"},
    "checkpoints": {"scores/diagonal-checkpoints", *(_SUM.format(each, "diagonal") for each in ("one", "two"))},
    "source": {"scores/source", *(_SUM.format(each, "source") for each in ("one", "two"))},
    "fisher": {"scores/fisher"},
    "logra": {"scores/logra"},
    "trak": {"scores/trak"},
    "trackstar": {"scores/trackstar"},
    "magic": {"scores/magic"},
}
"""For each call with overwrite=True, all that it replaces or deletes."""


def found_files(run: Path) -> dict[str, tuple[int, int]]:
    """When each finished result was written, by its place without digests."""
    found = {}
    for file in run.rglob("tensors.safetensors"):
        place = str(file.parent.relative_to(run))
        for digest in sorted({part[-8:] for name in place.split("/") for part in name.split(".")[:1] if "-" in part}):
            place = place.replace(f"-{digest}", "")
        if file.parent.parent.suffix == ".tokens" and file.parent.name != "index":
            place = str(Path(place).parent / "part")
        found[place] = (file.stat().st_ino, file.stat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, case = tmp_path_factory.mktemp("complete"), mlp_case(torch.float32)
    checkpoints(case, folder / "weights")
    everything(wf.Study(folder / "run", case.model, case.task, train=case.train), case.queries)
    return folder


@pytest.mark.parametrize("call", REPLACED)
def test_overwriting_replaces_one_thing_alone(complete: Path, tmp_path: Path, call: str) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    before = found_files(study.path)
    assert before.keys() >= REPLACED[call]
    if call.startswith("fit"):
        study.fit(call.split()[1], overwrite=True)
    else:
        ({**METHODS, **DIRECT})[call](study, case.queries, overwrite=True)
    after = found_files(study.path)
    assert {name for name in before if after.get(name) != before[name]} == REPLACED[call]
    assert after.keys() <= before.keys()
