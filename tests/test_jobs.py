"""Jobs that end in a file: training examples as a review queue, and training files without some of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.processes import run_command
from tests.test_ask import TEXTS, save_model
from wherefrom.hf.preparation import Preparation, Source, read_examples
from wherefrom.jobs.filtering import check_filtered, filtered, origins, positions_of_each
from wherefrom.jobs.sources import DataSource
from wherefrom.runtime.errors import InputError


def clusters() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """Two clusters of points that a linear model tells apart, with three wrong labels, in float64."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(40) % 2
    points = torch.randn(40, 3, generator=generator, dtype=torch.float64) + 4 * (2.0 * true - 1).unsqueeze(1)
    wrong, labels = [5, 12, 30], true.clone()
    labels[wrong] = 1 - labels[wrong]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).double()
    for _ in range(50):
        loss = nn.functional.cross_entropy(model(points), labels)
        for weight, slope in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            weight.data -= 0.1 * slope
    return model, list(zip(points, labels, strict=True)), wrong


def test_wrong_labels_come_first_and_signals_are_those_of_autograd(tmp_path: Path) -> None:
    model, train, wrong = clusters()
    names = [name for name, _ in model.named_modules() if name]
    study = wf.Study(tmp_path, model, wf.Classification(layers=names), train=train)
    held_out = [(point, 1 - label if at in wrong else label) for at, (point, label) in enumerate(train)][:20]
    found = wf.audit(study, held_out, wf.Dot())
    gradients = []
    for point, label in [*train, *held_out]:
        loss = nn.functional.cross_entropy(model(point.unsqueeze(0)), label.unsqueeze(0))
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([each.flatten() for each in slopes]))
    rows, queries = torch.stack(gradients[:40]), torch.stack(gradients[40:])
    cosines = nn.functional.normalize(rows) @ nn.functional.normalize(rows).T
    cosines.fill_diagonal_(0)
    nearest = cosines.abs().topk(10, dim=1).indices
    losses = nn.functional.cross_entropy(
        model(torch.stack([each for each, _ in train])), torch.stack([each for _, each in train]), reduction="none"
    )
    torch.testing.assert_close(found.signals["loss"], losses.detach())
    torch.testing.assert_close(found.signals["self_influence"], rows.square().sum(1))
    torch.testing.assert_close(found.signals["held_out"], -(queries @ rows.T).sum(0))
    # Where the tenth and the eleventh are as near, a sketch may take the other one.
    off = (found.signals["neighbours"] + cosines.gather(1, nearest).mean(1)).abs()
    assert (off < 0.02).sum() >= 38 and off.max() < 0.21
    assert set(found.ranking[:3].tolist()) == set(wrong)
    table = found.to_pandas()
    assert table["train"].tolist() == found.ranking.tolist() and table["rank"].tolist() == [*range(1, 41)]
    with pytest.raises(InputError, match="order='best'"):
        wf.audit(study, order="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="held-out queries"):
        wf.audit(study, order="held_out")


def test_the_command_writes_the_queue_and_the_file_without_the_worst(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    fit = run_command(tmp_path, "fit", "run", "--model", "model", "--train", "train.jsonl", "--no-end-token")
    assert fit.returncode == 0, fit.stderr
    asked = ["audit", "run", "--held-out", "train.jsonl", "--out", "queue.jsonl", "--drop", "2"]
    asked += ["--filtered", "rest.jsonl"]
    for more, message in (
        (["--n", "0"], "n 0"), (["--drop", "6"], "drop 6"), (["--filtered", "rest.txt"], "ends in .jsonl"),
    ):  # fmt: skip
        refused = run_command(tmp_path, *asked, *more)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
        assert not {"queue.jsonl", "rest.jsonl", "rest.txt"} & {each.name for each in tmp_path.iterdir()}
    done = run_command(tmp_path, *asked)
    assert done.returncode == 0, done.stderr
    queue = [json.loads(line) for line in (tmp_path / "queue.jsonl").read_text().splitlines()]
    assert sorted(each["train"] for each in queue) == [*range(6)]
    assert all(each["text"] == TEXTS[each["train"]] and each["line"] == 2 * each["train"] + 1 for each in queue)
    assert [each["loss"] for each in queue] == sorted((each["loss"] for each in queue), reverse=True)  # texts: by loss
    dropped = {each["train"] for each in queue[:2]}
    lines = (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)[::2]
    assert (tmp_path / "rest.jsonl").read_bytes() == b"".join(
        line for position, line in enumerate(lines) if position not in dropped
    )
    again = run_command(tmp_path, *asked)
    assert again.returncode == 1 and "queue.jsonl is there already" in again.stderr
    assert run_command(tmp_path, *asked, "--overwrite").returncode == 0


def test_files_are_filtered_in_their_own_format(tmp_path: Path) -> None:
    (text := tmp_path / "a.txt").write_text("one\nline\n\n\ntwo\n \nthree\n")
    (lines := tmp_path / "b.jsonl").write_bytes(b'{"text": "\\u00e9",  "n": 1}\r\n\n{"text": "x"}\n{"text":"y"}')
    (table := tmp_path / "c.csv").write_text("text,n\none,1\ntwo,2\n")
    sources = [read_examples(str(file))[0] for file in (text, lines, table)]
    each = positions_of_each(sources, {0, 2, 4, 5, 6})
    assert each == [{0, 2}, {1, 2}, {0}]
    made = [filtered(*found) for found in zip(sources, map(str, (text, lines, table)), each, strict=True)]
    assert made == [
        ("a-filtered.txt", b"one\nline\n\nthree\n\n"),
        ("b-filtered.jsonl", b'{"text": "x"}\n{"text":"y"}\n'),
        ("c-filtered.jsonl", b'{"text": "one", "n": 1}\n'),
    ]
    assert [line for _, line in origins(sources, [str(text), str(lines), str(table)])] == [1, 5, 7, 1, 3, 4, None, None]
    text.write_text("one alone")
    with pytest.raises(InputError, match="has 1 texts, and had 3"):
        filtered(sources[0], str(text), set())
    with pytest.raises(InputError, match="JSON cannot hold"):
        filtered(Source("", "", [{"text": b"bytes"}]), "somewhere", {0})


def test_names_of_files_are_refused_before_there_is_anything_to_write(tmp_path: Path) -> None:
    (text := tmp_path / "a.txt").write_text("one")
    (lines := tmp_path / "b.jsonl").write_text('{"text": "one"}')
    (tmp_path / "folder.txt").mkdir()
    for names, unit, file, message in (
        ([text], "blocks", "c.txt", "joined and cut"),
        ([text, lines], "documents", "c.txt", "not put into one file"),
        ([text], "documents", "c.jsonl", "ends in .txt"),
        ([text], "documents", "a.txt", "is what the run was trained on"),
        ([text], "documents", "folder.txt", "is there already: choose another name.$"),
        ([text], "documents", "x" * 300 + ".txt", "cannot be the name of a file"),
    ):  # fmt: skip
        train = DataSource(tuple(map(str, names)), "train", Preparation(unit=unit))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            check_filtered("out", tmp_path / file, train, overwrite=True)
    train = DataSource((str(lines),), "train", Preparation())
    check_filtered("out", tmp_path / "new" / "c.jsonl", train, overwrite=False)
    (tmp_path / "c.jsonl").touch()
    check_filtered("out", tmp_path / "c.jsonl", train, overwrite=True)
    with pytest.raises(InputError, match="c.jsonl is there already: choose another name, or pass overwrite=True"):
        check_filtered("out", tmp_path / "c.jsonl", train, overwrite=False)
