"""What scores take on the disk: what stays, and the most that is there at once.

Arithmetic on the sizes of what is stored. This module writes nothing, and does not know how anything is computed; what
is done with a `Step` is `store.space`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wherefrom.store.space import Step, file_overhead, replaced_bytes

# The float64 number that says what a low rank or integers leave out of a query's gradient.
_ERROR_BYTES = 8


@dataclass(frozen=True)
class Blocks:
    """A matrix of scores that is computed block by block.

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
        """Scores of all pairs: blocks, a file that they are put together in, and the result, all there at the end.

        Args:
            vectors: how many numbers of each training example are stored beside the scores.
            rescored: how many of each query's scores are computed again.
        """
        whole, beside = self._whole, vectors * self.train * self.itemsize
        # Of a block of queries, their highest scores are of so many training examples at the most.
        again = min(self.train, self.block * rescored)
        better = self.queries * again * self.itemsize + bool(rescored) * self._overhead
        stored = whole + beside + self.queries * (self.errors * _ERROR_BYTES + rescored * self.itemsize)
        stored += file_overhead(self.matrices + vectors + 2)
        blocks, single = whole + beside + self._overhead, self._sums >= whole
        sweeping = replaced_bytes(self._sums + beside, ranks) + (0 if single else whole + blocks - self._sums)
        return Step("scores", stored, max(sweeping, blocks + whole + better + stored))

    def top_step(self, ranks: int, top: int) -> Step:
        """The highest and lowest scores: those of every block, then the result beside them."""
        each = 2 * (self.itemsize + torch.int64.itemsize)
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
    stored = sum(blocks) + (2 * sum(pairs) + train + files) * torch.int64.itemsize + (files + 1) * file_overhead(3)
    return Step("token scores", stored, stored + replaced_bytes(largest, ranks) - largest)
