"""Stages: results of one directory that are each loaded, or computed and kept.

On several processes all compute, and one looks at files and writes them. This module knows fingerprints and the
profile; it does not know what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.profile import Profile
from wherefrom.runtime.signals import held_signals
from wherefrom.store.artifacts import Artifact, Partial
from wherefrom.store.files import remove
from wherefrom.store.fingerprint import Fingerprint

Compute = Callable[[Partial], dict[str, Tensor]]
"""Computes what is kept; the argument may hold sums of an interrupted sweep."""

_BLOCK = re.compile(r"(\d+)-(\d+)\.(\d+)-(\d+)")


@dataclass(frozen=True)
class Stages:
    """Where results lie and what they depend on."""

    folder: Path
    fingerprint: Fingerprint
    profile: Profile
    ranks: Ranks = field(default_factory=Ranks.current)

    def artifact(self, name: str) -> Artifact:
        """A result, there or not."""
        return Artifact(self.folder / name, self.fingerprint)

    def keep(self, name: str, compute: Compute) -> Artifact:
        """Have `folder/name`, computed unless it is there; `compute` may keep partial sums beside it."""
        artifact = self.artifact(name)
        sums = Partial(self.folder / f"{name}.partial{self.ranks.suffix}.safetensors", self.fingerprint)
        if not self.ranks.first(artifact.available):
            # What a finished sweep has summed up is nowhere but in memory until this has saved it.
            with held_signals() as held:
                tensors = compute(sums)
                with self.profile.action(f"save {name}"):
                    self.ranks.first(lambda: artifact.save(tensors))
                held.deliver()
        self.ranks.first(lambda: self._discard_sums(name))
        return artifact

    def _discard_sums(self, name: str) -> None:
        """Delete what is left of sweeps, on any number of processes: only now, until now it was all there was."""
        for path in self.folder.glob(f"{name}.partial*"):
            remove(path)

    def forget(self, *names: str) -> None:
        """Delete results and what sweeps for them have summed up, whatever they were made from."""

        def delete() -> None:
            for name in names:
                remove(self.folder / name)
                self._discard_sums(name)

        self.ranks.first(delete)

    def clear(self) -> None:
        """Delete everything."""
        self.ranks.first(lambda: remove(self.folder))

    def load(self, name: str, compute: Compute, device: torch.device) -> dict[str, Tensor]:
        """`keep`, and its tensors in memory."""
        computed: dict[str, Tensor] = {}

        def computing(sums: Partial) -> dict[str, Tensor]:
            # In the layout that loading gives: products of other layouts differ in the last bit.
            computed.update((key, tensor.contiguous()) for key, tensor in compute(sums).items())
            return computed

        artifact = self.keep(name, computing)
        if computed:
            return computed
        with self.profile.action(f"load {name}"):
            return artifact.load(device)

    def mapped(self, name: str, compute: Compute) -> dict[str, Tensor]:
        """`keep`, and its tensors on disk, memory-mapped."""
        return self.keep(name, compute).mapped()


@dataclass(frozen=True)
class BlockStages:
    """Stages that are blocks of one large matrix, each named by its rows and columns.

    Attributes:
        columns: how many the whole matrix has.
    """

    stages: Stages
    columns: int

    def mapped(self, rows: range, columns: range, compute: Compute) -> dict[str, Tensor]:
        """One block's tensors, memory-mapped: `values` [rows, columns] and what comes with them."""
        return self.stages.mapped(f"{rows.start}-{rows.stop}.{columns.start}-{columns.stop}", compute)

    def begun(self, rows: range) -> range:
        """The rows from the same start that an earlier run has begun with, since another memory cuts other blocks.

        A block of more rows is taken up only when all of it is there: with less memory now, it could not be finished.
        """
        return self.stages.ranks.first(lambda: self._begun(rows))

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
        self.stages.ranks.first(lambda: self._discard(rows))

    def _discard(self, rows: range) -> None:
        for path, found, _ in self._named():
            if found == rows:
                remove(path)

    def _named(self) -> list[tuple[Path, range, range]]:
        """Everything that is there or begun, with its rows and columns."""
        paths = self.stages.folder.iterdir() if self.stages.folder.exists() else ()
        matches = [(path, _BLOCK.match(path.name)) for path in paths]
        numbers = [(path, list(map(int, found.groups()))) for path, found in matches if found]
        return [(path, range(first, last), range(left, right)) for path, (first, last, left, right) in numbers]
