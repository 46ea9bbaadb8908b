"""Sketches of examples on disk, found by what an example says: those of an example are made once.

They lie in shards, each a result of its own, so that a killed build goes on with the shard that it was in. A shard says
which examples it has by their digests, so that a dataset with more of them, fewer, or in another order takes what is
there, and only new ones are swept. This module brings sketches, sweeps and the cache together; it does not know what
they are searched for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Sweep
from wherefrom.methods.index.sketches import COUNTERS, SPANS, SQUARES, Chunks, Projector, Sketch, Sketches
from wherefrom.runtime.errors import MismatchError
from wherefrom.scoring.token_scoring import token_lengths
from wherefrom.store.artifacts import Layout, Partial, check_layout
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.fingerprint import example_digests, tensors_digest
from wherefrom.store.names import finished
from wherefrom.store.space import Step, check_space, used_bytes
from wherefrom.tasks.task import Batch

# Counters of a shard while they are added up.
_SHARD_BYTES = 2**28
_DIGESTS = "digests"


class Shard(NamedTuple):
    """Some stored examples, or chunks of examples.

    Attributes:
        tensors: what is stored of each, memory-mapped.
        positions: of the examples in the dataset, int64 [n], ascending.
        examples: which of the stored they are, int64 [n]; None where these are all, one after another.
    """

    tensors: dict[str, Tensor]
    positions: Tensor
    examples: Tensor | None


class NumberedChunks(NamedTuple):
    """The chunks of all examples, by their number: an example's one after another, in the order of the dataset.

    Attributes:
        shards: with numbers of chunks for positions.
        spans: the example's position, the chunk's first token and the one after its last, int64 [chunks, 3].
    """

    shards: list[Shard]
    spans: Tensor


@dataclass(frozen=True)
class SketchStore(Generic[Batch]):
    """Sketches of examples.

    Attributes:
        projector: makes them.
        cache: where they are; nothing else is there.
    """

    sweep: Sweep[Batch]
    examples: Examples[Batch]
    sketch: Sketch
    projector: Projector
    cache: Cache

    def make(self) -> None:
        """Sweep the examples that are not there.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; finished shards stay valid.
        """
        missing = self._missing()
        if not len(missing):
            return
        cut = self._cut(self.examples.subset(missing.tolist()))
        counts = torch.ones_like(missing) if cut is None else cut.counts
        most = max(1, _SHARD_BYTES // (self.sketch.numbers * self.sweep.dtype.itemsize))
        sizes = ((counts.cumsum(0) - 1) // most).unique_consecutive(return_counts=True)[1].tolist()
        shards = {_name(self._digests[missing[part]]): part for part in torch.arange(len(missing)).split(sizes)}
        together = max(int(counts[part].sum()) for part in shards.values())
        self.cache.ranks.first(lambda: self._check_disk(int(counts.sum()), together, list(shards)))
        for name, part in shards.items():
            own = None if cut is None else cut._replace(lengths=cut.lengths[part])
            self.cache.get_or_compute(name, partial(self._shard, missing[part], own))

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.examples)

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on disk: what is stored of it, and its digest; in chunks, on average."""
        stored = len(self)
        if self.sketch.chunk is not None:
            stored = sum(int(torch.isin(each, self._digests).sum()) for each in self._stored())
        return self._bytes_each * stored // len(self)

    @property
    def _bytes_each(self) -> int:
        itemsize, span = self.sweep.dtype.itemsize, 0 if self.sketch.chunk is None else 2 * torch.int32.itemsize
        codes = self.sketch.numbers * itemsize if self.sketch.bits == 32 else self.sketch.code_bytes
        return codes + 2 * itemsize + torch.int64.itemsize + span

    def _cut(self, examples: Examples[Batch]) -> Chunks | None:
        """How examples are cut, where they are."""
        size = self.sketch.chunk
        return None if size is None else Chunks(token_lengths(self.sweep, examples), size)

    @cached_property
    def _digests(self) -> Tensor:
        return example_digests(self.examples.dataset)

    def _missing(self) -> Tensor:
        """The positions of examples that are not there; of equal ones the first."""
        there = self.cache.ranks.first(lambda: torch.cat([torch.empty(0, dtype=torch.int64), *self._stored()]))
        new = ~torch.isin(self._digests, there)
        _, kinds = self._digests.unique(return_inverse=True)
        positions = torch.arange(len(kinds))
        first = torch.full((len(kinds),), len(kinds)).scatter_reduce_(0, kinds, positions, "amin")[kinds]
        return positions[new & (first == positions)]

    def _stored(self) -> Iterator[Tensor]:
        """The digests of the examples of each shard."""
        for path in finished(self.cache.folder):
            artifact = self.cache.artifact(path.name)
            if artifact.available():
                yield artifact.mapped(fresh=True)[_DIGESTS]  # a look at all bytes is for who reads them: `shards`

    def _check_disk(self, sketches: int, together: int, names: list[str]) -> None:
        """Refuse to begin what there is too little disk space for."""
        stays = sketches * self._bytes_each
        sums = together * self.sketch.numbers * self.sweep.dtype.itemsize
        step = Step("sketches of gradients", stays, stays + 2 * self.cache.ranks.count * sums)
        folder = self.cache.folder
        begun = [path for name in names for path in folder.glob(f"{name}.part*")]
        check_space(folder, [step], used_bytes(begun))

    def _shard(self, positions: Tensor, cut: Chunks | None, result: Unfinished) -> dict[str, Tensor]:
        examples, digests = self.examples.subset(positions.tolist()), self._digests[positions]
        counters, norms = self.of("sketches of gradients", examples, result.sums, cut, training=True)
        stored = self.sketch.packed(counters, norms)
        if cut is None:
            return {**stored, _DIGESTS: digests}
        return {**stored, SPANS: cut.spans, _DIGESTS: digests.repeat_interleave(cut.counts)}

    def of(
        self,
        name: str,
        examples: Examples[Batch],
        sums: Partial | None = None,
        cut: Chunks | None = None,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The counters [examples, numbers] and norms [examples] of other examples, in memory.

        Args:
            name: of the sweep.
            cut: how examples are cut, for those of their chunks.
            training: as for `Sketches`.
        """
        sweep = self.sweep
        like = torch.empty(0, dtype=sweep.dtype, device=sweep.device)
        collector = Sketches(self.projector, cut or len(examples), training, like)
        sweep.run(name, examples, collector, batch_size=sweep.execution.train_batch_size, partial=sums)
        return collector.sums[COUNTERS], collector.sums[SQUARES].sqrt()

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards with examples of the dataset, memory-mapped, after a look at all of their bytes.

        Raises:
            DamagedError: a file is not what was written.
            MismatchError: another process has replaced them.
        """
        ascending, order = self._digests.sort(stable=True)
        found, left = [], len(self)
        for path in finished(self.cache.folder):
            artifact = self.cache.artifact(path.name)
            if not artifact.available():
                continue
            tensors = artifact.mapped()
            digests = tensors.pop(_DIGESTS, torch.empty(0))
            check_layout(path, {**tensors, _DIGESTS: digests}, self._layout(len(digests)))
            begins, ends = (torch.searchsorted(ascending, digests, right=right) for right in (False, True))
            counts = ends - begins  # of how many examples each stored one is: none, one, or of equal ones several
            stored = torch.arange(len(digests)).repeat_interleave(counts)
            within = torch.arange(len(stored)) - (counts.cumsum(0) - counts)[stored]
            positions, by_position = order[begins[stored] + within].sort(stable=True)
            stored, left = stored[by_position], left - len(positions.unique_consecutive())
            if len(positions):
                whole = torch.equal(stored, torch.arange(len(digests)))
                found.append(Shard(tensors, positions, None if whole else stored))
        if left:
            raise MismatchError(
                f"{self.cache.folder} has not got {left} of the training examples, and had them when it was opened. "
                "Make it again by the same call."
            )
        return found

    @cached_property
    def chunks(self) -> NumberedChunks:
        """The chunks of the examples of the dataset."""
        parts = []
        for shard in self.shards:
            spans = shard.tensors[SPANS] if shard.examples is None else shard.tensors[SPANS][shard.examples]
            parts.append(torch.cat([shard.positions.unsqueeze(1), spans], 1))
        every = torch.cat(parts)
        order = (every[:, 0] * every.max() + every[:, 1]).argsort()
        numbers = order.argsort().split([len(part) for part in parts])
        shards = [each._replace(positions=its) for each, its in zip(self.shards, numbers, strict=True)]
        return NumberedChunks(shards, every[order])

    def prune(self) -> int:
        """Delete what is stored of examples that are not in the dataset, and return how many these are.

        A shard that has some goes before it is written again without them. What a kill in between takes is swept by
        the next `make`.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`.
        """
        deleted = sum(self._prune(path.name) for path in finished(self.cache.folder))
        for opened in ("shards", "chunks"):
            self.__dict__.pop(opened, None)
        return deleted

    def _prune(self, shard: str) -> int:
        artifact = self.cache.artifact(shard)
        if not artifact.available():
            return 0
        tensors = artifact.mapped()
        stays = torch.isin(tensors[_DIGESTS], self._digests)
        deleted = len(tensors[_DIGESTS][~stays].unique())
        if deleted:
            remaining = {name: each[stays] for name, each in tensors.items()}  # copies
            self.cache.forget(shard)
            if stays.any():
                self.cache.get_or_compute(_name(remaining[_DIGESTS].unique_consecutive()), lambda _: remaining)
        return deleted

    def _layout(self, examples: int) -> Layout:
        return {**self.sketch.layout(examples), _DIGESTS: (torch.int64, (examples,))}


def _name(digests: Tensor) -> str:
    """Of a shard, from the examples that it holds."""
    return f"{len(digests)}-{tensors_digest({_DIGESTS: digests})[:12]}"
