"""Compressed gradients of a dataset on disk: made once, read block by block.

They lie in shards, each a result of its own, so that a killed build goes on with the shard that it was in; beside them
lie the projections that they were made with, which come first and refuse what is made from something else. This module
brings compressed gradients, sweeps and the cache together; it does not know what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic

import torch
from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Sweep
from wherefrom.methods.projected.projections import (
    GRADIENTS,
    CompressedGradients,
    Projection,
    parts,
    projections_from_tensors,
    projections_to_tensors,
)
from wherefrom.store.artifacts import Layout, Partial, check_layout
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.space import Step, check_space, used_bytes
from wherefrom.tasks.task import Batch

# Compressed gradients of a shard while they are added up, and what is read at a time.
_SHARD_BYTES, _BLOCK_BYTES = 2**28, 2**26
_PROJECTIONS = "projections"


@dataclass(frozen=True)
class StoredGradients(Generic[Batch]):
    """Compressed gradients of examples.

    Attributes:
        projections: of every layer.
        cache: where they are; nothing else is there.
        scales: as in `CompressedGradients`.
    """

    sweep: Sweep[Batch]
    examples: Examples[Batch]
    projections: Mapping[str, Projection]
    cache: Cache
    scales: Mapping[str, Tensor] | None = None

    @classmethod
    def made(
        cls,
        sweep: Sweep[Batch],
        examples: Examples[Batch],
        projections: Mapping[str, Projection],
        cache: Cache,
        scales: Mapping[str, Tensor] | None = None,
    ) -> StoredGradients[Batch]:
        """Those that are there, or made.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; finished shards stay valid.
        """
        stored = cls(sweep, examples, _as_made(projections, cache), cache, scales)
        cache.ranks.first(stored._check_disk)
        for shard in stored.shards:
            cache.get_or_compute(shard_name(shard), partial(stored._shard, shard))
        return stored

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.examples)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where each layer's numbers are in a compressed gradient."""
        return parts(self.projections)

    @property
    def size(self) -> int:
        """How many numbers a compressed gradient has."""
        return sum(each.size for each in self.projections.values())

    @cached_property
    def shards(self) -> list[range]:
        """Runs of examples that lie in a file; they depend on nothing but sizes."""
        count = max(1, _SHARD_BYTES // (self.size * self.sweep.dtype.itemsize))
        return [range(start, min(start + count, len(self))) for start in range(0, len(self), count)]

    def _check_disk(self) -> None:
        """Refuse to begin what there is too little disk space for; what is all there needs none."""
        folder, names = self.cache.folder, [shard_name(shard) for shard in self.shards]
        if all((folder / name).exists() for name in names):
            return
        stays = len(self) * self.size * self.sweep.dtype.itemsize
        sums = min(_SHARD_BYTES, len(self) * self.size * self.sweep.dtype.itemsize)
        step = Step("compressed gradients", stays, stays + 2 * self.cache.ranks.count * sums)
        begun = [path for name in names for path in (folder / name, *folder.glob(f"{name}.part*"))]
        check_space(folder, [step], used_bytes(begun))

    def _shard(self, shard: range, result: Unfinished) -> dict[str, Tensor]:
        return {GRADIENTS: self.of("compressed gradients", self.examples.subset(shard), result.sums)}

    def of(self, name: str, examples: Examples[Batch], sums: Partial | None = None) -> Tensor:
        """The compressed gradients of other examples, in memory: [examples, numbers].

        Args:
            name: of the sweep.
        """
        sweep = self.sweep
        collector = CompressedGradients(
            sweep.layers, self.projections, len(examples), sweep.dtype, sweep.device, self.scales
        )
        sweep.run(name, examples, collector, batch_size=sweep.execution.train_batch_size, partial=sums)
        return collector.sums[GRADIENTS]

    @cached_property
    def ranges(self) -> list[range]:
        """Runs of examples whose gradients are on the device together."""
        count = max(1, _BLOCK_BYTES // (self.size * self.sweep.dtype.itemsize))
        return [
            range(start, min(start + count, shard.stop))
            for shard in self.shards
            for start in range(shard.start, shard.stop, count)
        ]

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """Gradients some at a time, on the device: [some, numbers]."""
        for examples in self.ranges:
            yield examples, self.block(examples)

    def block(self, examples: range) -> Tensor:
        """Those of a run of examples of `ranges`, on the device: [examples, numbers]."""
        shard, gradients = next(each for each in self._mapped if examples.start in each[0])
        return gradients[examples.start - shard.start : examples.stop - shard.start].to(self.sweep.device)

    @cached_property
    def _mapped(self) -> list[tuple[range, Tensor]]:
        """The shards [examples, numbers], memory-mapped, after a look at all of their bytes."""
        found = []
        for shard in self.shards:
            artifact = self.cache.artifact(shard_name(shard))
            tensors = artifact.mapped()
            check_layout(artifact.path, tensors, {GRADIENTS: (self.sweep.dtype, (len(shard), self.size))})
            found.append((shard, tensors[GRADIENTS]))
        return found


def shard_name(shard: range) -> str:
    """What a shard is called."""
    return f"{shard.start}-{shard.stop}"


def _as_made(projections: Mapping[str, Projection], cache: Cache) -> dict[str, Projection]:
    """Projections that gradients were made with: random ones may differ in the last bits on another machine."""
    computed = projections_to_tensors(projections)
    layout: Layout = {name: (each.dtype, tuple(each.shape)) for name, each in computed.items()}
    stored = cache.get_or_compute(_PROJECTIONS, lambda _: computed, layout, torch.device("cpu"))
    return projections_from_tensors(stored, projections)
