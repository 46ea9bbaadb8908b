"""The contract of all ways of scoring: what a run directory keeps side by side, uses again, refuses and shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

import wherefrom as wf
from tests.contract.answers import Answers, able
from tests.contract.methods import METHODS, study_of, values
from tests.contract.settings import Setting, Variation, tokens
from tests.models import relative_error, token_rows
from tests.runs import factored, results
from wherefrom.runtime.errors import DamagedError, InputError, MismatchError
from wherefrom.scoring.results import load_scores

# What is said of a result that was made from something else.
NAMED_BY: dict[Variation, str] = {
    "damping": "damping|segments",
    "query set": "queries",
    "seed": "targets|directions|recipe",
    "training set": "training data",
    "model": "model",
}
SIDE_BY_SIDE: tuple[Variation, ...] = ("damping", "query set", "seed", "training set")
NAME = "pinned"


def another(*variations: Variation) -> pytest.MarkDecorator:
    """The test for every way of scoring and every thing that may be another in it."""
    cases = [(name, what) for name, each in METHODS.items() for what in variations if what not in each.unsupported]
    return pytest.mark.parametrize(("name", "what"), cases)


def copied(run: Path, folder: Path) -> Path:
    """A run directory that may be changed."""
    if run.exists():  # some keep nothing
        shutil.copytree(run, folder / "run")
    return folder / "run"


@another(*SIDE_BY_SIDE)
def test_a_second_use_lies_beside_the_first(name: str, what: Variation, answers: Answers, tmp_path: Path) -> None:
    first, second = answers.usual(name), answers.other(name, what)
    assert first.values.shape != second.values.shape or relative_error(second.values, first.values) > 1e-4
    run = copied(first.run, tmp_path)
    before = results(run)
    found = values(METHODS[name].score(run, answers.settings.other(what)))
    assert relative_error(found, second.values) < 1e-9
    after = results(run)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    usual = answers.settings.usual()
    usual.task.kill_at(0)
    assert relative_error(values(METHODS[name].score(run, usual)), first.values) < 1e-12
    assert usual.task.calls <= METHODS[name].checks or "reuse" in METHODS[name].unsupported
    assert results(run).keys() == after.keys()


@able("name")
def test_a_second_name_lies_beside_the_first(name: str, answers: Answers, tmp_path: Path) -> None:
    first, folder = answers.usual(name), METHODS[name].folder
    run = copied(first.run, tmp_path)
    before = results(run)
    found = values(METHODS[name].score(run, replace(answers.settings.usual(), name="second")))
    assert relative_error(found, first.values) < 1e-9
    assert folder is not None and (run / folder.format("second")).is_dir()
    after = results(run)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@able("reuse")
def test_what_is_there_is_not_computed_again(name: str, answers: Answers, tmp_path: Path) -> None:
    run, usual = copied(answers.usual(name).run, tmp_path), answers.settings.usual()
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    usual.task.kill_at(0)
    found = values(METHODS[name].score(run, usual))
    assert usual.task.calls <= METHODS[name].checks
    assert torch.equal(found, answers.usual(name).values)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == before


@pytest.fixture(scope="module")
def named(answers: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The run directory of the usual answer under a name, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("named") / "run"
            METHODS[name].score(made[name], replace(answers.settings.usual(), name=NAME))
        return made[name]

    return of  # type: ignore[return-value]


# What the sketches of an index do not depend on, so that one of them serves all.
ASKED = {("index", "query set"), ("index", "training set"), ("index", "order")}
REFUSED = [
    (name, what)
    for name, each in METHODS.items()
    if each.folder is not None
    for what in get_args(Variation)
    if what not in each.unsupported and (name, what) not in ASKED
]


@pytest.mark.parametrize(("name", "what"), REFUSED)
def test_what_was_made_from_something_else_is_refused_by_name(
    name: str, what: Variation, answers: Answers, named: Any, tmp_path: Path
) -> None:
    run = copied(named(name), tmp_path)
    before = results(run)
    with pytest.raises(MismatchError, match=NAMED_BY[what]):
        METHODS[name].score(run, replace(answers.settings.other(what), name=NAME))
    after = results(run)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, what in REFUSED if what in ("seed", "training set")])
def test_what_has_a_name_is_replaced_when_it_is_asked_for(
    name: str, what: Variation, answers: Answers, named: Any, tmp_path: Path
) -> None:
    run, other = copied(named(name), tmp_path), answers.settings.other(what)
    found = values(METHODS[name].score(run, replace(other, name=NAME, overwrite=True)))
    assert relative_error(found, answers.other(name, what).values) < 1e-9


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if each.takes_factors])
def test_factors_of_another_model_are_refused(name: str, answers: Answers, tmp_path: Path) -> None:
    foreign, strategy = answers.settings.other("model"), METHODS[name].takes_factors
    assert strategy is not None
    factors = study_of(tmp_path / "other", foreign).fit(factored(strategy))
    with pytest.raises(MismatchError, match="factors were fitted on another model. model: stored"):
        METHODS[name].score(tmp_path / "run", replace(answers.settings.usual(), factors=factors))
    assert not (tmp_path / "run" / "scores").exists()


KEPT = [name for name, each in METHODS.items() if each.folder is not None]


@pytest.mark.parametrize("name", KEPT)
def test_a_damaged_file_is_named_and_not_used(name: str, answers: Answers, named: Any, tmp_path: Path) -> None:
    run, folder = copied(named(name), tmp_path), METHODS[name].folder
    assert folder is not None
    found = sorted((run / folder.format(NAME)).rglob("*.safetensors"))
    assert found
    for file in found:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DamagedError, match=f"{file.parent.name}.*(has changed|cannot be used)"):
            values(METHODS[name].score(run, replace(answers.settings.usual(), name=NAME)))
        file.write_bytes(content)


# What is shown.


# Whose result is a matrix in `scores`, or the highest and lowest numbers of one.
MATRICES = [name for name, each in METHODS.items() if each.folder == "scores/{}"]


@pytest.mark.parametrize("name", MATRICES)
def test_what_is_kept_is_a_plain_file_and_loaded_by_its_name(name: str, answers: Answers, named: Any) -> None:
    folder = named(name) / "scores" / NAME
    loaded = load_scores(folder)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert torch.equal(loaded.values, stored["values"])
    expected = answers.usual(name).values
    if isinstance(loaded, wf.Scores):
        assert relative_error(loaded.values, expected) < 1e-9
    else:
        assert relative_error(loaded.values, expected.gather(1, loaded.train)) < 1e-9


@pytest.mark.parametrize("name", MATRICES)
def test_its_top_are_its_highest_scores(name: str, answers: Answers, named: Any) -> None:
    loaded, expected = load_scores(named(name) / "scores" / NAME), answers.usual(name).values
    if METHODS[name].train_axis is None:
        with pytest.raises(InputError, match="add up all training examples"):
            loaded.top(2)
        return
    if name == "candidates":
        expected = expected.masked_fill(expected == 0, -torch.inf)
    best = expected.topk(2, dim=1)
    hits = loaded.top(2)
    assert [hit.train for hit in hits] == best.indices.flatten().tolist()
    assert [(hit.query, hit.rank) for hit in hits] == [(q, r) for q in range(len(expected)) for r in (1, 2)]
    assert relative_error(torch.tensor([hit.score for hit in hits]), best.values.flatten()) < 1e-6


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        return "".join(f" w{token}" for token in token_ids)


def text_of(example: object) -> str:
    return Words().decode(tokens(example)).strip()


@pytest.mark.parametrize("name", MATRICES)
def test_a_page_shows_the_texts_of_the_highest_scores(name: str, answers: Answers, named: Any, tmp_path: Path) -> None:
    usual, method = answers.settings.usual(), METHODS[name]
    loaded: Any = load_scores(named(name) / "scores" / NAME)
    study = study_of(named(name), usual)
    if method.train_axis is None:
        with pytest.raises(InputError, match="add up all training examples"):
            study.report(loaded, usual.queries, tokenizer=Words(), path=tmp_path / "page.html")
        return
    page = study.report(loaded, usual.queries, tokenizer=Words(), path=tmp_path / "page.html", k=1).read_text()
    if method.query_axis is not None:
        assert all(text_of(query) in page for query in usual.queries)
    if method.train_axis is not None:
        assert all(text_of(usual.train[hit.train]) in page for hit in loaded.top(1))


def test_a_page_shades_the_tokens_of_its_scores(answers: Answers, named: Any, tmp_path: Path) -> None:
    usual, run = answers.settings.usual(), named("tokens")
    scores = METHODS["ekfac"].score(run, replace(usual, name=NAME))
    found = METHODS["tokens"].score(run, replace(usual, name=NAME))
    assert isinstance(scores, wf.Scores) and isinstance(found, wf.TokenScores)
    path, study = tmp_path / "page.html", study_of(run, usual)
    study.report(scores, usual.queries, tokenizer=Words(), tokens=found, path=path)
    assert 'data-shares="' in path.read_text()
    other = replace(scores, fingerprint={**scores.fingerprint, "damping": "3.0"})
    with pytest.raises(MismatchError, match="damping"):
        study.report(other, usual.queries, tokenizer=Words(), tokens=found, path=path)


def with_other(usual: Setting, side: str) -> Setting:
    """The setting with other examples, as many as before."""
    if side == "queries":
        return replace(usual, queries=token_rows(len(usual.queries), seed=21))
    return replace(usual, train=token_rows(len(usual.train), seed=22))


@pytest.mark.parametrize("side", ["queries", "train"])
@pytest.mark.parametrize("name", ["ekfac", "LoGra", "checkpoints", "SOURCE", "sampled Fisher", "MAGIC"])
def test_scores_are_not_shown_beside_other_texts(
    name: str, side: str, answers: Answers, named: Any, tmp_path: Path
) -> None:
    other = with_other(answers.settings.usual(), side)
    loaded: Any = load_scores(named(name) / "scores" / NAME)
    with pytest.raises(MismatchError, match="queries" if side == "queries" else "training data"):
        study_of(named(name), other).report(loaded, other.queries, tokenizer=Words(), path=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
