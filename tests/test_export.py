"""Scores as files and tables of other programs, and from the command."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wherefrom as wf
from tests.models import mlp_case
from wherefrom.cli.showing import export
from wherefrom.runtime.errors import InputError, StorageError


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> wf.Scores:
    case = mlp_case()
    study = wf.Study(tmp_path_factory.mktemp("run"), case.model, case.task, train=case.train)
    return study.score(case.queries, wf.Diagonal(), keep=wf.Pairs(layers=True, self_influence=True))


def expected(scores: wf.Scores, k: int) -> list[tuple[int, int, int, float]]:
    """Each query's highest, found by sorting in Python."""
    found = []
    for query, values in enumerate(scores.values.tolist()):
        best = sorted(range(len(values)), key=lambda position: -values[position])[:k]
        found += [(query, rank, position, values[position]) for rank, position in enumerate(best, start=1)]
    return found


@pytest.mark.parametrize("k", [None, 2])
def test_a_table_has_every_pair_or_the_highest(scores: wf.Scores, k: int | None, tmp_path: Path) -> None:
    wanted = expected(scores, k or scores.values.shape[1])
    scores.save(tmp_path / "scores.csv", k)
    with (tmp_path / "scores.csv").open() as stream:
        lines = list(csv.reader(stream))
    assert lines[0] == ["query", "rank", "train", "score"]
    assert [(int(query), int(rank), int(train), float(score)) for query, rank, train, score in lines[1:]] == wanted
    assert list(scores.to_pandas(k).itertuples(index=False, name=None)) == wanted
    scores.save(tmp_path / "scores.parquet", k)
    pandas = pytest.importorskip("pandas")
    assert pandas.read_parquet(tmp_path / "scores.parquet").equals(scores.to_pandas(k))


def test_a_file_of_tensors_has_all_of_them(scores: wf.Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.safetensors")
    found = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(found["values"], scores.values)
    assert {name for name in found if name.startswith("layers/")} == {f"layers/{name}" for name in scores.layers}
    assert scores.self_influence is not None
    assert torch.equal(found["self_influence"], scores.self_influence)


def test_the_highest_alone_are_saved_as_such(scores: wf.Scores, tmp_path: Path) -> None:
    case = mlp_case()
    top = wf.Study(tmp_path / "run", case.model, case.task, train=case.train).score(
        case.queries, wf.Diagonal(), keep=wf.Top(3)
    )
    top.save(tmp_path / "top.csv")
    assert [hit[:3] for hit in top.to_pandas().itertuples(index=False, name=None)] == [
        hit[:3] for hit in expected(scores, 3)
    ]
    assert len((tmp_path / "top.csv").read_text().splitlines()) == 1 + 3 * len(case.queries)


def test_what_cannot_be_written_is_refused(scores: wf.Scores, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a name that ends in \.csv, \.parquet or \.safetensors"):
        scores.save(tmp_path / "scores.xlsx")
    with pytest.raises(InputError, match="a file of tensors has all scores"):
        scores.save(tmp_path / "scores.safetensors", k=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        scores.save(tmp_path / "file" / "scores.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_command_exports_what_is_stored(scores: wf.Scores, tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    study.score(case.queries, wf.Diagonal(), name="mine")
    export(tmp_path / "run", tmp_path / "out.csv", name="mine", k=2)
    scores.save(tmp_path / "again.csv", 2)
    assert (tmp_path / "out.csv").read_text() == (tmp_path / "again.csv").read_text()
