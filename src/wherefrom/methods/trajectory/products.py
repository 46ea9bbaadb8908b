"""Dot products of gradients at the checkpoints of a training: of drawn losses, of training examples, and of queries.

Layers are taken as many at a time as memory has room for their gradients, whole and of all examples; the model is swept
again for the next ones. This module knows checkpoints and sweeps; it does not know what the products are for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from wherefrom.engine.loading import Examples, Repeated
from wherefrom.engine.sweep import Sweep
from wherefrom.methods.method import Context
from wherefrom.methods.trajectory.directions import ConditionedGradients, Directions
from wherefrom.runtime.memory import within_memory
from wherefrom.store.artifacts import Partial
from wherefrom.store.cache import Unfinished
from wherefrom.tasks.task import Batch

# Of the usable memory, for gradients; the rest is for the passes.
_SHARE = 0.5
# Draws that are multiplied with all before them at a time.
_DRAWS = 1024


@dataclass(frozen=True)
class Visits:
    """The training examples whose gradients are taken at a checkpoint, by their positions, int64 [visits]."""

    checkpoint: Path
    examples: Tensor


@dataclass(frozen=True)
class TrajectoryProducts(Generic[Batch]):
    """Dot products g^T P g' at the checkpoints of a training.

    Attributes:
        visits: by checkpoint; the last is where gradients of queries are taken.
        draws: losses with drawn targets for each visit: those of a checkpoint's examples, then the second ones.
        scaling: P^(1/2) [out, in] of each layer.
        directions: in which gradients of each layer are taken.
    """

    context: Context[Batch]
    visits: Sequence[Visits]
    draws: int
    seed: int
    scaling: Mapping[str, Tensor]
    directions: Mapping[str, Directions]

    def compute(self, queries: Examples[Batch], result: Unfinished, among_draws: bool) -> dict[str, Tensor]:
        """Those of `queries` with draws [queries, draws] and `pairs` with visits [queries, visits].

        Args:
            result: goes on where an interrupted run was.
            among_draws: also of draws with each other, `draws` [draws, draws], and with visits, `train` [draws,
                visits].
        """
        sweep, count = self.context.sweep, len(queries)
        visits = sum(len(each.examples) for each in self.visits)
        drawn = self.draws * visits
        shapes = {"queries": (count, drawn), "pairs": (count, visits)}
        if among_draws:
            shapes |= {"draws": (drawn, drawn), "train": (drawn, visits)}
        sums = {name: torch.zeros(shape, dtype=sweep.dtype, device=sweep.device) for name, shape in shapes.items()}
        done, _ = result.sums.load(sums) or (0, 1)
        advice = "Give fewer draws, or fewer queries."
        with within_memory("Dot products of all draws do", sweep.device, advice):
            for some in self._blocks(done, drawn + visits + count):
                part = self._gradients(queries, list(sweep.layers)[some.start : some.stop], _partial(result, some))
                _add(sums, part["drawn"], part["train"], part["queries"])
                result.sums.save(sums, some.stop, 1)
        if among_draws:  # of each pair, one of the two was made
            sums["draws"] = sums["draws"].tril() + sums["draws"].tril(-1).T
        return sums

    def _blocks(self, done: int, examples: int) -> Iterator[range]:
        """Runs of layers whose gradients are in memory together."""
        sweep = self.context.sweep
        sizes = [self._numbers(name) * examples * sweep.dtype.itemsize for name in sweep.layers]
        usable = _SHARE * sweep.ranks.least(sweep.usable_memory())
        while done < len(sizes):
            stop = done + 1
            while stop < len(sizes) and sum(sizes[done : stop + 1]) <= usable:
                stop += 1
            yield range(done, stop)
            done = stop

    def _gradients(self, queries: Examples[Batch], names: Sequence[str], partial: Partial) -> dict[str, Tensor]:
        """Those of some layers, of `drawn` [draws, numbers], `train` [visits, numbers] and `queries`."""
        context = self.context
        sweep = replace(context.sweep, layers={name: context.sweep.layers[name] for name in names})
        numbers, visits = sum(map(self._numbers, names)), sum(len(each.examples) for each in self.visits)
        sizes = {"drawn": self.draws * visits, "train": visits, "queries": len(queries)}
        found = {
            name: torch.zeros(size, numbers, dtype=sweep.dtype, device=sweep.device) for name, size in sizes.items()
        }
        done, _ = partial.load(found) or (0, 1)
        next_save, start = time.monotonic() + sweep.execution.checkpoint_seconds, 0
        for number, each in enumerate(self.visits):
            stop = start + len(each.examples)
            if number >= done and len(each.examples):
                with context.states.entered(each.checkpoint):
                    drawn = found["drawn"][self.draws * start : self.draws * stop]
                    self._sweep(sweep, "drawn gradients", self._drawn(number), drawn)
                    train = context.train.subset(each.examples.tolist())
                    self._sweep(sweep, "training gradients", train, found["train"][start:stop])
                if time.monotonic() >= next_save:
                    partial.save(found, number + 1, 1)
                    next_save = time.monotonic() + sweep.execution.checkpoint_seconds
            start = stop
        with context.states.entered(self.visits[-1].checkpoint):
            self._sweep(sweep, "query gradients", queries, found["queries"])
        return found

    def _sweep(self, sweep: Sweep[Batch], name: str, examples: Examples[Batch], into: Tensor) -> None:
        execution = sweep.execution
        size = execution.query_batch_size if examples.loss == "measurement" else execution.train_batch_size
        collector = ConditionedGradients(sweep.layers, self.scaling, self.directions, into)
        sweep.run(name, examples, collector, batch_size=size)

    def _numbers(self, layer: str) -> int:
        """How many a layer's gradient has."""
        return math.prod(self.directions[layer].shape(self.context.sweep.layers[layer]))

    def _drawn(self, number: int) -> Examples[Batch]:
        """The visits at a checkpoint, with targets of their own at each."""
        train, total = self.context.train, len(self.context.train)
        # The k-th draw at a checkpoint is that of examples `number + k checkpoints` data sets on.
        repeated = Repeated(train.dataset, len(self.visits))
        drawn = replace(train, dataset=repeated, loss="drawn", seed=self.seed, draws=self.draws)
        return drawn.subset([total * number + each for each in self.visits[number].examples.tolist()])


def _partial(result: Unfinished, block: range) -> Partial:
    """Of the gradients of some layers: another memory cuts other blocks."""
    file = f"{result.name}.partial.{block.start}-{block.stop}{result.ranks.suffix}.safetensors"
    return replace(result.sums, path=result.sums.path.with_name(file))


def _add(sums: Mapping[str, Tensor], drawn: Tensor, train: Tensor, queries: Tensor) -> None:
    """Add the products of some layers' gradients; of draws with each other, those on and below the diagonal."""
    sums["queries"].addmm_(queries, drawn.T)
    sums["pairs"].addmm_(queries, train.T)
    if "draws" in sums:
        sums["train"].addmm_(drawn, train.T)
        for start in range(0, len(drawn), _DRAWS):
            stop = min(start + _DRAWS, len(drawn))
            sums["draws"][start:stop, :stop].addmm_(drawn[start:stop], drawn[:stop].T)
