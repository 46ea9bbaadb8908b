"""Stages: results of one directory that are each loaded, or computed and kept.

This module knows fingerprints and the profile; it does not know what is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.fingerprint import Fingerprint
from wherefrom.profile import Profile
from wherefrom.store import Artifact, Partial, remove

Compute = Callable[[Partial], dict[str, Tensor]]
"""Computes what is kept; the argument may hold sums of an interrupted sweep."""

_BLOCK = re.compile(r"(\d+)-(\d+)\.(\d+)-(\d+)")


@dataclass(frozen=True)
class Stages:
    """Where results lie and what they depend on.

    Attributes:
        overwrite: replace what was made from something else, instead of refusing.
    """

    folder: Path
    fingerprint: Fingerprint
    profile: Profile
    overwrite: bool = False

    def keep(self, name: str, compute: Compute) -> Artifact:
        """Have `folder/name`, computed unless it is there; `compute` may keep partial sums beside it."""
        artifact = Artifact(self.folder / name, self.fingerprint)
        sums = Partial(self.folder / f"{name}.partial.safetensors", self.fingerprint)
        if self.overwrite:
            sums.discard()
        if not artifact.available(self.overwrite):
            tensors = compute(sums)
            with self.profile.action(f"save {name}"):
                artifact.save(tensors)
        sums.discard()  # only now: until the artifact is there, the sums are all there is
        return artifact

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
    """Stages that are blocks of one large matrix, each named by its rows and columns."""

    stages: Stages

    def mapped(self, rows: range, columns: range, compute: Compute) -> dict[str, Tensor]:
        """One block's tensors, memory-mapped: `values` [rows, columns] and what comes with them."""
        return self.stages.mapped(f"{rows.start}-{rows.stop}.{columns.start}-{columns.stop}", compute)

    def begun(self, start: int) -> int | None:
        """Where the rows from `start` end, if an earlier run has begun with them: another memory cuts other blocks."""
        stops = [int(found[2]) for _, found in self._named() if int(found[1]) == start]
        return max(stops, default=None)

    def discard(self, rows: range) -> None:
        """Forget blocks of these rows."""
        for path, found in self._named():
            if (int(found[1]), int(found[2])) == (rows.start, rows.stop):
                remove(path)

    def _named(self) -> Iterator[tuple[Path, re.Match[str]]]:
        if self.stages.folder.exists():
            for path in self.stages.folder.iterdir():
                found = _BLOCK.match(path.name)
                if found:
                    yield path, found
