"""What a fit and scores take on disk: what stays, and the most that is there at once.

Arithmetic on the sizes of what is stored. This module writes nothing, and does not know how anything is computed."""

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
            vectors: how many numbers of each training example are kept beside the scores.
            rescored: how many of each query's scores are computed again.
        """
        whole = self.queries * self.train * self.itemsize * self.matrices
        beside = vectors * self.train * self.itemsize
        errors = self.queries * (self.errors * _ERROR_BYTES + rescored * self.itemsize)
        kept = whole + beside + errors + file_overhead(self.matrices + vectors + 2)
        # Numbers beside the scores are swept with the first queries; their blocks stay until the end.
        swept, blocks = self._sums + beside, beside + self._overhead
        ended = whole + blocks + ranks * swept
        sweeping = max(replaced_bytes(swept, ranks), ended)
        if self._sums < whole:
            sweeping = max(sweeping, whole + blocks + replaced_bytes(self._sums, ranks))
        if not rescored:
            return Step("scores", kept, max(sweeping, kept + blocks))
        # Of a block of queries, their highest scores are of so many training examples at the most.
        again = min(self.train, self.block * rescored)
        highest = self.queries * rescored * (torch.int64.itemsize + self.itemsize)
        better, latest = self.queries * again * self.itemsize, self.block * again * self.itemsize
        rescoring = max(better - latest + replaced_bytes(latest, ranks), better + ranks * latest)
        exact = blocks + highest + self._overhead
        return Step("scores", kept, max(sweeping, whole + exact + rescoring, kept + exact + better))

    def top_step(self, ranks: int, top: int) -> Step:
        """The highest and lowest scores: those of every block, then the result beside them."""
        each = 2 * (self.itemsize + torch.int64.itemsize)
        kept = each * self.queries * min(top, self.train) + file_overhead(5)
        latest = each * self.block * min(top, self.shard)
        blocks = each * self.queries * self._across * min(top, self.shard) + 2 * self._overhead
        sweeping = max(blocks - latest + replaced_bytes(self._sums, ranks), blocks + ranks * self._sums)
        return Step("top scores", kept, max(sweeping, blocks + kept))

    def summed_step(self, ranks: int) -> Step:
        """Scores that are added up over queries, training examples or both: `queries` or `train` is then 1."""
        kept = self.queries * self.train * self.itemsize * self.matrices + file_overhead(self.matrices)
        blocks = kept + self._overhead
        return Step("scores", kept, blocks + max(kept, replaced_bytes(self._sums, ranks)))


def token_step(pairs: Sequence[int], longest: int, itemsize: int, part: int, train: int, ranks: int) -> Step:
    """Scores of tokens: files of bounded size, all of which stay, and an index.

    Args:
        pairs: how many each block of queries has.
        longest: tokens of the longest training example.
        part: bytes of a file, the most.
        train: training examples, whose lengths are kept.
    """
    blocks = [each * longest * itemsize for each in pairs]
    files = sum(-(-block // part) for block in blocks)
    largest = min(part, max(blocks))
    kept = sum(blocks) + (2 * sum(pairs) + train + files) * torch.int64.itemsize + (files + 1) * file_overhead(3)
    return Step("token scores", kept, kept + replaced_bytes(largest, ranks) - largest)
