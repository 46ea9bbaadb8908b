"""Several processes on one study: whose part of a dataset is which, sums over all of them, and one that writes.

torchrun starts the processes; each runs the same program on the same model and data ("data parallel"). A sweep gives
every process a run of examples and adds up what they have collected, so a result does not depend on their number but by
rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import accumulate
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from wherefrom.runtime.errors import InputError, RankError, WherefromError, first_line

Value = TypeVar("Value")

# How long processes wait for each other, where torch.distributed would give up after half an hour.
_PATIENCE = timedelta(weeks=2)


def join_ranks() -> torch.device:
    """Join the other processes that torchrun has started; without torchrun, do nothing.

    Call it before the model is moved to its device. A program that has initialised torch.distributed itself, as
    transformers' Trainer does, need not call it. At the end of the program the processes part by themselves; with a
    model that `fully_shard` has spread, call `torch.distributed.destroy_process_group()` as PyTorch wants it.

    Returns:
        The device of this process: its own GPU if there are any, else the CPU.

    Raises:
        InputError: this machine has fewer GPUs than processes.
    """
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"torchrun has started process {local} on a machine with {torch.cuda.device_count()} GPU(s): pass "
            "--nproc_per_node with at most as many."
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(_leave)
    return device


def _leave() -> None:
    """At the end of a program that has not left by itself: or gloo's threads may abort a process that is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """The processes that share a study; by default, one alone.

    Attributes:
        index: of this process ("rank"); number 0 writes files and shows progress.
        count: how many there are ("world size").
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch.distributed, if it is in use."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.index == 0

    @property
    def suffix(self) -> str:
        """What sets apart the files of this process; nothing when it is alone."""
        return "" if self.count == 1 else f"-{self.index}of{self.count}"

    def check_alone(self, what: str) -> None:
        """Refuse work that is for one process, with a `RankError`."""
        if self.count > 1:
            raise RankError(f"{what} on {self.count} processes: expected one. Start it without torchrun.")

    def share(self, total: int) -> range:
        """This process's run of `total` examples; runs differ by one example at most, and may be empty."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def share_of(self, costs: Mapping[str, float]) -> list[str]:
        """This process's part of things that cost unequally: neighbours stay together, sums are about equal."""
        ends = accumulate(costs.values())
        middles = {name: end - costs[name] / 2 for name, end in zip(costs, ends, strict=True)}
        whole = sum(costs.values())
        return [name for name, middle in middles.items() if int(self.count * middle / whole) == self.index]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, which every process has in the same order, by their sums over all processes."""
        if self.count == 1:
            return
        with _collective():
            for tensor in tensors:
                dist.all_reduce(tensor, group=_group_of(tensor))

    def all_gather(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Every process's named tensors together, on `device`."""
        if self.count == 1:
            return dict(tensors)
        found: dict[str, Tensor] = {}
        described = self._all({name: (each.shape, each.dtype) for name, each in tensors.items()})
        with _collective():
            for owner, names in enumerate(described):
                for name, (shape, dtype) in names.items():
                    mine = owner == self.index
                    found[name] = tensors[name].contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
                    dist.broadcast(found[name], owner, group=_group_of(found[name]))
        return found

    def most(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return max(self._all(number))

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        return min(self._all(number))

    def first(self, action: Callable[[], Value]) -> Value:
        """Once all have come so far, let the main process act; what it returns or raises, all return or raise."""
        self._all(None)  # or it might delete what another still reads
        found: Value | None = None
        with self.agreeing():
            if self.is_main:
                found = action()
        return cast(Value, self._all(found)[0])

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Wait for all at the end; an error in one process becomes an error, of the same kind, in all."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1 or isinstance(error, RankError):
                raise
            mine = error
        errors = self._all(None if mine is None else _portable(mine))
        if mine is not None:
            raise mine
        for index, theirs in enumerate(errors):
            if theirs is not None:
                raise type(theirs)(f"Process {index} of {self.count}: {theirs}")

    def check_alike(self, name: str, value: str) -> None:
        """Raise a `RankError` if another process has another value."""
        values = self._all(value)
        other = next((index for index, each in enumerate(values) if each != values[0]), None)
        if other is not None:
            raise RankError(
                f"{name}: process 0 of {self.count} has {values[0]}, process {other} has {values[other]}. All "
                "processes need the same model and data: load the same checkpoint, and make data with the same seed."
            )

    def _all(self, mine: Value) -> list[Value]:
        """Every process's value."""
        if self.count == 1:
            return [mine]
        found: list[Value] = [mine] * self.count
        with _collective():
            dist.all_gather_object(found, mine, group=_control_group())
        return found


def _portable(error: Exception) -> WherefromError:
    """An error that another process can raise."""
    return error if isinstance(error, WherefromError) else RankError(f"{type(error).__name__}: {error}")


@cache
def _control_group() -> dist.ProcessGroup:
    """For messages between processes: on the host, where a lost process is noticed at once, and a slow one waited for.

    Shares of a sweep may take unequal times: sequences are of unequal lengths, devices of unequal speeds.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return group


def _group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    """The processes, in a group that can send this tensor: NCCL sends none that lie on the host."""
    return _control_group() if tensor.device.type == "cpu" else None


@contextmanager
def _collective() -> Iterator[None]:
    """Say in our words that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"Another process of this run has stopped ({first_line(error)}). See its own message; then start "
            "the run again with the same command: what is finished is stored, and saved sums are taken up."
        ) from error
