"""The sweep: one pass of a model over a dataset that hands every tracked layer's tensors to a collector.

Batches, progress, resuming, out-of-memory back-off, several processes and the profile are written here once; a
collector is tensor algebra on what it is handed. The sweep does not know what is collected or what it is for.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor, nn

from wherefrom.engine.capture import Capture, Captured, Receiver
from wherefrom.engine.layers import TrackedLayer
from wherefrom.engine.loading import Loader, Rows, collated, positions
from wherefrom.engine.nonfinite import NotFiniteError, Search, check_sums, named_examples
from wherefrom.engine.operation_count import operation_counter
from wherefrom.runtime.compiling import compiled_activations
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import MemoryLimitError, WherefromError
from wherefrom.runtime.memory import Footprint, SavedBytes, halved, out_of_memory, shortage, usable_memory
from wherefrom.runtime.placement import execution_device, is_sharded_module
from wherefrom.runtime.precision import Precision
from wherefrom.runtime.profile import Profile
from wherefrom.runtime.progress import progress_bar
from wherefrom.runtime.signals import HeldSignals, held_signals
from wherefrom.store.artifacts import Partial
from wherefrom.store.fingerprint import Dataset
from wherefrom.tasks.task import Batch, Task

logger = logging.getLogger("wherefrom")

# Writing partial sums may take at most this part of the time.
_CHECKPOINT_SHARE = 0.05
# Losses are looked at in groups, so that a GPU is not waited for after every batch.
_LOSSES_PER_CHECK = 16

Objective = Callable[[nn.Module, Batch, Sequence[int]], Tensor]
"""The summed loss of a batch, given the model, the batch and the dataset positions of its rows."""


class Collector(ABC):
    """Adds up what a sweep hands it.

    Attributes:
        sums: named tensors, zero at the start; all that there is to save, restore or reset.
    """

    sums: dict[str, Tensor]

    @abstractmethod
    def collect(self, layer: str, captured: Captured, rows: slice) -> None:
        """Add one layer's share of the batch that holds the dataset positions `rows`."""

    def align(self, most: Callable[[int], int]) -> None:  # noqa: B027  (most sums have one size in all processes)
        """Give `sums` the sizes that they have in other processes.

        Args:
            most: the largest of all processes' numbers.
        """

    def release(self) -> None:  # noqa: B027  (most collectors keep nothing)
        """Give back what was kept from one batch for the next: memory has run out."""


