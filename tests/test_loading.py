"""Batches prepared ahead are the batches that are asked for."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wherefrom as wf
from tests.models import token_rows
from wherefrom.engine.loading import Examples, Loader, map_tensors

CPU = torch.device("cpu")


class Watched:
    """Token rows that remember which thread read them; one of them may be broken."""

    def __init__(self, count: int, broken: int = -1) -> None:
        self.rows, self.broken = token_rows(count), broken
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> object:
        if row == self.broken:
            raise ValueError(f"row {row} is broken")
        self.threads.add(threading.current_thread().name)
        return self.rows[row]


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12))
@settings(deadline=None, max_examples=30)
def test_batches_are_those_asked_for_whatever_was_prepared(sizes: list[int]) -> None:
    """Sizes change without notice, as after running out of memory."""
    data, task, position = Watched(30), wf.CausalLM(), 0
    with Loader(Examples(data, task), CPU, ahead=True) as loader:
        for size in sizes:
            rows = range(position, min(position + size, 30))
            if not rows:
                break
            batch, padding, _ = loader.load(rows)
            expected = task.collate([data.rows[row] for row in rows])
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
            real = sum(len(data.rows[row]["input_ids"]) for row in rows)  # type: ignore[index, misc]
            assert [each.tokens for each in padding] == ([] if batch["input_ids"].numel() == real else [real])
            assert all(int(each.mask.sum()) == real for each in padding)
            position = rows.stop


def test_the_next_batch_is_prepared_in_one_thread_only_where_asked() -> None:
    for ahead, threads in ((True, 2), (False, 1), (None, 1)):
        data = Watched(9)
        with Loader(Examples(data, wf.CausalLM()), CPU, ahead) as loader:
            for start in (0, 3, 6):
                loader.load(range(start, start + 3))
        assert len(data.threads) == threads


def test_an_error_of_the_dataset_is_raised_when_its_batch_is_due() -> None:
    with Loader(Examples(Watched(9, broken=4), wf.CausalLM()), CPU, ahead=True) as loader:
        loader.load(range(0, 3))
        with pytest.raises(ValueError, match="row 4 is broken"):
            loader.load(range(3, 6))
        loader.load(range(6, 9))


def test_every_tensor_of_a_nested_batch_is_reached() -> None:
    batch = {"a": torch.ones(1), "b": [torch.ones(1), (torch.ones(1), "text", 3)]}
    assert map_tensors(batch, lambda tensor: tensor + 1) == {"a": torch.tensor([2.0]), "b": [2, (2, "text", 3)]}
