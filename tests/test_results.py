"""What results are about, what they are called, and what overwriting one replaces."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case
from tests.runs import factored, with_factors
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.evaluate.agreement import compare_scores
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.removal import evaluate_removal
from wherefrom.evaluate.retrain import Retraining
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.report.html import render_report
from wherefrom.report.passages import DatasetPassages, DatasetTokens, Passage
from wherefrom.report.text import token_tables, top_tables
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.store.names import found_result, labelled, result_name

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
    scores, tokens = study.score(case.queries, wf.Dot()), study.score(case.queries, wf.Dot(), keep=wf.Tokens())
    return study, case, scores, tokens


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
    method = with_factors(study.fit(wf.Dot()))
    other = study.score(case.queries, method, execution=wf.Execution(half_precision=True))
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
    found = study.index(wf.Dot(), wf.Sketch(numbers=64)).query(case.queries, k=2)
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
    top, scores = study.score(case.queries, keep=wf.Top(3)), study.score(case.queries)
    page, whole = (study.report(each, case.queries, k=3).read_text() for each in (top, scores))
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {f"{top.name}.html", f"{scores.name}.html"}

    def lists(source: str) -> list[str]:
        return source.split('<div class="columns">')[1:]

    hits = [part.partition("</section>")[0] for part in lists(page)]
    assert hits == [part.partition("</section>")[0] for part in lists(whole)]
    assert len(hits) == len(case.queries)
    assert page.count("only these were stored: the 3 highest and lowest of each query.") == len(case.queries)
    assert "only these were stored" not in whole
    assert 'class="histogram"' in whole and 'class="histogram"' not in page


def test_candidates_have_a_page_that_says_that_the_others_were_not_scored(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = wf.TwoStage(first=torch.tensor([[1, 4, 7]] * 5), then=wf.Dot())
    found = study.score(case.queries, method, keep=wf.Top(2))
    page = study.report(found, case.queries).read_text()
    stored = "the 2 highest and lowest of each query; candidates: 3 of each query"
    assert page.count(f"only these were stored: {stored}") == 5
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
    study.score(case.queries, wf.Diagonal())
    assert "is new" not in caplog.text
    with caplog.at_level("INFO", "wherefrom"):
        study.fit(wf.Diagonal(seed=1))
        study.score(case.queries, wf.Diagonal(damping=0.5))
        study.score(case.queries, wf.Diagonal())
    said = [record.message for record in caplog.records if "is new" in record.message]
    assert len(said) == 2  # what is loaded says nothing
    assert "targets: stored sampled, seed 0, now sampled, seed 1" in said[0]
    assert "damping: stored 0.1 x mean eigenvalue, now 0.5" in said[1]


# What overwriting replaces.


def overwriting(study: wf.Study[Any], queries: list[object]) -> dict[str, Callable[..., object]]:
    """Every call that takes `overwrite`, for every kind of result; those of several checkpoints have two."""
    paths = sorted(study.path.with_name("weights").iterdir())
    training = wf.ReplayableTraining(study._sweep.model, study._sweep.task, study.train, RECIPE)
    candidates = wf.TwoStage(first=torch.tensor([[0, 1]] * len(queries)), then=wf.Diagonal())
    scores: dict[str, tuple[wf.Method, wf.Keep[Any]]] = {
        "pairs": (wf.Diagonal(), wf.Pairs()),
        "top": (wf.Diagonal(), wf.Top(2)),
        "tokens": (wf.Diagonal(), wf.Tokens()),
        "candidates": (candidates, wf.Top(2)),
        "checkpoints": (wf.TracIn(scored=wf.Diagonal(), checkpoints=paths), wf.Pairs()),
        "source": (wf.Source(segments=1, checkpoints=paths, times=[0.1, 0.1]), wf.Pairs()),
        "fisher": (wf.Fisher(samples=1), wf.Pairs()),
        "logra": (wf.LoGra(rank=2), wf.Pairs()),
        "trak": (wf.Trak(rank=2), wf.Pairs()),
        "trackstar": (wf.TrackStar(rank=2), wf.Pairs()),
        "magic": (wf.Magic(training=training), wf.Pairs()),
    }
    fits = {f"fit {strategy}": partial(study.fit, factored(strategy)) for strategy in STRATEGIES}
    return {
        **fits,
        **{call: partial(study.score, queries, method, keep=keep) for call, (method, keep) in scores.items()},
        "self-influence": partial(study.self_influence, wf.Diagonal()),
        "index": partial(study.index, wf.Diagonal(), wf.Sketch(numbers=64)),
    }


REPLACED: dict[str, set[str]] = {
    "fit identity": set(),
    "fit diagonal": {"factors/sampled/diagonal"},
    "fit kfac": {"factors/sampled/covariance", "factors/sampled/eigenbasis", "factors/sampled/eigenvalues"},
    "fit ekfac": {"factors/sampled/covariance", "factors/sampled/eigenbasis", "factors/sampled/eigenvalues"},
    "fit shampoo": {f"factors/sampled/gradient-{stage}" for stage in ("covariance", "eigenbasis", "eigenvalues")},
    "pairs": {"scores/diagonal"},
    "top": {"scores/diagonal-top2"},
    "tokens": {"tokens/diagonal-tokens/index", "tokens/diagonal-tokens/part"},
    "candidates": {"scores/diagonal-candidates-top2"},
    "checkpoints": {"scores/tracin-diagonal"},
    "source": {"scores/source"},
    "fisher": {"scores/fisher"},
    "logra": {"scores/logra"},
    "trak": {"scores/trak"},
    "trackstar": {"scores/trackstar"},
    "magic": {"scores/magic"},
    "self-influence": {"self_influence/diagonal"},
    "index": {"index/diagonal-sketch64-1bit/12"},
}
"""For each call with overwrite=True, all that it replaces or deletes."""


def found_files(run: Path) -> dict[str, set[tuple[int, int]]]:
    """When the files of each finished result were written, by its place without digests."""
    found: dict[str, set[tuple[int, int]]] = {}
    for file in run.rglob("*.safetensors"):
        names = [labelled(name)[0] for name in file.parent.relative_to(run).parts]
        if names[0] == "tokens" and names[-1] != "index":
            names[-1] = "part"
        if names[0] == "index":
            names[-1] = names[-1].partition("-")[0]  # how many sketches; a digest of their examples follows
        found.setdefault("/".join(names), set()).add((file.stat().st_ino, file.stat().st_mtime_ns))
    return found


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every kind of result, with every strategy's factors, and the checkpoints beside it."""
    folder, case = tmp_path_factory.mktemp("complete"), mlp_case(torch.float32)
    (folder / "weights").mkdir()
    for name in ("one", "two"):
        torch.save(case.model.state_dict(), folder / "weights" / f"{name}.pt")
    study = wf.Study(folder / "run", case.model, case.task, train=case.train)
    for act in overwriting(study, case.queries).values():
        act()
    return folder


@pytest.mark.parametrize("call", REPLACED)
def test_overwriting_replaces_one_thing_alone(complete: Path, tmp_path: Path, call: str) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    before = found_files(study.path)
    assert before.keys() >= REPLACED[call]
    calls = overwriting(study, case.queries)
    assert calls.keys() == REPLACED.keys()
    calls[call](overwrite=True)
    after = found_files(study.path)
    assert {name for name in before if after.get(name) != before[name]} == REPLACED[call]
    assert after.keys() <= before.keys()
