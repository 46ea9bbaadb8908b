"""The cache: results of a run directory that are each loaded, or computed and stored.

On several processes all compute, and one looks at files and writes them. This module knows fingerprints and the
profile; it does not know what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.profile import Profile
from wherefrom.runtime.signals import held_signals
from wherefrom.store.artifacts import (
    Artifact,
    Block,
    Layout,
    Matrices,
    Partial,
    block_details,
    block_digests,
    check_blocks,
    check_layout,
    stored_matrices,
)
from wherefrom.store.files import remove, within
from wherefrom.store.fingerprint import Fingerprint

# Beside blocks, while their numbers are being replaced.
_REWRITING = "rewriting"
_BLOCK = re.compile(r"(\d+)-(\d+)\.(\d+)-(\d+)")


@dataclass(frozen=True)
class Cache:
    """Where results lie and what they depend on.

    Raises:
        DamagedError: the folder is a link, which leads elsewhere.
    """

    folder: Path
    fingerprint: Fingerprint
    profile: Profile
    ranks: Ranks = field(default_factory=Ranks.current)

    def __post_init__(self) -> None:
        within(self.folder.parent, self.folder.name)

    def artifact(self, name: str) -> Artifact:
        """A result, there or not."""
        return Artifact(self.folder / name, self.fingerprint)

    def parts(self, name: str) -> Cache:
        """Of what a result is made of, which goes when the result is there."""
        return replace(self, folder=self.folder / f"{name}.blocks")

    def get_or_compute(
        self,
        name: str,
        compute: Callable[[Unfinished], Mapping[str, Tensor]],
        layout: Layout | None = None,
        device: torch.device | None = None,
        beside: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> dict[str, Tensor]:
        """The tensors of `folder/name`, computed and stored unless they are there.

        Args:
            compute: makes them; its argument has what an interrupted run has left, and takes matrices block by block.
            layout: what is expected of them.
            device: where they are wanted; None leaves them on disk, memory-mapped.
            beside: makes small ones that are stored with them.

        Raises:
            MismatchError: what has this name was made from something else.
            DamagedError: it is not what was written, or has another layout.
            StorageError: it cannot be written.
        """
        artifact, fresh = self.artifact(name), False
        if not self.ranks.first(artifact.available):
            # What a finished sweep has summed up is nowhere but in memory until this has saved it.
            with held_signals() as held:
                unfinished = Unfinished(self, name)
                self.save(unfinished, {**compute(unfinished), **beside()})
                fresh = True
                held.deliver()
        self.ranks.first(lambda: self._discard_parts(name))
        with self.profile.action(f"load {name}"):
            found = artifact.mapped(fresh)
            if layout is not None:
                check_layout(artifact.path, found, layout)
            # Copies: the file may change or vanish later, and its tensors are not aligned as fresh ones are.
            return found if device is None else {key: each.to(device, copy=True) for key, each in found.items()}

    def save(self, unfinished: Unfinished, tensors: Mapping[str, Tensor]) -> None:
        """Give a result that is computed its name."""
        with self.profile.action(f"save {unfinished.name}"):
            self.ranks.first(lambda: unfinished.save(tensors))

    def _discard_parts(self, name: str) -> None:
        """Delete what is left of sweeps, on any number of processes: only now, until now it was all there was."""
        for path in (*self.folder.glob(f"{name}.partial*"), self.folder / f"{name}.blocks", self.artifact(name).part):
            remove(path)

    def forget(self, *names: str) -> None:
        """Delete results and what there is of them, whatever they were made from."""

        def delete() -> None:
            for name in names:
                remove(self.folder / name)
                self._discard_parts(name)

        self.ranks.first(delete)

    def clear(self) -> None:
        """Delete everything."""
        self.ranks.first(lambda: remove(self.folder))


@dataclass
class Unfinished:
    """A result that is being computed.

    Attributes:
        digests: of the blocks of its matrices.
        details: what its manifest is to say beside them.
    """

    cache: Cache
    name: str
    digests: dict[Block, Mapping[str, str]] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """The processes that compute it."""
        return self.cache.ranks

    @property
    def part(self) -> Path:
        """Where its matrices are before it has its name."""
        return self.cache.artifact(self.name).part

    @property
    def sums(self) -> Partial:
        """Those of an interrupted sweep."""
        file = self.cache.folder / f"{self.name}.partial{self.ranks.suffix}.safetensors"
        return Partial(file, self.cache.fingerprint)

    @property
    def parts(self) -> Cache:
        """Results that this one is made of."""
        return self.cache.parts(self.name)

    def blocks(self, rows: int, columns: int) -> Blocks:
        """The blocks of its matrices [..., rows, columns], with those that an earlier run has left.

        Raises:
            MismatchError: they were made from something else.
            DamagedError: they are not what was written.
        """
        blocks = Blocks(self.parts, rows, columns, self)
        self.ranks.first(blocks.take_up)
        return blocks

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Give it its name."""
        details, matrices = dict(self.details), ""
        if self.digests:
            blocks, matrices = block_details(self.digests)
            details |= blocks
        self.cache.artifact(self.name).save(tensors, details, matrices)


