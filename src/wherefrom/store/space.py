"""What results take on disk: what stays, the most that is there at once, and whether there is room for that.

Arithmetic on the sizes of what stages keep, so that a run that cannot end is refused before it begins. This module
writes nothing, and does not know how anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wherefrom.runtime.errors import StorageError
from wherefrom.store.files import free_space

# The header of a file and the manifest beside it, and for each tensor its entry in the header; measured, rounded up.
_FILE, _ENTRY = 2**13, 256


@dataclass(frozen=True)
class Step:
    """One result.

    Attributes:
        kept: bytes that stay.
        peak: the most bytes that are there at once while it is made.
    """

    name: str
    kept: int
    peak: int

    @classmethod
    def swept(cls, name: str, kept: int, sums: int, ranks: int) -> Step:
        """A result that is written once its sweep is over, after which the partial sums are deleted."""
        return cls(name, kept, max(replaced_bytes(sums, ranks), ranks * sums + kept))


def peak(steps: Iterable[Step]) -> int:
    """The most that is there at once while results are made one after another."""
    kept = most = 0
    for step in steps:
        most = max(most, kept + step.peak)
        kept += step.kept
    return most


def check_space(folder: Path, steps: Sequence[Step], existing: int = 0) -> None:
    """Refuse what would not fit on the disk, before it is begun.

    Args:
        folder: where results are to lie.
        existing: bytes of theirs that are there already, or that they replace.

    Raises:
        StorageError: says how much is needed, and how much is free.
    """
    needed = peak(steps) - existing
    free = free_space(folder)
    if needed > free:
        names = " and ".join(step.name for step in steps)
        raise StorageError(
            f"Not enough space for {names} in {folder}: {needed / 2**20:,.2f} MiB needed, {free / 2**20:,.2f} MiB "
            f"free ({sum(step.kept for step in steps) / 2**20:,.2f} MiB stay, the rest is for copies on the way). "
            "Free some space or choose another run directory; nothing was begun, and what is finished is safe."
        )


def used_bytes(paths: Iterable[Path]) -> int:
    """What files, and all files in folders, take."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,)))
    return sum(file.stat().st_size for file in files if file.is_file())


def file_overhead(tensors: int) -> int:
    """What a result takes besides the numbers of its tensors."""
    return _FILE + _ENTRY * tensors


def replaced_bytes(sums: int, ranks: int) -> int:
    """The most that partial sums take, those of every process: each file is there twice while it is replaced."""
    return 2 * ranks * (sums + _FILE)
