"""Compressed gradients of a dataset on disk, a row for each example: made once, read block by block.

Rows lie in shards, each a stage of its own, so that a killed build goes on with the shard that it was in; beside them
lie the projections that they were made with, which come first and refuse what is made from something else. This module
brings compressed gradients, sweeps and stages together; it does not know what rows are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic

import torch
from torch import Tensor

from wherefrom.engine.loading import Rows
from wherefrom.engine.sweep import Objective, Sweep
from wherefrom.methods.projections import (
    ROWS,
    SCALES,
    CompressedGradients,
    Compression,
    Projection,
    packed,
    parts,
    projections_from_tensors,
    projections_to_tensors,
    unpacked,
)
from wherefrom.runtime.errors import MismatchError
from wherefrom.store.artifacts import Layout, Partial, check_layout
from wherefrom.store.cache import Stages
from wherefrom.store.fingerprint import Dataset
from wherefrom.store.space import Step, check_space, used_bytes
from wherefrom.tasks.task import Batch

# Compressed gradients of a shard while they are added up, and what is read and widened at a time.
_SHARD_BYTES, _BLOCK_BYTES = 2**28, 2**26
_PROJECTIONS = "projections"


@dataclass(frozen=True)
class GradientRows(Generic[Batch]):
    """Compressed gradients of a dataset.

    Attributes:
        compression: how they are kept, and the batch size.
        projections: of every layer.
        stages: where they are kept; nothing else is there.
        scales: as in `CompressedGradients`.
    """

    sweep: Sweep[Batch]
    dataset: Dataset[object]
    compression: Compression
    projections: Mapping[str, Projection]
    stages: Stages
    scales: Mapping[str, Tensor] | None = None

    @classmethod
    def kept(
        cls,
        sweep: Sweep[Batch],
        dataset: Dataset[object],
        objective: Objective[Batch],
        compression: Compression,
        projections: Mapping[str, Projection],
        stages: Stages,
        scales: Mapping[str, Tensor] | None = None,
    ) -> GradientRows[Batch]:
        """Rows that are there, or made.

        Args:
            objective: whose gradients they are.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; finished shards stay valid.
        """
        if compression.overwrite:
            stages.clear()
        rows = cls(sweep, dataset, compression, _kept(projections, stages), stages, scales)
        rows._build(objective)
        return rows

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.dataset)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where each layer's numbers are in a row."""
        return parts(self.projections)

    @property
    def size(self) -> int:
        """How many numbers a row has."""
        return sum(each.size for each in self.projections.values())

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on disk."""
        scales = len(self.projections) * self.sweep.dtype.itemsize if self.compression.numbers == "int8" else 0
        return self.size * self._number_type.itemsize + scales

    @property
    def _number_type(self) -> torch.dtype:
        return {"float32": self.sweep.dtype, "bfloat16": torch.bfloat16, "int8": torch.int8}[self.compression.numbers]

    @cached_property
    def shards(self) -> list[range]:
        """Runs of examples that lie in a file; they depend on nothing but sizes."""
        rows = max(1, _SHARD_BYTES // (self.size * self.sweep.dtype.itemsize))
        return [range(start, min(start + rows, len(self))) for start in range(0, len(self), rows)]

    def _build(self, objective: Objective[Batch]) -> None:
        """Make the shards that are missing: a sweep over the examples of each."""
        self.stages.ranks.first(self._check_disk)
        for shard in self.shards:
            self.stages.keep(shard_name(shard), partial(self._shard, shard, objective))

    def _check_disk(self) -> None:
        """Refuse to begin what there is too little room for; rows that are all there need none."""
        folder, names = self.stages.folder, [shard_name(shard) for shard in self.shards]
        if all((folder / name).exists() for name in names):
            return
        kept = len(self) * self.bytes_per_example
        sums = min(_SHARD_BYTES, len(self) * self.size * self.sweep.dtype.itemsize)
        step = Step("compressed gradients", kept, kept + 2 * self.stages.ranks.count * sums)
        begun = [path for name in names for path in (folder / name, *folder.glob(f"{name}.part*"))]
        check_space(folder, [step], used_bytes(begun))

    def _shard(self, shard: range, objective: Objective[Batch], sums: Partial) -> dict[str, Tensor]:
        rows = self.of("compressed gradients", Rows(self.dataset, shard), objective, sums)
        return packed(rows, self.compression.numbers, self.parts)

    def of(
        self, name: str, dataset: Dataset[object], objective: Objective[Batch], sums: Partial | None = None
    ) -> Tensor:
        """The compressed gradients of other examples, in memory: [examples, numbers].

        Args:
            name: of the sweep.
        """
        sweep = self.sweep
        collector = CompressedGradients(
            sweep.layers, self.projections, len(dataset), sweep.dtype, sweep.device, self.scales
        )
        sweep.run(name, dataset, collector, objective, batch_size=self.compression.batch_size, partial=sums)
        return collector.sums[ROWS]

    def any(self, layer: str) -> bool:
        """Whether an example has a gradient in a layer."""
        return any(bool(each[ROWS][:, self.parts[layer]].any()) for _, each in self._mapped)

    def blocks(self) -> Iterator[tuple[range, Tensor]]:
        """Rows some at a time, on the device: [rows, numbers]."""
        dtype, device = self.sweep.dtype, self.sweep.device
        count = max(1, _BLOCK_BYTES // (self.size * dtype.itemsize))
        for shard, tensors in self._mapped:
            for start in range(0, len(shard), count):
                piece = {name: each[start : start + count].to(device) for name, each in tensors.items()}
                block = unpacked(piece, dtype, self.parts)
                yield range(shard.start + start, shard.start + start + len(block)), block

    @cached_property
    def _mapped(self) -> list[tuple[range, dict[str, Tensor]]]:
        """The shards, memory-mapped, after a look at all of their bytes."""
        found = []
        for shard in self.shards:
            artifact = self.stages.artifact(shard_name(shard))
            if not artifact.available():  # another process may have replaced them since they were opened
                raise MismatchError(f"{artifact.path} has gone since it was opened. Make it again by the same call.")
            tensors = artifact.mapped()
            layout: Layout = {ROWS: (self._number_type, (len(shard), self.size))}
            if self.compression.numbers == "int8":
                layout = {**layout, SCALES: (self.sweep.dtype, (len(shard), len(self.projections)))}
            check_layout(artifact.path, tensors, layout)
            found.append((shard, tensors))
        return found


def shard_name(shard: range) -> str:
    """What a shard is kept as."""
    return f"{shard.start}-{shard.stop}"


def _kept(projections: Mapping[str, Projection], stages: Stages) -> dict[str, Projection]:
    """Projections as the rows were made with: random ones may differ in the last bits on another machine."""
    computed = projections_to_tensors(projections)
    artifact = stages.keep(_PROJECTIONS, lambda _: computed)
    stored = artifact.load()
    check_layout(artifact.path, stored, {name: (each.dtype, tuple(each.shape)) for name, each in computed.items()})
    return projections_from_tensors(stored, projections)
