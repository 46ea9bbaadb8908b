"""Batches on the model's device: collated, counted, and for a GPU prepared ahead while it works on the one before.

This module knows datasets and tasks; it does not know what is done with a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, cast

import torch
from torch import Tensor, nn

from wherefrom.engine.capture import Padding
from wherefrom.runtime.errors import InputError, WherefromError
from wherefrom.store.fingerprint import Dataset, read_example
from wherefrom.tasks.task import Batch, Task


@dataclass(frozen=True)
class Rows:
    """Some examples of a dataset, in a given order."""

    dataset: Dataset[object]
    positions: Sequence[int]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, row: int, /) -> object:
        return read_example(self.dataset, self.positions[row])


def positions(dataset: Dataset[object]) -> Sequence[int]:
    """Where each example stands in the dataset that a user knows."""
    return dataset.positions if isinstance(dataset, Rows) else range(len(dataset))


class Loaded(NamedTuple, Generic[Batch]):
    """A batch on the device, and which of its tokens are real; nothing when all are."""

    batch: Batch
    padding: tuple[Padding, ...]


class Loader(Generic[Batch]):
    """Loads batches of a dataset; use it as a context, which ends its thread.

    Args:
        ahead: prepare the next batch in a thread; None does so for a GPU, whose work leaves the host idle.
        end: the position after the last example that is wanted; None is the dataset's end.
        model: that the task checks batches for.
    """

    def __init__(
        self,
        task: Task[Batch],
        dataset: Dataset[object],
        device: torch.device,
        ahead: bool | None = None,
        end: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._task, self._dataset, self._device, self._model = task, dataset, device, model
        self._end = len(dataset) if end is None else end
        ahead = device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._coming: tuple[range, Future[Loaded[Batch]]] | None = None

    def __enter__(self) -> Loader[Batch]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def load(self, rows: range) -> Loaded[Batch]:
        """The examples at `rows` as a batch on the device; as many after them are prepared meanwhile."""
        prepared = self._prepared(rows)
        following = range(rows.stop, min(rows.stop + len(rows), self._end))
        if self._thread is not None and following:
            self._coming = (following, self._thread.submit(self._prepare, following))
        # From pinned memory, the host does not wait for the copy.
        batch = cast(Batch, mapped(prepared.batch, self._moved))
        if self._model is not None:
            self._task.verify(self._model, batch)
        padding = (Padding(each.mask.to(self._device, non_blocking=True), each.tokens) for each in prepared.padding)
        return Loaded(batch, tuple(padding))

    def _prepared(self, rows: range) -> Loaded[Batch]:
        coming, self._coming = self._coming, None
        if coming is not None:
            expected, future = coming
            if expected == rows:
                return future.result()
            future.cancel()  # another batch size after memory ran out
        return self._prepare(rows)

    def _prepare(self, rows: range) -> Loaded[Batch]:
        """Collate on the host; what counts tokens is done here, so that nobody waits for the device to tell."""
        batch, masks = collated(self._task, self._dataset, rows, self._model)
        if all(bool(mask.all()) for mask in masks):
            masks = ()
        padding = tuple(Padding(self._pinned(mask.unsqueeze(-1)), int(mask.sum())) for mask in masks)
        return Loaded(cast(Batch, mapped(batch, self._pinned)), padding)

    def _moved(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta and self._device.type != "meta":
            raise InputError(
                f"{type(self._task).__name__}.collate returned a tensor on the meta device, which has no values, and "
                f"the model is on {self._device}. Make batches on the CPU; they are moved to the model."
            )
        return tensor.to(self._device, non_blocking=True)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._device.type == "cuda" and tensor.device.type == "cpu" else tensor


def collated(
    task: Task[Batch], dataset: Dataset[object], rows: Sequence[int], model: nn.Module | None = None
) -> tuple[Batch, Sequence[Tensor]]:
    """A batch of some examples on the host, and the masks of its tokens.

    Errors of the dataset's and the task's own code are raised as they are, with a note of the example; our
    own say it in their message.

    Args:
        model: that the batch is checked for.

    Raises:
        InputError: an example does not suit the task or the model, or the task's masks are none.
    """
    examples = [read_example(dataset, row) for row in rows]
    try:
        return _batch(task, examples, model)
    except Exception as error:
        known = [positions(dataset)[row] for row in rows]
        where, cause = f"examples {known[0]} to {known[-1]}", error
        for position, example in zip(known, examples, strict=True):
            alone = _failure(task, example, model)
            if alone is not None:
                where, cause = f"example {position}", alone
                break
        if isinstance(cause, WherefromError):
            raise InputError(f"{where.capitalize()} of the dataset: {cause}") from cause
        cause.add_note(f"wherefrom was collating {where} with {type(task).__name__}.")
        raise cause from None


def _batch(task: Task[Batch], examples: Sequence[object], model: nn.Module | None) -> tuple[Batch, Sequence[Tensor]]:
    batch = task.collate(examples if model is None else [task.select(model, example) for example in examples])
    masks = task.masks(batch)
    _check_masks(task, masks, len(examples))
    if model is not None:
        task.check(model, batch)
    return batch, masks


def _failure(task: Task[Batch], example: object, model: nn.Module | None) -> Exception | None:
    """Why no batch can be made of one example; None when it can."""
    try:
        _batch(task, [example], model)
    except Exception as error:  # whatever a user's code raises
        return error
    return None


def _check_masks(task: Task[Batch], masks: object, examples: int) -> None:
    """Refuse masks that would count wrong tokens."""
    name = type(task).__name__
    if not isinstance(masks, list | tuple):
        raise InputError(f"{name}.masks returned {type(masks).__name__}: expected a list or tuple of masks, or ().")
    for mask in masks:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2 or len(mask) != examples:
            raise InputError(
                f"{name}.mask returned {found} for {examples} example(s): expected a boolean tensor [batch, tokens], "
                "true where a token is real (call .bool() on a mask of 0 and 1), or None when all are."
            )
        if mask.is_meta:
            raise InputError(f"{name}.mask returned a tensor on the meta device, which has no values.")
    if len({mask.shape[1] for mask in masks}) < len(masks) and not all(bool(mask.all()) for mask in masks):
        raise InputError(
            f"{name}.masks returned masks of {[mask.shape[1] for mask in masks]} tokens, by which layers cannot be "
            "told apart. Pad one of the sequences by one token more."
        )


def mapped(batch: object, function: Callable[[Tensor], Tensor]) -> object:
    """A batch with a function applied to all tensors in its dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: mapped(value, function) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [mapped(value, function) for value in batch]
        make = getattr(type(batch), "_make", type(batch))  # of named tuples
        return make(values)
    return batch
