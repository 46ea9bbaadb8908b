"""What a study made in Python leaves for the command: its texts and scores are found again, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import wherefrom as wf
from tests.test_ask import TEXTS, save_model
from wherefrom.hf.text import load_model
from wherefrom.jobs.sources import SOURCES, RunSources, chosen_scores
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.scoring.results import load_scores


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    for name, texts in (("a", TEXTS[:4]), ("b", TEXTS[4:]), ("queries", TEXTS[:2])):
        lines = (json.dumps({"text": text, "title": text[:5]}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def study_of(folder: Path, **options: Any) -> wf.PretrainedStudy:
    given = {"train": {name: folder / f"{name}.jsonl" for name in "ab"}, "end_token": False, "max_length": 40}
    return wf.study_from_pretrained(folder / "model", run=folder / "run", device="cpu", **{**given, **options})


def test_a_run_is_found_again_with_its_scores(folder: Path) -> None:
    layers = ["*.c_fc"]
    study = study_of(folder, task=wf.CausalLM(layers), dtype="float64")
    scores = study.score(study.prepare(folder / "queries.jsonl"), wf.EKFAC(empirical=True, seed=3))
    study.score(study.prepare(TEXTS), wf.EKFAC(empirical=True, seed=3))  # later, and not recorded
    wf.record_sources(study, scores, folder / "queries.jsonl", method=wf.EKFAC(empirical=True, seed=3))

    sources = RunSources.load(study.path)
    assert sources.fitted == {"empirical": True, "seed": 3}
    again = sources.study(study.path, "cpu", wf.Execution())
    assert [again.train[each] for each in range(6)] == [study.train[each] for each in range(6)]
    assert list(again.layers) == list(study.layers)
    found = again.score(again.prepare(folder / "queries.jsonl"), wf.EKFAC(empirical=True, seed=3))
    assert torch.equal(found.values, scores.values)
    assert len(list((study.path / "scores").iterdir())) == 2  # found, not computed once more

    shown = chosen_scores(study.path, None)
    assert shown.name == scores.name
    queries, train, _ = RunSources.of_result(shown).passages(load_scores(shown).fingerprint)
    assert [each.text for each in (queries[0], queries[1], train[5])] == [TEXTS[0], TEXTS[1], TEXTS[5]]
    assert (train[5].title, train[5].source) == (TEXTS[5][:5], "b")


def test_a_name_means_what_it_did_where_the_run_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = folder / "project", folder / "elsewhere"
    for each in (project, elsewhere):  # with files of the same names
        shutil.copytree(folder / "model", each / "model")
        shutil.copy(folder / "a.jsonl", each)
    monkeypatch.chdir(project)
    wf.record_sources(wf.study_from_pretrained("model", "a.jsonl", run="runs/mine", device="cpu"))
    assert RunSources.load(Path("runs/mine")).train.names == ("a.jsonl",)

    monkeypatch.chdir(project / "runs")
    with pytest.raises(InputError, match=f"'model' was {project / 'model'}.*run the command in {project}"):
        RunSources.load(Path("mine"))
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match=f"'model' was {project / 'model'}.*run the command in {project}"):
        RunSources.load(project / "runs" / "mine")
    (elsewhere / "linked").symlink_to(project / "runs" / "mine")
    with pytest.raises(InputError, match=f"run the command in {project}"):
        RunSources.load(Path("linked"))

    moved = project.rename(folder / "moved")
    monkeypatch.chdir(moved)
    assert RunSources.load(Path("runs/mine")).train.names == ("a.jsonl",)
    monkeypatch.chdir(elsewhere)
    shutil.move(moved / "runs", elsewhere / "runs")  # without its files, which these take the place of
    assert RunSources.load(Path("runs/mine")).model == "model"


def test_what_commands_could_not_find_or_say_is_refused(folder: Path) -> None:
    whole = load_model(str(folder / "model"))
    adapter = get_peft_model(whole, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(str(folder / "adapter"))
    adapted = {"folder": folder / "adapter", "base": load_model(str(folder / "model"))}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train": TEXTS}, "the dataset was given to study_from_pretrained itself"),
        ({"train": {"mine": TEXTS, "a": folder / "a.jsonl"}}, "mine was given"),
        (adapted, "base was given"),
        ({"task": wf.CausalLM(measure="margin")}, r"task=CausalLM\(\.\.\.\).*measure"),
    ]
    for options, message in cases:
        given = {"folder": folder / "model", "train": folder / "a.jsonl", "run": folder / "run", "device": "cpu"}
        study = wf.study_from_pretrained(**{**given, **options})
        with pytest.raises(InputError, match=message):
            wf.record_sources(study)
    assert not (folder / "run" / SOURCES).exists()


def test_other_texts_are_refused(folder: Path) -> None:
    study = study_of(folder)
    scores = study.score(study.prepare(folder / "queries.jsonl"), wf.Dot())
    with pytest.raises(MismatchError, match="queries: scored 2 examples"):
        wf.record_sources(study, scores, folder / "a.jsonl")
    with pytest.raises(InputError, match="queries=None: expected the name"):
        wf.record_sources(study, scores)
    with pytest.raises(InputError, match=f"scores='': expected what is stored in {folder / 'run'}"):
        wf.record_sources(study, wf.Scores(scores.values, scores.fingerprint), folder / "queries.jsonl")
    renamed = study_of(folder, train={"x": folder / "a.jsonl", "y": folder / "b.jsonl"})  # commands call them a and b
    with pytest.raises(MismatchError, match=r"training data: .*make the study of what is there now"):
        wf.record_sources(renamed)
    (folder / "b.jsonl").write_text((folder / "a.jsonl").read_text())
    with pytest.raises(MismatchError, match="training data: scored 6 examples"):
        wf.record_sources(study)
    assert not (folder / "run" / SOURCES).exists()
