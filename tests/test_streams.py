"""Streams and loaders: their examples are those of a list, in its order; what would be others is refused by name."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import wherefrom as wf
from tests.models import gpt2, token_rows
from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import dataset_digest

ROWS: list[Any] = token_rows(6)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(ROWS)


def hub_stream() -> Any:
    return Dataset.from_list(ROWS).to_iterable_dataset()


def loader(rows: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows, **options)


STREAMS: dict[str, Any] = {
    "streaming dataset": hub_stream,
    "mapped streaming dataset": lambda: hub_stream().map(lambda row: row).filter(lambda row: True),
    "iterable dataset": Endless,
    "loader of one": lambda: loader(Endless(), batch_size=2),
    "generator": lambda: (row for row in ROWS),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_the_list_of_its_first_examples(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wherefrom"):
        found = wf.read_stream(STREAMS[name](), limit=4)
    assert dataset_digest(found) == dataset_digest(ROWS[:4])
    assert "4 examples are in host memory, and there may be more" in caplog.text
    assert len(wf.read_stream(hub_stream(), limit=99)) == 6


def test_scores_of_a_stream_and_of_loaders_are_those_of_the_list(tmp_path: Path) -> None:
    def scores(train: Any, queries: Any) -> wf.Scores:
        return wf.Study(tmp_path / "run", gpt2(layers=1), wf.CausalLM(), train=train).score(queries, wf.Dot())

    expected = scores(ROWS, ROWS[:2])
    shuffled = loader(ROWS, batch_size=4, shuffle=True, drop_last=True)
    for train, queries in (
        (wf.read_stream(hub_stream(), limit=6), wf.read_stream(hub_stream(), limit=2)),
        (shuffled, loader(ROWS[:2])),
    ):
        found = scores(train, queries)
        assert found.fingerprint == expected.fingerprint
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_itself_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"have no positions.*wherefrom\.read_stream\(stream, limit=N\)"):
        wf.Study(tmp_path, gpt2(layers=1), wf.CausalLM(), train=STREAMS[name]())


@pytest.mark.parametrize(
    ("stream", "limit", "message"),
    [
        (Endless, None, "limit=None: expected how many examples"),
        (Endless, 0, "limit=0: expected how many examples"),
        (lambda: iter(()), 3, "has no examples"),
        (lambda: hub_stream().shuffle(seed=1), 3, "is shuffled (BufferShuffledExamplesIterable)"),
        (lambda: hub_stream().shuffle(seed=1).map(lambda row: row).take(3), 3, "is shuffled (Buffer"),
        (lambda: loader(hub_stream().shuffle(seed=1)), 3, "is shuffled (Buffer"),
    ],
)
def test_streams_that_cannot_be_read_again_are_refused(stream: Any, limit: int | None, message: str) -> None:
    with pytest.raises(InputError) as caught:
        wf.read_stream(stream(), limit=limit)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": SubsetRandomSampler([0, 1])}, "with a SubsetRandomSampler, which need not load every example"),
        ({"sampler": WeightedRandomSampler([1.0] * 6, 6)}, "with a WeightedRandomSampler"),
        ({"sampler": RandomSampler(ROWS, replacement=True)}, "with a RandomSampler"),
        ({"sampler": RandomSampler(ROWS, num_samples=3)}, "with a RandomSampler"),
        ({"batch_sampler": [[0, 1], [2]]}, "with a list"),
        ({"batch_size": 4, "drop_last": True}, "drops the last examples"),
    ],
)
def test_loaders_that_leave_examples_out_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    given = loader(ROWS, **options)
    study = wf.Study(tmp_path, gpt2(layers=1), wf.CausalLM(), train=ROWS)
    for use in (lambda: study.score(given), lambda: wf.Study(tmp_path, gpt2(layers=1), wf.CausalLM(), train=given)):
        with pytest.raises(InputError) as caught:
            use()
        assert message in str(caught.value)


def test_a_collate_fn_is_said_not_to_be_called(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pad(rows: Any) -> Any:
        raise AssertionError

    given = loader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 2, False), collate_fn=pad)
    study = wf.Study(tmp_path, gpt2(layers=1), wf.CausalLM(), train=given)
    assert study.train is ROWS
    assert "train is a DataLoader whose collate_fn, pad, is not called: the task collates." in caplog.text
    caplog.clear()
    wf.Study(tmp_path, gpt2(layers=1), wf.CausalLM(), train=loader(ROWS))
    assert "collate_fn" not in caplog.text
