"""A bank of retrainings on disk: one table, and beside it the retrainings that are not merged into it yet.

This module knows subsets, seeds and losses as rows of a table; it must not know how they came about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.runtime.signals import held_signals
from wherefrom.store.artifacts import Artifact, Layout, check_layout, check_same, read_manifest
from wherefrom.store.files import move, remove
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.version import VERSION

# The entries that a bank adds to the caller's fingerprint.
_MACHINE, _EXAMPLES = "trained with", "training examples"
_LAYOUT: Layout = {
    "masks": (torch.bool, ("row", "train")),
    "seeds": (torch.int64, ("row",)),
    "losses": (torch.float64, ("row", "query")),
    "seconds": (torch.float64, ("row",)),
}


@dataclass(frozen=True)
class Row:
    """One finished retraining: bool [train], its seed, float64 [queries], and how long it took."""

    mask: Tensor
    seed: int
    losses: Tensor
    seconds: float


def retraining_key(mask: Tensor, seed: int) -> str:
    """A name for a retraining, which says what it is whatever else was asked for: mask is bool [train] on the CPU."""
    return f"{hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:24]}-{seed}"


class Bank:
    """All finished retrainings that were made from the same things.

    A retraining by itself is stored like a table of one row, so that whatever is found is read in one way.

    Args:
        path: of the table; single retrainings are in a directory with `.runs` at the end of its name.
        fingerprint: what the retrainings are made from.
        examples: how many training examples there are.
        overwrite: begin with an empty bank.

    Attributes:
        rows: all that is finished, by `retraining_key`.

    Raises:
        MismatchError: what is stored was made from something else.
        DamagedError: a stored file is not what was written.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, examples: int, overwrite: bool) -> None:
        self._path = path
        self._runs = path.with_name(f"{path.name}.runs")
        self._removed = path.with_name(f"{path.name}.runs.part")
        self.rows: dict[str, Row] = {}
        remove(self._removed)
        if overwrite:
            self._remove_runs()
            remove(path)
        self._fingerprint = {**fingerprint, _EXAMPLES: str(examples), _MACHINE: _machine()}
        self._stored = [self._read(path)] if path.exists() else []
        merged = len(self.rows)
        unmerged = sorted(self._runs.iterdir()) if self._runs.exists() else []
        self._stored += [self._read(folder) for folder in unmerged if folder.suffix != ".part"]
        if len(self.rows) == merged:
            self._remove_runs()

    def check_machine(self) -> None:
        """Refuse to add to what was trained with another machine or version.

        Raises:
            MismatchError: names both.
        """
        for artifact in self._stored:
            check_same(artifact.path, artifact.fingerprint, self._fingerprint)

    def add(self, row: Row) -> None:
        """Keep a finished retraining.

        Raises:
            StorageError: it cannot be written.
        """
        key = retraining_key(row.mask, row.seed)
        with held_signals():
            Artifact(self._runs / key, self._fingerprint).save(_to_tensors([row]))
        self.rows[key] = row

    def merge(self) -> None:
        """Make one table of everything."""
        if not self._runs.exists():
            return
        if self._path.exists():
            # Saving deletes what it replaces a moment before the new table is there.
            move(self._path, self._runs / self._path.name)
        fingerprint = self._stored[0].fingerprint if self._stored else self._fingerprint
        Artifact(self._path, fingerprint).save(_to_tensors(list(self.rows.values())))
        self._remove_runs()

    def _read(self, folder: Path) -> Artifact:
        artifact = Artifact(folder, read_manifest(folder)["fingerprint"])
        check_same(folder, {**artifact.fingerprint, _MACHINE: self._fingerprint[_MACHINE]}, self._fingerprint)
        tensors = artifact.load()
        check_layout(folder, tensors, _LAYOUT)
        for row in _from_tensors(tensors):
            self.rows[retraining_key(row.mask, row.seed)] = row
        return artifact

    def _remove_runs(self) -> None:
        """Delete the single retrainings, under another name: half of them left over would look damaged."""
        if self._runs.exists():
            move(self._runs, self._removed)
            remove(self._removed)


def _machine() -> str:
    """What decides how results are rounded."""
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        device = ", ".join(sorted(names))
    else:
        device = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"wherefrom {VERSION}, torch {torch.__version__}, {device}, 1 CPU thread"


def _to_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {
        "masks": torch.stack([row.mask for row in rows]),
        "seeds": torch.tensor([row.seed for row in rows], dtype=torch.int64),
        "losses": torch.stack([row.losses for row in rows]),
        "seconds": torch.tensor([row.seconds for row in rows], dtype=torch.float64),
    }


def _from_tensors(tensors: Mapping[str, Tensor]) -> list[Row]:
    columns = (tensors["masks"], tensors["seeds"].tolist(), tensors["losses"], tensors["seconds"].tolist())
    return [Row(*row) for row in zip(*columns, strict=True)]
