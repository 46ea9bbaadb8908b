"""The sweep: one pass of a model over examples that hands every tracked layer's tensors to a collector.

Batches, progress, resuming, out-of-memory back-off, several processes and the profile are written here once; a
collector is tensor algebra on what it is handed. The sweep does not know what is collected or what it is for.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Generic

import torch
from torch import Tensor, nn

from wherefrom.engine.capture import Capture, Captured, Receiver
from wherefrom.engine.execution import Execution
from wherefrom.engine.loading import Examples, Loader, collated
from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.nonfinite import NotFiniteError, Search, check_sums, named_examples
from wherefrom.engine.operation_count import operation_counter
from wherefrom.runtime.compiling import compiled_activations
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import MemoryLimitError
from wherefrom.runtime.memory import Footprint, SavedBytes, halved, out_of_memory, shortage, usable_memory
from wherefrom.runtime.placement import execution_device, is_sharded_module
from wherefrom.runtime.precision import HalfPrecision, Precision
from wherefrom.runtime.profile import Profile
from wherefrom.runtime.progress import progress_bar
from wherefrom.runtime.signals import HeldSignals, held_signals
from wherefrom.store.artifacts import Partial
from wherefrom.tasks.task import Batch, Task

logger = logging.getLogger("wherefrom")

# Writing partial sums may take at most this part of the time.
_CHECKPOINT_SHARE = 0.05
# Losses are looked at in groups, so that a GPU is not waited for after every batch.
_LOSSES_PER_CHECK = 16
# Examples in which a layer may run that has not in the others.
_MOST_LOOKED_AT = 8


class Collector(ABC):
    """Adds up what a sweep hands it.

    Attributes:
        sums: named tensors, zero at the start; all that there is to save, restore or reset.
    """

    sums: dict[str, Tensor]

    @abstractmethod
    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        """Add one layer's share of the examples at the positions `batch`."""

    def align(self, most: Callable[[int], int]) -> None:  # noqa: B027  (most sums have one size in all processes)
        """Give `sums` the sizes that they have in other processes.

        Args:
            most: the largest of all processes' numbers.
        """

    def release(self) -> None:  # noqa: B027  (most collectors keep nothing)
        """Give back what was held from one batch for the next: memory has run out."""