@dataclass(frozen=True)
class Blocks:
    """Parts of a result, each of some rows and columns, such as queries and training examples.

    Attributes:
        rows, columns: how many the whole has.
        result: whose matrices they are; of None, each block is a small result of its own.
    """

    parts: Cache
    rows: int
    columns: int
    result: Unfinished | None = None

    def get_or_compute(
        self, rows: range, columns: range, compute: Callable[[Unfinished], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """One block's tensors in memory, but for matrices, which are put where they belong."""
        name, result = f"{rows.start}-{rows.stop}.{columns.start}-{columns.stop}", self.result
        if result is None:
            return self.parts.get_or_compute(name, compute, device=torch.device("cpu"))
        parts, artifact = self.parts, self.parts.artifact(name)
        if not parts.ranks.first(artifact.available):
            parts.ranks.first(lambda: self._discard_overlapping(rows, columns))
            with held_signals() as held:
                block = Unfinished(parts, name)
                tensors = compute(block)
                matrices = {key: each for key, each in tensors.items() if each.dim() >= 2}
                block.details["digests"] = parts.ranks.first(lambda: self._write(result, (rows, columns), matrices))
                parts.save(block, {key: each for key, each in tensors.items() if key not in matrices})
                del tensors, matrices
                held.deliver()
        found = parts.get_or_compute(name, compute, device=torch.device("cpu"))
        result.digests[rows, columns] = parts.ranks.first(lambda: block_digests(artifact.path))
        return found

    def _write(self, result: Unfinished, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        whole = {key: ((*each.shape[:-2], self.rows, self.columns), each.dtype) for key, each in tensors.items()}
        return Matrices(result.part, whole).write(block, tensors)

    def take_up(self) -> None:
        """Look at a result's blocks that are there; those whose numbers are gone, and numbers of none, are forgotten.

        Raises:
            MismatchError: they were made from something else.
            DamagedError: they are not what was written.
        """
        assert self.result is not None
        finished = {(rows, columns): path for path, rows, columns in self._named() if _BLOCK.fullmatch(path.name)}
        if not (finished and Matrices.there(self.result.part)):
            for path in (*finished.values(), self.result.part):
                remove(path)
            return
        for path in finished.values():
            self.parts.artifact(path.name).available()
        if not self.parts.artifact(_REWRITING).available():
            check_blocks(self.result.part, {block: block_digests(path) for block, path in finished.items()})

    def begun(self, rows: range) -> range:
        """The rows from the same start that an earlier run has begun with, since another memory cuts other blocks.

        A block of more rows is taken up only when all of it is there: with less memory now, it could not be finished.
        """
        return self.parts.ranks.first(lambda: self._begun(rows))

    def _begun(self, rows: range) -> range:
        for stop in {found.stop for _, found, _ in self._named() if found.start == rows.start}:
            other = range(rows.start, stop)
            if stop <= rows.stop or self._complete(other):
                return other
            self._discard(other)
        return rows

    def _complete(self, rows: range) -> bool:
        finished = [columns for path, found, columns in self._named() if found == rows and _BLOCK.fullmatch(path.name)]
        return sum(map(len, finished)) == self.columns

    def discard(self, rows: range) -> None:
        """Forget blocks of these rows."""
        self.parts.ranks.first(lambda: self._discard(rows))

    def _discard(self, rows: range) -> None:
        for path, found, _ in self._named():
            if found == rows:
                remove(path)
        if self.result is not None:
            self.result.digests = {block: each for block, each in self.result.digests.items() if block[0] != rows}

    def _discard_overlapping(self, rows: range, columns: range) -> None:
        """Forget blocks of an earlier run that this one writes over: it was cut otherwise."""
        for path, other_rows, other_columns in self._named():
            apart = min(rows.stop, other_rows.stop) <= max(rows.start, other_rows.start)
            apart |= min(columns.stop, other_columns.stop) <= max(columns.start, other_columns.start)
            if not apart and (rows, columns) != (other_rows, other_columns):
                remove(path)

    def rewrite(self, change: Callable[[range, range, Tensor], Tensor]) -> None:
        """Replace the `values` of a result's matrices, block by block.

        Args:
            change: makes those of some rows and columns, [rows, columns], of those that are there.
        """
        assert self.result is not None
        # From here on, digests that are stored tell nothing: a kill may come in the middle of a block.
        self.parts.get_or_compute(_REWRITING, lambda _: {})
        for block in list(self.result.digests):
            changed = self.parts.ranks.first(lambda block=block: self._changed(block, change))  # type: ignore[misc]
            self.result.digests[block] = changed

    def _changed(self, block: Block, change: Callable[[range, range, Tensor], Tensor]) -> dict[str, str]:
        assert self.result is not None
        rows, columns = block
        values = stored_matrices(self.result.part)["values"][rows.start : rows.stop, columns.start : columns.stop]
        return self._write(self.result, block, {"values": change(rows, columns, values)})

    def _named(self) -> list[tuple[Path, range, range]]:
        """Everything that is there or begun, with its rows and columns."""
        paths = self.parts.folder.iterdir() if self.parts.folder.exists() else ()
        matches = [(path, _BLOCK.match(path.name)) for path in paths]
        numbers = [(path, list(map(int, found.groups()))) for path, found in matches if found]
        return [(path, range(first, last), range(left, right)) for path, (first, last, left, right) in numbers]
