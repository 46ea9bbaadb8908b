"""What results take on disk: what stays, the most that is there at once, and whether so much is free.

Arithmetic on the sizes of what is stored, so that a run that cannot end is refused before it begins. This module
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
# Of an index, and of the number that says what a low rank or integers leave out of a query's gradient.
_INDEX_BYTES = _ERROR_BYTES = 8


@dataclass(frozen=True)
class Step:
    """One result.

    Attributes:
        stored: bytes that stay.
        peak: the most bytes that are there at once while it is made.
    """

    name: str
    stored: int
    peak: int

    @classmethod
    def swept(cls, name: str, stored: int, sums: int, ranks: int) -> Step:
        """A result that is written once its sweep is over, after which the partial sums are deleted."""
        return cls(name, stored, max(replaced_bytes(sums, ranks), ranks * sums + stored))


def peak(steps: Iterable[Step]) -> int:
    """The most that is there at once while results are made one after another."""
    stored = most = 0
    for step in steps:
        most = max(most, stored + step.peak)
        stored += step.stored
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
            f"free ({sum(step.stored for step in steps) / 2**20:,.2f} MiB stay, the rest is for copies on the way). "
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


@dataclass(frozen=True)
class BlockSizes:
    """What a matrix of scores takes that is computed block by block.

    Attributes:
        queries, train: its size.
        itemsize: bytes of a score.
        block: queries of a block, the most.
        shard: training examples of a block, the most.
        matrices: how many of one size there are, with parts of layers.
        errors: whether each block says what a low rank or integers leave out.
    """

    queries: int
    train: int
    itemsize: int
    block: int
    shard: int
    matrices: int = 1
    errors: bool = False

    @property
    def _whole(self) -> int:
        """What all scores take."""
        return self.queries * self.train * self.itemsize * self.matrices

    @property
    def _across(self) -> int:
        """Blocks beside each other."""
        return -(-self.train // self.shard)

    @property
    def _sums(self) -> int:
        """What the sums of a sweep take, the most."""
        return self.block * self.shard * self.itemsize * self.matrices

    @property
    def _overhead(self) -> int:
        """What blocks take beside their scores."""
        count = -(-self.queries // self.block) * self._across
        return count * file_overhead(self.matrices) + self.errors * self.queries * self._across * _ERROR_BYTES

    def matrix_step(self, ranks: int, vectors: int = 0, rescored: int = 0) -> Step:
        """Scores of all pairs: one file that each block is put into when its sweep has ended.

        Args:
            vectors: how many numbers of each training example are stored beside the scores.
            rescored: how many of each query's scores are computed again.
        """
        whole, beside = self._whole, vectors * self.train * self.itemsize
        errors = self.queries * (self.errors * _ERROR_BYTES + rescored * self.itemsize)
        stored = whole + beside + errors + file_overhead(self.matrices + vectors + 2)
        # Numbers beside the scores are swept with the first queries; their blocks stay until the end.
        swept, blocks = self._sums + beside, beside + self._overhead
        sweeping = max(replaced_bytes(swept, ranks), whole + blocks + ranks * swept)
        if self._sums < whole:
            sweeping = max(sweeping, whole + blocks + replaced_bytes(self._sums, ranks))
        if not rescored:
            return Step("scores", stored, max(sweeping, stored + blocks))
        # Of a block of queries, their highest scores are of so many training examples at the most.
        again = min(self.train, self.block * rescored)
        highest = self.queries * rescored * (_INDEX_BYTES + self.itemsize)
        better, latest = self.queries * again * self.itemsize, self.block * again * self.itemsize
        rescoring = max(better - latest + replaced_bytes(latest, ranks), better + ranks * latest)
        exact = blocks + highest + self._overhead
        return Step("scores", stored, max(sweeping, whole + exact + rescoring, stored + exact + better))

    def top_step(self, ranks: int, top: int) -> Step:
        """The highest and lowest scores: those of every block, then the result beside them."""
        each = 2 * (self.itemsize + _INDEX_BYTES)
        stored = each * self.queries * min(top, self.train) + file_overhead(5)
        latest = each * self.block * min(top, self.shard)
        blocks = each * self.queries * self._across * min(top, self.shard) + 2 * self._overhead
        sweeping = max(blocks - latest + replaced_bytes(self._sums, ranks), blocks + ranks * self._sums)
        return Step("top scores", stored, max(sweeping, blocks + stored))

    def summed_step(self, ranks: int) -> Step:
        """Scores that are added up over queries, training examples or both: `queries` or `train` is then 1."""
        stored = self._whole + file_overhead(self.matrices)
        return Step("scores", stored, stored + self._overhead + max(stored, replaced_bytes(self._sums, ranks)))


def token_step(pairs: Sequence[int], longest: int, itemsize: int, part: int, train: int, ranks: int) -> Step:
    """Scores of tokens: files of bounded size, all of which stay, and an index.

    Args:
        pairs: how many each block of queries has.
        longest: tokens of the longest training example.
        part: bytes of a file, the most.
        train: training examples, whose lengths are stored.
    """
    blocks = [each * longest * itemsize for each in pairs]
    files = sum(-(-block // part) for block in blocks)
    largest = min(part, max(blocks))
    stored = sum(blocks) + (2 * sum(pairs) + train + files) * _INDEX_BYTES + (files + 1) * file_overhead(3)
    return Step("token scores", stored, stored + replaced_bytes(largest, ranks) - largest)