@dataclass(frozen=True)
class Sweep(Generic[Batch]):
    """What all sweeps of a study have in common.

    Attributes:
        layers: the tracked layers by name.
        logged: what the log is not to repeat.
        flattened: layers whose flattened inputs are known to be example by example.
        watched: layers whose weights are known to be used by their modules alone.
    """

    model: nn.Module
    task: Task[Batch]
    layers: Mapping[str, TrackedLayer]
    execution: Execution = field(default_factory=Execution)
    profile: Profile = field(default_factory=Profile)
    logged: set[str] = field(default_factory=set)
    flattened: set[str] = field(default_factory=set)
    watched: set[str] = field(default_factory=set)

    @cached_property
    def precision(self) -> Precision:
        """How the model's passes multiply."""
        return HalfPrecision(self.device) if self.execution.half_precision else Precision(self.dtype)

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
        """Where factors are."""
        return torch.device("cpu") if self.execution.offload_factors else self.device

    def pinned(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors that are offloaded for a GPU, in memory that it copies from while the host goes on."""
        copied = self.device.type == "cuda" and self.factors_device.type == "cpu"
        return {name: each.pin_memory() if copied else each for name, each in factors.items()}

    @property
    def lockstep(self) -> bool:
        """Whether the model's weights are sharded over processes, so that all must pass through it together."""
        return any(is_sharded_module(module) for module in self.model.modules())

    @property
    def dtype(self) -> torch.dtype:
        """The type of sums: float32, or float64 for a float64 model."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def run(
        self,
        name: str,
        examples: Examples[Batch],
        collector: Collector,
        *,
        batch_size: int | None = None,
        smallest_batch: int = 1,
        partial: Partial | None = None,
    ) -> None:
        """Pass over all examples once, in their order; on several processes, each over its share.

        Afterwards every process has the sums over all examples.

        Args:
            name: what the progress bar and the profile call this sweep.
            batch_size: None finds one from the free memory.
            smallest_batch: how far the size may go down when memory runs out.
            partial: where sums are saved for resuming; None for a sweep that is quick to repeat.

        Raises:
            LossError: a loss, an activation, a gradient or a sum of their products is not finite; the batch and
                the layer are named.
            MemoryLimitError: the smallest batch does not fit.
            RankError: another process has stopped.
        """
        next_save = time.perf_counter() + self.execution.checkpoint_seconds
        state = _State(name, examples, collector, partial, self.ranks.share(len(examples)), next_save)
        # Where every pass takes all processes, one that fails must end, and the others with it, rather than wait here.
        with nullcontext() if self.lockstep else self.ranks.agreeing():
            stored = state.restore()
            if batch_size is None and (stored is None or self.lockstep):
                batch_size = self.footprint(examples).batch_size(len(examples), self.usable_memory(), self.device)
            # A resumed sweep has the size that it had, so that its sums are the same to the last bit.
            size = stored or batch_size or 1
            try:
                self._pass(state, size, smallest_batch)
            except NotFiniteError:
                if not self.lockstep:  # or the others would not take part
                    # Once more since the last save, to say in which layer.
                    state.search = Search(name, self.layers, collector.sums)
                    self._pass(state, state.restore() or size, smallest_batch)
                raise
        with self.profile.action(f"{name}: sum over processes"):
            collector.align(self.ranks.most)
            self.ranks.all_reduce(collector.sums.values())
        if self.ranks.count > 1:
            check_sums(name, collector.sums)

    def _pass(self, state: _State[Batch], size: int, smallest_batch: int) -> None:
        """This process's share of a sweep; in smaller batches when memory runs out."""
        start, end = time.perf_counter(), state.share.stop
        batches = -(-(end - state.position) // size)
        idle = self.ranks.most(batches) - batches if self.lockstep else 0
        shown = self.execution.progress if self.ranks.is_main else False
        with (
            progress_bar(state.name, len(state.share), shown) as show,
            Loader(state.examples, self.device, end=end, model=self.model) as loader,
            self._compiled(),
            held_signals() as held,
        ):
            while state.position < end:
                batch = range(state.position, min(state.position + size, end))
                try:
                    self._batch(state, loader, batch)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    size = self._smaller(state, len(batch), smallest_batch, error)
                else:
                    self._checkpoint(state, size, held)
                show(state.position - state.share.start)
        for _ in range(idle):
            self.probe(state.examples, lambda layer, captured: None)
        state.check()
        self.profile.processed(state.name, state.passed, state.tokens, time.perf_counter() - start)

    def _smaller(self, state: _State[Batch], tried: int, smallest: int, error: RuntimeError | MemoryError) -> int:
        """The batch size to go on with from the last save, after one that did not fit."""
        state.tried.append(tried)
        state.shortage = shortage(error, self.device)
        if self.lockstep:
            raise MemoryLimitError(
                f"{state.name}: a batch of {tried} examples does not fit into memory, and processes that share a "
                "model's weights cannot try smaller ones by themselves. Give a smaller batch size."
            ) from error
        state.collector.release()
        size = halved(state.tried, smallest, state.name, state.shortage, self.device)
        state.restore()
        return size

    def _batch(self, state: _State[Batch], loader: Loader[Batch], batch: range) -> None:
        """One forward and backward pass, whose tensors are collected.

        In a batch of as many examples as tokens, nobody could tell whether a layer has the examples first; it is passed
        over in two parts.
        """
        action, search, examples = self.profile.action, state.search, state.examples
        with action(f"{state.name}: load batch"):
            loaded, padding, lengths = loader.load(batch)
        if len(batch) > 1 and len(batch) in lengths and not self.lockstep:
            middle = batch.start + len(batch) // 2
            for part in (range(batch.start, middle), range(middle, batch.stop)):
                self._batch(state, loader, part)
            return
        tokens, positions = 0, slice(0)

        def loss(draw: int) -> Tensor:
            nonlocal positions
            positions = slice(draw * len(examples) + batch.start, draw * len(examples) + batch.stop)
            return examples.summed_loss(self.model, loaded, batch, draw)

        def receive(layer: str, captured: Captured) -> None:
            nonlocal tokens
            tokens = max(tokens, captured.tokens)
            with action(f"{state.name}: collect"), self.precision.paused():
                if search is None or search.wanted(layer, captured):
                    state.collector.collect(layer, captured, positions)
                    if search is not None:
                        search.collected(layer, captured)

        # That takes a backward pass more: in all processes, and not through what is compiled for one alone.
        flattened = None if self.lockstep or self.execution.compile_activations else self.flattened
        watched = flattened is not None and not self.watched.issuperset(self.layers)
        with (
            Capture(self.model, self.layers, receive, self.precision.operand, flattened, watched) as capture,
            action(f"{state.name}: forward and backward"),
            self.precision.passes(self.device),
        ):
            first, *others = (partial(loss, draw) for draw in range(examples.draws))
            value = capture.run(first, len(batch), padding, lengths, others)
        self.watched.update(self.layers if watched else ())
        state.advance(batch, tokens, value)

    def _checkpoint(self, state: _State[Batch], size: int, held: HeldSignals) -> None:
        """Save partial sums when it is time to, or when a signal asks this process to stop."""
        stopping = held.received
        if state.partial is not None and (stopping or time.perf_counter() >= state.next_save):
            state.check()
            start = time.perf_counter()
            with self.profile.action(f"{state.name}: save partial sums"):
                state.partial.save(state.collector.sums, state.position, size)
            end = time.perf_counter()
            if self.execution.checkpoint_seconds > 0:
                state.next_save = end + max(self.execution.checkpoint_seconds, (end - start) / _CHECKPOINT_SHARE)
        if stopping:
            done = f"{state.position - state.share.start:,} of {len(state.share):,} examples"
            saved = "their sums are saved" if state.partial else "this sweep, a quick one, will be repeated"
            logger.warning(
                f"{state.name}: {stopping.name} after {done}; {saved}. The same call, without overwrite, goes on."
            )
            held.deliver()

    def footprint(self, examples: Examples[Batch]) -> Footprint:
        """What an example takes, measured on the longest of a few."""
        samples = range(0, len(examples), max(1, len(examples) // 32))
        longest = max(samples, key=lambda index: _numel(collated(examples, [index], self.model)[0]))
        tokens = dict.fromkeys(self.layers, 0)
        gradient_bytes = [1]

        def receive(layer: str, captured: Captured) -> None:
            tokens[layer] = captured.gradients.shape[1]
            gradient_bytes.append(captured.bytes_each)

        saved, counter, copies = SavedBytes(self.model), operation_counter(), 1
        with counter:
            self.probe(examples.subset([longest]), receive, saved)
        if self.execution.compile_activations:
            # Apart from the counter, under which nothing is compiled, then or later. Of two examples if they fit, since
            # what is compiled for one is compiled for that size alone.
            saved, copies = SavedBytes(self.model), 2 if 2 * saved.total < self.usable_memory() else 1
            with self._compiled():
                self.probe(examples.subset([longest] * copies), receive, saved, copies)
        return Footprint(
            tokens=max(tokens.values(), default=1),
            saved_bytes=max(1, saved.total // copies),
            gradient_bytes=max(gradient_bytes),
            flop=counter.get_total_flops(),
            layer_tokens=tokens,
            shared_bytes=saved.shared,
            largest_bytes=saved.largest // copies,
        )

    def running(self, examples: Examples[Batch]) -> Mapping[str, TrackedLayer]:
        """The layers that run as modules, where nobody has named some; of those that are named, all have to.

        Of others, models may use the weights by functions, or not at all. It takes a forward pass over an example, and
        over a few more while there are layers that have not run.
        """
        if self.task.layers is not None:
            return self.layers
        few, ran = examples.subset(range(0, len(examples), -(-len(examples) // _MOST_LOOKED_AT))), set[str]()
        with (
            Loader(few, self.device, ahead=False, model=self.model) as loader,
            Capture(self.model, self.layers, lambda layer, captured: None) as capture,
            self.precision.passes(self.device),
        ):

            def ran_for(one: range) -> Set[str]:
                batch = loader.load(one).batch
                return capture.ran(lambda: few.summed_loss(self.model, batch, one))

            for position in range(len(few)):
                if len(ran) < len(self.layers):
                    ran |= ran_for(range(position, position + 1))
        return {name: layer for name, layer in self.layers.items() if name in ran} or self.layers

    def _compiled(self) -> AbstractContextManager[None]:
        """Activation functions as the sweep runs them."""
        return compiled_activations(self.model) if self.execution.compile_activations else nullcontext()

    def usable_memory(self) -> int:
        """Bytes to plan with on the model's device."""
        return usable_memory(self.device, self.execution.budget_bytes)

    def probe(
        self, examples: Examples[Batch], receive: Receiver, saved: SavedBytes | None = None, count: int = 1
    ) -> None:
        """Pass over the first examples alone, as a batch.

        Args:
            saved: counts what the forward pass holds for the backward pass.
        """
        batch = range(count)
        with Loader(examples, self.device, end=count, model=self.model) as loader:
            loaded, padding, lengths = loader.load(batch)

        def loss() -> Tensor:
            value = examples.summed_loss(self.model, loaded, batch)
            if saved is not None:
                for each in capture.held():
                    saved.count(each)
            return value

        counting = saved.counting() if saved else nullcontext()
        with Capture(self.model, self.layers, receive) as capture, self.precision.passes(self.device), counting:
            capture.run(loss, count, padding, lengths)


@dataclass
class _State(Generic[Batch]):
    """How far one sweep has come.

    Attributes:
        share: the positions that are to be passed over here.
        position: the first that is not done.
        passed, tokens: how many have been passed over.
        search: looks for what is not finite, when something is not.
        tried: sizes of batches that did not fit into memory; shortage: what was said of the last.
    """

    name: str
    examples: Examples[Batch]
    collector: Collector
    partial: Partial | None
    share: range
    next_save: float
    position: int = 0
    passed: int = 0
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

    def advance(self, batch: range, tokens: int, loss: Tensor) -> None:
        """Count a finished batch."""
        if self.search is not None:
            self.search.finish(self._positions(batch), loss)
        self.position = batch.stop
        self.passed += len(batch)
        self.tokens += tokens
        self.losses.append((batch, loss))
        if len(self.losses) == _LOSSES_PER_CHECK:
            self._check_losses()

    def check(self) -> None:
        """Raise NotFiniteError if a loss or a sum is not finite; called before anything is stored."""
        self._check_losses()
        check_sums(self.name, self.collector.sums)

    def _check_losses(self) -> None:
        batches, losses = [batch for batch, _ in self.losses], [loss for _, loss in self.losses]
        self.losses.clear()
        if not losses or bool(torch.stack(losses).isfinite().all()):
            return
        batch, loss = next(pair for pair in zip(batches, losses, strict=True) if not pair[1].isfinite())
        raise NotFiniteError(
            f"{self.name}: the loss of {named_examples(self._positions(batch))} is {loss.item()}. Look at these "
            "examples and at the model's output for them; nothing of this batch was stored."
        )

    def _positions(self, batch: range) -> Sequence[int]:
        """Where the examples of a batch stand in the dataset that the user knows."""
        return self.examples.positions[batch.start : batch.stop]


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
