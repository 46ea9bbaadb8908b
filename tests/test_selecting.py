"""Selections: against plain sums of scores and choices made by hand, and the files that the command writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.processes import run_command
from tests.test_ask import TEXTS, save_model
from tests.test_jobs import clusters
from wherefrom.methods.baselines import bm25_scores
from wherefrom.runtime.errors import InputError


def test_values_are_sums_of_products_of_gradients_and_the_best_are_chosen(tmp_path: Path) -> None:
    model, train, _ = clusters()
    layers = [name for name, _ in model.named_modules() if name]
    study = wf.Study(tmp_path, model, wf.Classification(layers=layers), train=train)
    targets = [(3 * point, label) for point, label in train[10:16]]
    gradients = []
    for point, label in [*train, *targets]:
        loss = nn.functional.cross_entropy(model(point.unsqueeze(0)), label.unsqueeze(0))
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([each.flatten() for each in slopes]))
    rows, queries = torch.stack(gradients[:40]), torch.stack(gradients[40:])
    scores = queries @ rows.T
    expected = {
        "none": scores.sum(0),
        "targets": (scores / scores.square().mean(1, keepdim=True).sqrt()).sum(0),
        "examples": scores.sum(0) / rows.norm(dim=1),
    }
    orders = []
    for normalized, values in expected.items():
        found = wf.select(study, targets, 7, wf.Dot(), normalized=normalized)  # type: ignore[arg-type]
        torch.testing.assert_close(found.values, values)
        assert found.chosen.tolist() == sorted(range(40), key=lambda at: -float(values[at]))[:7]
        assert not found.copies and found.groups is None
        orders.append(found.chosen.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]
    table = found.to_pandas()
    assert table["train"].tolist() == found.chosen.tolist() and table["rank"].tolist() == [*range(1, 8)]
    assert table["value"].tolist() == found.values[found.chosen].tolist()
    assert wf.select(study, targets, 40, wf.Dot()).chosen.sort().values.tolist() == [*range(40)]


def test_the_very_same_examples_are_copies_where_there_is_no_text(tmp_path: Path) -> None:
    model, train, _ = clusters()
    train = [*train[:6], *((point.clone(), label) for point, label in train[:6])]
    study = wf.Study(tmp_path, model, wf.Classification(), train=train)
    found = wf.select(study, train[:2], 6, wf.Dot())
    assert sorted(found.chosen.tolist()) == [*range(6)] and set(found.copies) <= {*range(6, 12)}
    with pytest.raises(InputError, match="n=7: 6 training examples are no copies"):
        wf.select(study, train[:2], 7, wf.Dot())


WORDS = [f"word{number}" for number in range(12)]  # eight runs of five
SAID = {
    "all": " ".join(WORDS),
    "shouted": " - ".join(WORDS).upper() + "!",
    "changed": " ".join([*WORDS[:9], "word9", "word10", "other"]),  # seven of eight
    "half": " ".join([*WORDS[:8], "a", "b", "c", "d"]),  # four of eight
    "less": " ".join([*WORDS[:7], "a", "b", "c", "d", "e"]),  # three of eight
    "short": "one two",
    "short again": "one two",
    "empty": "",
    "other": "word0 and word1 and word2 and so on until word11",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("select") / "model")


def of_texts(model: Path, run: Path, texts: list[str]) -> wf.PretrainedStudy:
    return wf.study_from_pretrained(model, texts, run=run, device="cpu")


@pytest.mark.parametrize(("overlap", "copies"), [
    (1.0, ["shouted", "short again"]),
    (0.8, ["shouted", "changed", "short again"]),
    (0.5, ["shouted", "changed", "half", "short again"]),
])  # fmt: skip
def test_copies_of_better_examples_are_passed_over(
    model: Path, tmp_path: Path, overlap: float, copies: list[str]
) -> None:
    names = list(SAID)
    study = of_texts(model, tmp_path / "run", list(SAID.values()))
    remaining = len(names) - len(copies)
    # Of equal scores the earlier example is better, and no text shares a word with this target.
    found = wf.select(study, [{"text": "nothing", "input_ids": [1, 2]}], remaining, wf.BM25(), overlap=overlap)
    assert [names[each] for each in found.copies] == copies
    assert [names[each] for each in found.chosen.tolist()] == [name for name in names if name not in copies]


def test_groups_have_equal_shares_and_others_fill_what_one_cannot(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"word{number} " * (12 - number) + f"filler{number} " * number for number in range(12)]
    study = of_texts(model, tmp_path / "run", texts)
    targets = [{"text": " ".join(f"word{number}" for number in range(12)), "input_ids": [1, 2]}]
    values = wf.select(study, targets, 1, wf.BM25()).values
    assert values.tolist() == sorted(values.tolist(), reverse=True)  # so that the first are the best
    groups = ["a"] * 6 + ["b"] * 5 + ["c"]
    with caplog.at_level(logging.WARNING, logger="wherefrom"):
        found = wf.select(study, targets, 5, wf.BM25(), balance=groups)
        assert found.chosen.tolist() == [0, 1, 6, 7, 11]
        assert found.to_pandas()["group"].tolist() == ["a", "a", "b", "b", "c"]
        found = wf.select(study, targets, 8, wf.BM25(), balance=groups)
        assert found.chosen.tolist() == [0, 1, 2, 3, 6, 7, 8, 11]
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert said == ["Groups that cannot fill their share, 2 of 8: c (1)."]
    for changed, message in (
        ({"n": 0}, "n=0"), ({"n": 13}, "n=13: expected 1 to 12"), ({"normalized": "best"}, "normalized='best'"),
        ({"overlap": 0}, "overlap=0"), ({"balance": groups[1:]}, "11 groups of 12"),
        ({"normalized": "examples"}, "self_influence of BM25"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            wf.select(study, targets, **{"n": 2, "method": wf.BM25(), **changed})  # type: ignore[arg-type]


def test_the_command_writes_the_chosen_lines_as_they_came(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "topic": "ab"[number % 2]}) + "\n" for number, text in enumerate(TEXTS)]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[0]]))
    (tmp_path / "targets.txt").write_text("a wet dog\n\nthe cat sat")
    fit = run_command(tmp_path, "fit", "run", "--model", str(model), "--train", "train.jsonl", "--no-end-token")
    assert fit.returncode == 0, fit.stderr
    told = ["select", "run", "--targets", "targets.txt", "--n", "3", "--out", "chosen.jsonl"]
    for more, message in (
        (["--n", "0"], "n 0"), (["--n", "8"], "n 8"), (["--out", "chosen.txt"], "ends in .jsonl"),
        (["--out", "train.jsonl", "--overwrite"], "is what the run was trained on"),
        (["--balance", "theme"], "columns"), (["--targets", "none.txt"], "none.txt"),
        (["--n", "7"], "6 training examples are no copies"),
    ):  # fmt: skip
        refused = run_command(tmp_path, *told, *more)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
        assert {each.name for each in tmp_path.iterdir()} == {"train.jsonl", "targets.txt", "run"}
    done = run_command(tmp_path, *told, "--balance", "topic", "--n", "4")
    assert done.returncode == 0 and "4 of 7 examples" in done.stdout, done.stderr
    written = (tmp_path / "chosen.jsonl").read_text().splitlines(keepends=True)
    assert len(written) == 4 and written == [line for line in lines if line in written]
    assert sorted(json.loads(line)["topic"] for line in written) == ["a", "a", "b", "b"]
    again = run_command(tmp_path, *told)
    assert again.returncode == 1 and "chosen.jsonl is there already" in again.stderr
    bm25 = run_command(tmp_path, *told, "bm25", "--overwrite")
    assert bm25.returncode == 0, bm25.stderr
    values = bm25_scores(["a wet dog", "the cat sat"], TEXTS).sum(0).tolist()
    best = sorted(range(len(TEXTS)), key=lambda at: -values[at])[:3]
    assert (tmp_path / "chosen.jsonl").read_text() == "".join(lines[at] for at in sorted(best))
