"""Examples and the loss that is meant of them, also those of streams and of PyTorch's loaders; batches on the model's
device, for a GPU prepared ahead of their use.

This module knows datasets and tasks; it does not know what is done with a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
    default_convert,
)

from wherefrom.engine.passes import Padding
from wherefrom.runtime.errors import InputError, WherefromError, check_argument
from wherefrom.store.fingerprint import Dataset, checked_length, dataset_digest, read_example
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Batch, Task

Loss = Literal["training", "drawn", "measurement"]
DatasetLike = Dataset[object] | DataLoader[Any]

# Where streams that are made of others keep these: those of `datasets`, and PyTorch's data pipes.
_INNER = ("_ex_iterable", "ex_iterable", "ex_iterables", "dataset", "datapipe", "source_datapipe")

logger = logging.getLogger("wherefrom")


def indexed(name: str, given: object) -> Dataset[object]:
    """A dataset that is given as such, or by its DataLoader: its examples have positions, and there is at least one.

    Of a loader the dataset is used, in its order. A collate_fn of its own is not, which is said: the task collates.

    Args:
        name: of the argument, for messages.

    Raises:
        InputError: it is a stream, empty, or no dataset; or the loader does not load each of its examples.
    """
    dataset = _loaded(name, given) if isinstance(given, DataLoader) else given
    if isinstance(dataset, IterableDataset) or (isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__")):
        raise InputError(
            f"{name} is a {type(dataset).__name__}, whose examples have no positions. Read its first N examples into "
            "memory with wherefrom.read_stream(stream, limit=N)."
        )
    checked_length(name, cast(Dataset[object], dataset))
    return cast(Dataset[object], dataset)


def read_stream(stream: Iterable[object], limit: int | None = None) -> list[object]:
    """Read the first examples of a stream, in its order, for `Study` and `score`, which read them many times.

    They stay in host memory. The same examples in a list have the same digest, and so the same results.

    Args:
        stream: a streaming Hugging Face dataset, a PyTorch `IterableDataset` or the `DataLoader` of one, a generator.
        limit: how many examples are read, where there are so many.

    Raises:
        InputError: there is no limit, the stream is empty, or it is shuffled.
    """
    if isinstance(stream, DataLoader):
        stream = cast(Iterable[object], _loaded("The stream", stream))
    fits = limit is not None and limit >= 1
    check_argument(fits, "limit", limit, "how many examples to read into host memory, since a stream may have no end")
    shuffler = _shuffler(stream)
    if shuffler is not None:
        raise InputError(
            f"The stream is shuffled ({shuffler}), and the next time these would be other examples. Give it as it is "
            "before shuffling: scores do not depend on the order."
        )
    found = list(islice(stream, limit))
    if not found:
        raise InputError(f"The stream, a {type(stream).__name__}, has no examples; a generator can be read only once.")
    rest = ", and there may be more in the stream" if len(found) == limit else ""
    logger.info(f"{len(found):,} examples are in host memory{rest}.")
    return found


def _loaded(name: str, loader: DataLoader[object]) -> object:
    """The dataset of a loader that loads each of its examples."""
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    sampler, batches = loader.sampler, loader.batch_sampler
    whole = isinstance(sampler, SequentialSampler | DistributedSampler | RandomSampler)
    if isinstance(sampler, RandomSampler):
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    chosen = batches if whole else sampler
    if not whole or type(batches) not in (BatchSampler, type(None)):
        raise InputError(
            f"{name} is a DataLoader with a {type(chosen).__name__}, which need not load every example once. Give the "
            "dataset of those that it loads, or loader.dataset if these are all."
        )
    if loader.drop_last and isinstance(sampler, SequentialSampler) and len(sampler) % (loader.batch_size or 1):
        raise InputError(f"{name} is a DataLoader that drops the last examples: give the dataset without them.")
    if loader.collate_fn not in (default_collate, default_convert):
        called = getattr(loader.collate_fn, "__name__", type(loader.collate_fn).__name__)
        logger.warning(
            f"{name} is a DataLoader whose collate_fn, {called}, is not called: the task collates. What it changes in "
            "examples beyond padding, such as labels, has to be in the dataset."
        )
    return loader.dataset


def _shuffler(stream: object) -> str | None:
    """What shuffles a stream, if something says so."""
    for each in stream if isinstance(stream, list) else [stream]:
        if "shuffl" in type(each).__name__.lower():
            return type(each).__name__
        inner = (vars(each).get(name) for name in _INNER if hasattr(each, "__dict__"))
        found = next((shuffler for part in inner if part is not None and (shuffler := _shuffler(part))), None)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Subset:
    """Some examples of a dataset, in a given order."""

    dataset: Dataset[object]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int, /) -> object:
        return read_example(self.dataset, self.indices[position])


@dataclass(frozen=True)
class Repeated:
    """A dataset several times, one after another; a drawn loss has other targets each time."""

    dataset: Dataset[object]
    times: int

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def __getitem__(self, position: int, /) -> object:
        return read_example(self.dataset, position % len(self.dataset))


@dataclass(frozen=True)
class Examples(Generic[Batch]):
    """A dataset, and which loss of it is meant.

    Attributes:
        loss: the "training" loss, the same with targets "drawn" from the model's predictions (the Fisher information),
            or the "measurement" of queries.
        seed: of drawn targets.
        draws: losses of each example, with targets of their own, that a sweep takes from one forward pass. The k-th
            ones are drawn as those of `Repeated` examples, and collected after the (k - 1)-th of all examples.
    """

    dataset: Dataset[object]
    task: Task[Batch]
    loss: Loss = "training"
    seed: int = 0
    draws: int = 1

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.dataset)

    @cached_property
    def digest(self) -> str:
        """Of every example, in order; taken once for these examples, and anew for others of the same dataset."""
        return dataset_digest(self.dataset)

    @property
    def positions(self) -> Sequence[int]:
        """Where each example stands in the dataset that a user knows."""
        return self.dataset.indices if isinstance(self.dataset, Subset) else range(len(self.dataset))

    def subset(self, indices: Sequence[int]) -> Examples[Batch]:
        """Some of them, with the same targets."""
        if isinstance(self.dataset, Subset):
            indices = [self.dataset.indices[each] for each in indices]
            return replace(self, dataset=replace(self.dataset, indices=indices))
        return replace(self, dataset=Subset(self.dataset, indices))

    def summed_loss(self, model: nn.Module, batch: Batch, indices: range, draw: int = 0) -> Tensor:
        """The loss of a batch, summed over the examples at `indices`.

        An error of the task's or model's own code is raised as it is, with a note.
        """
        try:
            if self.loss == "measurement":
                return self.task.measurement(model, batch)
            whole = self.dataset.dataset if isinstance(self.dataset, Subset) else self.dataset
            positions = [each + draw * len(whole) for each in self.positions[indices.start : indices.stop]]
            return self.task.train_loss(model, batch, Sampler(self.seed, positions) if self.loss == "drawn" else None)
        except Exception as error:
            if not isinstance(error, WherefromError):
                error.add_note(
                    f"wherefrom was computing the loss of {len(indices)} example(s) with {type(self.task).__name__}."
                )
            raise


class Loaded(NamedTuple, Generic[Batch]):
    """A batch on the device, and its tokens.

    Attributes:
        padding: which of them are real; nothing when all are.
        lengths: how many each example has, padding included, as its masks say or else the shapes of its tensors.
    """

    batch: Batch
    padding: tuple[Padding, ...]
    lengths: frozenset[int]


class Loader(Generic[Batch]):
    """Loads batches of examples; use it as a context, which ends its thread.

    Args:
        ahead: prepare the next batch in a thread; None does so for a GPU, whose work leaves the host idle.
        end: the position after the last example that is wanted; None is the dataset's end.
        model: that the task checks batches for.
    """

    def __init__(
        self,
        examples: Examples[Batch],
        device: torch.device,
        ahead: bool | None = None,
        end: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._examples, self._task, self._device, self._model = examples, examples.task, device, model
        self._end = len(examples) if end is None else end
        ahead = device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._coming: tuple[range, Future[Loaded[Batch]]] | None = None

    def __enter__(self) -> Loader[Batch]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def load(self, batch_indices: range) -> Loaded[Batch]:
        """The examples at these positions as a batch on the device; as many after them are prepared meanwhile."""
        prepared = self._prepared(batch_indices)
        following = range(batch_indices.stop, min(batch_indices.stop + len(batch_indices), self._end))
        if self._thread is not None and following:
            self._coming = (following, self._thread.submit(self._prepare, following))
        # From pinned memory, the host does not wait for the copy.
        batch = cast(Batch, map_tensors(prepared.batch, self._moved))
        if self._model is not None:
            self._task.verify(self._model, batch)
        padding = (Padding(each.mask.to(self._device, non_blocking=True), each.tokens) for each in prepared.padding)
        return Loaded(batch, tuple(padding), prepared.lengths)

    def _prepared(self, batch_indices: range) -> Loaded[Batch]:
        coming, self._coming = self._coming, None
        if coming is not None:
            expected, future = coming
            if expected == batch_indices:
                return future.result()
            future.cancel()  # another batch size after memory ran out
        return self._prepare(batch_indices)

    def _prepare(self, batch_indices: range) -> Loaded[Batch]:
        """Collate on the host; what counts tokens is done here, so that nobody waits for the device to tell."""
        batch, masks = collated(self._examples, batch_indices, self._model)
        lengths = _lengths(masks or batch, len(batch_indices))
        if all(bool(mask.all()) for mask in masks):
            masks = ()
        padding = tuple(Padding(self._pinned(mask.unsqueeze(-1)), int(mask.sum())) for mask in masks)
        return Loaded(cast(Batch, map_tensors(batch, self._pinned)), padding, lengths)

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
    source: Examples[Batch], batch_indices: Sequence[int], model: nn.Module | None = None
) -> tuple[Batch, Sequence[Tensor]]:
    """A batch of some examples on the host, and the masks of its tokens.

    Errors of the dataset's and the task's own code are raised as they are, with a note of the example; our
    own say it in their message.

    Args:
        model: that the batch is checked for.

    Raises:
        InputError: an example does not suit the task or the model, or the task's masks are none.
    """
    task = source.task
    examples = [read_example(source.dataset, index) for index in batch_indices]
    try:
        return _batch(source, examples, model)
    except Exception as error:
        known = [source.positions[index] for index in batch_indices]
        where, cause = f"examples {known[0]} to {known[-1]}", error
        for position, example in zip(known, examples, strict=True):
            alone = _failure(source, example, model)
            if alone is not None:
                where, cause = f"example {position}", alone
                break
        if isinstance(cause, WherefromError):
            raise InputError(f"{where.capitalize()} of the dataset: {cause}") from cause
        cause.add_note(f"wherefrom was collating {where} with {type(task).__name__}.")
        raise cause from None


def token_counts(source: Examples[Batch], model: nn.Module) -> list[int]:
    """How many tokens the loss of each example, or the measurement, is a sum over; 1 without tokens."""
    count = source.task.counted if source.loss == "measurement" else source.task.trained
    return [count(model, collated(source, [index], model)[0]) for index in range(len(source))]


def _batch(
    source: Examples[Batch], examples: Sequence[object], model: nn.Module | None
) -> tuple[Batch, Sequence[Tensor]]:
    task = source.task
    batch = task.collate(examples if model is None else [task.select(model, example) for example in examples])
    masks = task.measured_masks(batch) if source.loss == "measurement" else task.masks(batch)
    _check_masks(task, masks, len(examples))
    if model is not None:
        task.check(model, batch)
    return batch, masks


def _failure(source: Examples[Batch], example: object, model: nn.Module | None) -> Exception | None:
    """Why no batch can be made of one example; None when it can."""
    try:
        _batch(source, [example], model)
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


def _lengths(batch: object, examples: int) -> frozenset[int]:
    """The second dimension of every tensor [examples, tokens, ...] of a batch."""
    shapes: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    map_tensors(batch, note)
    return frozenset(shape[1] for shape in shapes if len(shape) > 1 and shape[0] == examples)


def map_tensors(batch: object, function: Callable[[Tensor], Tensor]) -> object:
    """A batch with a function applied to all tensors in its dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(value, function) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [map_tensors(value, function) for value in batch]
        make = getattr(type(batch), "_make", type(batch))  # of named tuples
        return make(values)
    return batch