@dataclass(frozen=True)
class Sweep(Generic[Batch]):
    """What all sweeps of a study have in common.

    Attributes:
        layers: the tracked layers by name.
        precision: how the model's passes multiply.
        progress: show a progress bar; None shows one when the standard error is a terminal.
        checkpoint_seconds: how often partial sums are written to disk, at the most; 0 is after every batch.
        compile_activations: run activation functions through torch.compile.
        offload_factors: keep covariances, eigenvectors and eigenvalues on the host.
        memory_budget: bytes that may be taken beyond what is there at the start; None is most of what is free.
        said: what the log is not to repeat.
    """

    model: nn.Module
    task: Task[Batch]
    layers: Mapping[str, TrackedLayer]
    profile: Profile = field(default_factory=Profile)
    precision: Precision = field(default_factory=Precision)
    progress: bool | None = None
    checkpoint_seconds: float = 60.0
    memory_budget: int | None = None
    compile_activations: bool = False
    offload_factors: bool = False
    said: set[str] = field(default_factory=set)

    @property
    def ranks(self) -> Ranks:
        """The processes that share each sweep; they may have joined after a study was made."""
        return Ranks.current()

    @property
    def device(self) -> torch.device:
        """Where the model computes, or the first of its parts."""
        return execution_device(self.model)

    @property
    def factors_device(self) -> torch.device:
        """Where factors are kept."""
        return torch.device("cpu") if self.offload_factors else self.device

    def pinned(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors that are kept on the host for a GPU, in memory that it copies from while the host goes on."""
        copied = self.device.type == "cuda" and self.factors_device.type == "cpu"
        return {name: each.pin_memory() if copied else each for name, each in factors.items()}

    @property
    def lockstep(self) -> bool:
        """Whether the model's weights are sharded over processes, so that all must pass through it together."""
        return any(is_sharded_module(module) for module in self.model.modules())

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in: float32, or float64 for a float64 model."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def run(
        self,
        name: str,
        dataset: Dataset[object],
        collector: Collector,
        objective: Objective[Batch],
        *,
        batch_size: int | None = None,
        smallest_batch: int = 1,
        partial: Partial | None = None,
    ) -> None:
        """Pass over the whole dataset once, in its order; on several processes, each over its share.

        Afterwards every process has the sums over all examples.

        Args:
            name: what the progress bar and the profile call this sweep.
            batch_size: None finds one from the free memory.
            smallest_batch: how far the size may go down when memory runs out.
            partial: where sums are kept for resuming; None for a sweep that is quick to repeat.

        Raises:
            LossError: a loss, an activation, a gradient or a sum of their products is not finite; the batch and
                the layer are named.
            MemoryLimitError: the smallest batch does not fit.
            RankError: another process has stopped.
        """
        rows = self.ranks.share(len(dataset))
        next_save = time.perf_counter() + self.checkpoint_seconds
        state = _State(name, collector, partial, rows, positions(dataset), next_save)
        # Where every pass takes all processes, one that fails must end, and the others with it, rather than wait here.
        with nullcontext() if self.lockstep else self.ranks.agreeing():
            stored = state.restore()
            if batch_size is None and (stored is None or self.lockstep):
                batch_size = self._suggested_batch_size(dataset, objective)
            # A resumed sweep keeps the size that it had, so that its sums are the same to the last bit.
            self._searched_pass(state, dataset, objective, stored or batch_size or 1, smallest_batch)
        with self.profile.action(f"{name}: sum over processes"):
            collector.align(self.ranks.most)
            self.ranks.all_reduce(collector.sums.values())
        if self.ranks.count > 1:
            check_sums(name, collector.sums)

    def _searched_pass(
        self, state: _State, dataset: Dataset[object], objective: Objective[Batch], size: int, smallest_batch: int
    ) -> None:
        """A pass; when something in it is not finite, once more since the last save, to say in which layer."""
        try:
            return self._pass(state, dataset, objective, size, smallest_batch)
        except NotFiniteError as error:
            found = error
        if not self.lockstep:  # or the others would not take part
            state.search = Search(state.name, self.layers, state.collector.sums)
            self._pass(state, dataset, objective, state.restore() or size, smallest_batch)
        raise found

    def _pass(
        self, state: _State, dataset: Dataset[object], objective: Objective[Batch], size: int, smallest_batch: int
    ) -> None:
        """This process's share of a sweep."""
        start, end = time.perf_counter(), state.share.stop
        batches = -(-(end - state.position) // size)
        idle = self.ranks.most(batches) - batches if self.lockstep else 0
        shown = self.progress if self.ranks.is_main else False
        with (
            progress_bar(state.name, len(state.share), shown) as show,
            self._loader(dataset, end) as loader,
            self._compiled(),
            held_signals() as held,
        ):
            while state.position < end:
                rows = range(state.position, min(state.position + size, end))
                if self._fits(state, loader, rows, objective):
                    self._checkpoint(state, size, held)
                else:
                    state.collector.release()
                    size = halved(state.tried, smallest_batch, state.name, state.shortage, self.device)
                    state.restore()
                show(state.position - state.share.start)
        for _ in range(idle):
            self.probe(dataset, 0, objective, lambda layer, captured: None)
        state.check()
        self.profile.processed(state.name, state.examples, state.tokens, time.perf_counter() - start)

    def footprint(self, dataset: Dataset[object], objective: Objective[Batch]) -> Footprint:
        """What an example takes, measured on the longest of a few."""
        samples = range(0, len(dataset), max(1, len(dataset) // 32))
        row = max(samples, key=lambda row: _numel(collated(self.task, dataset, [row], self.model)[0]))
        tokens: dict[str, int] = {}
        gradient_bytes = [1]

        def receive(layer: str, captured: Captured) -> None:
            tokens[layer] = captured.gradients.shape[1]
            gradient_bytes.append(captured.bytes_each)

        saved, counter, copies = SavedBytes(self.model), operation_counter(), 1
        with counter:
            self.probe(dataset, row, objective, receive, saved=saved)
        if self.compile_activations:
            # Apart from the counter, under which nothing is compiled, then or later. Of two examples if they fit, since
            # what is compiled for one is compiled for that size alone.
            saved, copies = SavedBytes(self.model), 2 if 2 * saved.total < self.usable_memory() else 1
            with self._compiled():
                self.probe(Rows(dataset, [row] * copies), 0, objective, receive, copies, saved)
        return Footprint(
            tokens=max(tokens.values(), default=1),
            saved_bytes=max(1, saved.total // copies),
            gradient_bytes=max(gradient_bytes),
            flop=counter.get_total_flops(),
            layer_tokens=tokens,
            shared_bytes=saved.shared,
            largest_bytes=saved.largest // copies,
        )

    def _compiled(self) -> AbstractContextManager[None]:
        """Activation functions as the sweep runs them."""
        return compiled_activations(self.model) if self.compile_activations else nullcontext()

    def usable_memory(self) -> int:
        """Bytes to plan with on the model's device."""
        return usable_memory(self.device, self.memory_budget)

    def _suggested_batch_size(self, dataset: Dataset[object], objective: Objective[Batch]) -> int:
        return self.footprint(dataset, objective).batch_size(len(dataset), self.usable_memory(), self.device)

    def probe(
        self,
        dataset: Dataset[object],
        first: int,
        objective: Objective[Batch],
        receive: Receiver,
        examples: int = 1,
        saved: SavedBytes | None = None,
    ) -> None:
        """Pass over one example alone, or over a few from one on as a batch.

        Args:
            saved: counts what the forward pass keeps for the backward pass.
        """
        rows = range(first, first + examples)
        with self._loader(dataset, rows.stop) as loader:
            batch, padding = loader.load(rows)

        def loss() -> Tensor:
            value = self._loss(objective, batch, rows)
            if saved is not None:
                for each in capture.held():
                    saved.count(each)
            return value

        counting = saved.counting() if saved else nullcontext()
        with Capture(self.model, self.layers, receive) as capture, self.precision.passes(self.device), counting:
            capture.run(loss, examples, padding)

    def _loss(self, objective: Objective[Batch], batch: Batch, rows: Sequence[int]) -> Tensor:
        """The objective; an error of the task's or model's own code is raised as it is, with a note."""
        try:
            return objective(self.model, batch, rows)
        except Exception as error:
            if not isinstance(error, WherefromError):
                name = type(self.task).__name__
                error.add_note(f"wherefrom was computing the loss of {len(rows)} example(s) with {name}.")
            raise

    def _loader(self, dataset: Dataset[object], end: int) -> Loader[Batch]:
        return Loader(self.task, dataset, self.device, end=end, model=self.model)

    def _fits(self, state: _State, loader: Loader[Batch], rows: range, objective: Objective[Batch]) -> bool:
        """Process one batch; False when there was not enough memory for it."""
        try:
            self._process(state, loader, rows, objective)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            state.tried.append(len(rows))
            state.shortage = shortage(error, self.device)
            if self.lockstep:
                raise MemoryLimitError(
                    f"{state.name}: a batch of {len(rows)} examples does not fit into memory, and processes that share "
                    "a model's weights cannot try smaller ones by themselves. Give a smaller batch size."
                ) from error
            return False
        return True

    def _process(self, state: _State, loader: Loader[Batch], rows: range, objective: Objective[Batch]) -> None:
        action = self.profile.action
        with action(f"{state.name}: load batch"):
            batch, padding = loader.load(rows)
        tokens = 0

        def receive(layer: str, captured: Captured) -> None:
            nonlocal tokens
            tokens = max(tokens, captured.tokens)
            with action(f"{state.name}: collect"), self.precision.paused():
                state.collect(layer, captured, rows)

        with (
            Capture(self.model, self.layers, receive, self.precision.operand) as capture,
            action(f"{state.name}: forward and backward"),
            self.precision.passes(self.device),
        ):
            loss = capture.run(lambda: self._loss(objective, batch, rows), len(rows), padding)
        state.advance(rows, tokens, loss)

    def _checkpoint(self, state: _State, size: int, held: HeldSignals) -> None:
        """Save partial sums when it is time to, or when a signal asks this process to stop."""
        stopping = held.received
        if state.partial is not None and (stopping or time.perf_counter() >= state.next_save):
            state.check()
            start = time.perf_counter()
            with self.profile.action(f"{state.name}: save partial sums"):
                state.partial.save(state.collector.sums, state.position, size)
            end = time.perf_counter()
            if self.checkpoint_seconds > 0:
                state.next_save = end + max(self.checkpoint_seconds, (end - start) / _CHECKPOINT_SHARE)
        if stopping:
            done = f"{state.position - state.share.start:,} of {len(state.share):,} examples"
            saved = "their sums are saved" if state.partial else "this sweep, a quick one, will be repeated"
            logger.warning(
                f"{state.name}: {stopping.name} after {done}; {saved}. The same call, without overwrite, goes on."
            )
            held.deliver()


@dataclass
class _State:
    """How far one sweep has come.

    Attributes:
        share: the dataset positions that are to be passed over here.
        positions: where each example stands in the dataset that the user knows.
        position: the first that is not done.
        search: looks for what is not finite, when something is not.
        tried: sizes of batches that did not fit into memory; shortage: what was said of the last.
    """

    name: str
    collector: Collector
    partial: Partial | None
    share: range
    positions: Sequence[int]
    next_save: float
    position: int = 0
    examples: int = 0
    tokens: int = 0
    losses: list[tuple[range, Tensor]] = field(default_factory=list)
    search: Search | None = None
    tried: list[int] = field(default_factory=list)
    shortage: str = ""

    def restore(self) -> int | None:
        """Go back to the sums on disk, or to zero; the batch size that they were made with, if any."""
        for total in self.collector.sums.values():
            total.zero_()
        self.losses.clear()
        if self.search is not None:
            self.search.forget()
        stored = self.partial.load(self.collector.sums) if self.partial else None
        self.position, size = stored or (self.share.start, None)
        return size

    def collect(self, layer: str, captured: Captured, rows: range) -> None:
        """Hand one layer's share of a batch to the collector."""
        if self.search is None or self.search.wanted(layer, captured):
            self.collector.collect(layer, captured, slice(rows.start, rows.stop))
            if self.search is not None:
                self.search.collected(layer, captured)

    def advance(self, rows: range, tokens: int, loss: Tensor) -> None:
        """Count a finished batch."""
        if self.search is not None:
            self.search.finish(self.positions[rows.start : rows.stop], loss)
        self.position = rows.stop
        self.examples += len(rows)
        self.tokens += tokens
        self.losses.append((rows, loss))
        if len(self.losses) == _LOSSES_PER_CHECK:
            self._check_losses()

    def check(self) -> None:
        """Raise NotFiniteError if a loss or a sum is not finite; called before anything is kept."""
        self._check_losses()
        check_sums(self.name, self.collector.sums)

    def _check_losses(self) -> None:
        batches, losses = [rows for rows, _ in self.losses], [loss for _, loss in self.losses]
        self.losses.clear()
        if not losses or bool(torch.stack(losses).isfinite().all()):
            return
        rows, loss = next(pair for pair in zip(batches, losses, strict=True) if not pair[1].isfinite())
        raise NotFiniteError(
            f"{self.name}: the loss of {named_examples(self.positions[rows.start : rows.stop])} is {loss.item()}. Look "
            "at these examples and at the model's output for them; nothing of this batch was kept."
        )


def _numel(batch: object) -> int:
    """How many numbers the largest tensor of a batch holds."""
    if isinstance(batch, Tensor):
        return batch.numel()
    values: Iterable[object] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, list | tuple):
        values = batch
    return max(map(_numel, values), default=0)
