"""Products of queries with all stored sketches, and the highest and lowest of them.

Signs and whole numbers are multiplied with queries of 8 bits, whose products add up exactly: the same to the last bit
on any device, in any block, beside any other query. Codes are unpacked a block at a time, small enough for a
processor's cache, and each core goes through its own part of the shards. A few queries of a large index first look for
signs that agree, by counting bits. This module knows sketches and the shards that they are in; it does not know how
these came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from wherefrom.methods.index.sketches import CODES, LARGEST, NORMS, SCALES, Sketch, whole_numbers
from wherefrom.methods.index.store import Shard

# Codes that are unpacked at a time, or have their bits counted: what a processor's cache holds eight times, or once.
_BLOCK_BYTES, _COUNTED_BYTES, _DEVICE_BLOCK_BYTES = 2**17, 2**19, 2**24
# Of an example, unpacked at a time: whole examples would be too few in a block to be worth arranging the queries for.
_WIDTH_BYTES = 2**10
# Scores that are together in memory before the best of them are chosen.
_SCORES = 2**22
# So few queries count bits first, of an index of so many examples, and then multiply this part of it.
_FEW, _MANY, _PART = 4, 2**15, 2**7


_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
_Chosen = tuple[Shard, Tensor | None]
Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Search:
    """A search through shards of sketches.

    Attributes:
        device: where products are computed.
    """

    sketch: Sketch
    shards: Sequence[Shard]
    device: torch.device

    def best(self, counters: Tensor, norms: Tensor, k: int, normalized: bool = False) -> dict[str, Tensor]:
        """The fields of `TopScores`; of equal scores, the one of the earlier training example comes first.

        Args:
            counters: of the queries, [queries, numbers]; norms: theirs, [queries].
            normalized: divide by the norms of both gradients.
        """
        chosen: Sequence[Tensor | None] = [None] * len(self.shards)
        if len(counters) <= _FEW and self._counts_bits:
            chosen = self._agreeing(counters, normalized)
        queries = _Queries(self.sketch, counters.to(self.device))
        search = partial(self._part, queries, norms if normalized else None, k)
        work = list(zip(self.shards, chosen, strict=True))
        if self.device.type != "cpu":
            return search(work)
        parts = min(len(work), torch.get_num_threads())
        return _extremes(_on_each_core(search, [work[start::parts] for start in range(parts)]), k)

    def _part(self, queries: _Queries, norms: Tensor | None, k: int, work: Sequence[_Chosen]) -> dict[str, Tensor]:
        """The best of some shards."""
        found: list[dict[str, Tensor]] = []
        for shard, chosen in work:
            found.append(self._scores(queries, norms, shard, chosen))
            if sum(each["values"].numel() for each in found) >= _SCORES:
                found = [_extremes(found, k)]
        return _extremes(found, k)

    def _scores(
        self, queries: _Queries, norms: Tensor | None, shard: Shard, chosen: Tensor | None
    ) -> dict[str, Tensor]:
        """Scores [queries, n] of a shard's examples, or of those that are chosen, as their own highest and lowest."""
        factors, positions = _factors(shard, norms is not None), shard.positions
        if chosen is not None:
            factors, positions = factors[chosen], positions[chosen]
        values = queries.products(self._blocks(shard, chosen)) * factors
        if norms is not None:
            values = torch.where(norms.unsqueeze(1) > 0, values / norms.unsqueeze(1), 0.0)
        positions = positions.expand_as(values)
        return {"values": values, "train": positions, "lowest_values": values, "lowest_train": positions}

    def _blocks(self, shard: Shard, chosen: Tensor | None = None, counted: bool = False) -> Iterator[Tensor]:
        """Codes [n, width] of a shard's examples, or of those that are chosen, some at a time."""
        width, size = self.sketch.code_bytes, _COUNTED_BYTES if counted else _DEVICE_BLOCK_BYTES
        if self.device.type == "cpu" and not counted:
            width, size = min(width, _WIDTH_BYTES), _BLOCK_BYTES
        count = max(1, size // width)
        codes, examples = shard.tensors[CODES], shard.examples
        if chosen is not None:
            examples = chosen if examples is None else examples[chosen]
        yield from codes.split(count) if examples is None else (codes[each] for each in examples.split(count))

    @property
    def _counts_bits(self) -> bool:
        many = sum(len(each.positions) for each in self.shards) >= _MANY
        return many and self.sketch.bits == 1 and self.device.type == "cpu"

    def _agreeing(self, counters: Tensor, normalized: bool) -> list[Tensor]:
        """In each shard, which examples' signs agree most with those of any query, or least: a part of the index."""
        signs = self._signs(counters)
        counted = _on_each_core(lambda shard: self._agreement(shard, signs, normalized), self.shards)
        agreement = torch.cat(counted, 1)  # [queries, examples]
        count, examples = agreement.shape[1] // _PART, agreement.shape[1]
        least, most = (np.partition(agreement.numpy(), end)[:, [end]] for end in (count - 1, examples - count))
        wanted = ((agreement <= torch.from_numpy(least)) | (agreement >= torch.from_numpy(most))).any(0)
        return [each.nonzero().squeeze(1) for each in wanted.split([len(shard.positions) for shard in self.shards])]

    def _signs(self, counters: Tensor) -> _Words:
        """The signs of queries in machine words, [queries, words]."""
        return self.sketch.packed(counters, counters[:, 0])[CODES].numpy().view(np.uint64)

    def _agreement(self, shard: Shard, signs: _Words, normalized: bool) -> Tensor:
        """The products of signs alone, as scores [queries, n]."""
        found = []
        for block in self._blocks(shard, counted=True):
            words = block.numpy().view(np.uint64)  # [n, words]
            found.append(np.stack([np.bitwise_count(words ^ each).sum(1, dtype=np.int32) for each in signs]))
        unlike = torch.from_numpy(np.concatenate(found, 1))
        return (self.sketch.numbers - 2 * unlike) * _factors(shard, normalized)


def _on_each_core(function: Callable[[Input], Output], inputs: Sequence[Input]) -> list[Output]:
    """What a function returns of each of them, by as many threads as PyTorch has, each of which has one of its own."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, inputs))
    finally:
        torch.set_num_threads(threads)  # for threads that begin later


class _Queries:
    """Queries as the operands of products with codes.

    Args:
        counters: [queries, numbers].
    """

    def __init__(self, sketch: Sketch, counters: Tensor) -> None:
        self._sketch, self._counters = sketch, counters
        self._whole, scales = whole_numbers(counters)
        self._scales = scales.unsqueeze(1).cpu()
        self._sums = self._whole.sum(1, keepdim=True, dtype=torch.int32).cpu()

    def products(self, codes: Iterable[Tensor]) -> Tensor:
        """Of the counters of each query and of each example in some blocks of codes [n, width], [queries, all n]."""
        found = torch.cat([self._products(each.to(self._counters.device)).cpu() for each in codes], 1)
        if self._sketch.bits == 32:
            return found
        if self._sketch.bits == 1:  # found are the sums of the counters where a bit is 1
            found.mul_(2).sub_(self._sums)
        return found * self._scales

    def _products(self, codes: Tensor) -> Tensor:
        if self._sketch.bits == 32:
            return self._counters @ codes.T
        if self._sketch.bits == 8:
            return _whole_products(self._whole, codes, LARGEST)
        width = _WIDTH_BYTES if codes.device.type == "cpu" else codes.shape[1]
        parts = zip(self._whole.split(8 * width, 1), codes.split(width, 1), strict=True)
        return reduce(Tensor.add_, (_whole_products(whole, unpacked(bits), 1) for whole, bits in parts))


def unpacked(codes: Tensor) -> Tensor:
    """Bits [n, bytes] as 0 and 1, int8 [n, 8 bytes], a byte's lowest first."""
    if codes.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1, bitorder="little")).view(torch.int8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(2) >> places).bitwise_and_(1).flatten(1).view(torch.int8)


def _whole_products(left: Tensor, right: Tensor, largest: int) -> Tensor:
    """left [m, k] times right^T, of right [n, k], both int8, without rounding: int32 [m, n].

    Args:
        largest: of the right.
    """
    if left.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch._int_mm(left, right.T)
    length = 2**24 // (largest * LARGEST)  # sums up to 2^24 are exact in float32
    total = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for one, other in zip(left.split(length, 1), right.split(length, 1), strict=True):
        total += (one.float() @ other.float().T).int()
    return total


def _factors(shard: Shard, normalized: bool) -> Tensor:
    """What products with a shard's codes are to be multiplied with, [n]."""
    scales, norms = shard.tensors[SCALES], shard.tensors[NORMS]
    if normalized:
        scales = torch.where(norms > 0, scales / norms, 0.0)
    return scales if shard.examples is None else scales[shard.examples]


def _extremes(found: Sequence[dict[str, Tensor]], k: int) -> dict[str, Tensor]:
    """The fields of `TopScores` of what was found in several parts of an index, each of them such fields."""
    best: dict[str, Tensor] = {}
    for prefix, sign in (("", 1), ("lowest_", -1)):
        first, *others = ((each[f"{prefix}values"], each[f"{prefix}train"]) for each in found)
        if first[0].shape[1] == k:  # what is worse than the last of them for every query is out
            last, able = first[0][:, -1:], torch.ge if sign > 0 else torch.le
            columns = [np.flatnonzero(able(values, last).numpy().any(0)) for values, _ in others]
            others = [(values[:, each], train[:, each]) for (values, train), each in zip(others, columns, strict=True)]
        these, those = (torch.cat(each, 1) for each in zip(first, *others, strict=True))
        these = sign * these
        count = min(k, these.shape[1])
        # All that are equal to the last of them are looked at, since their positions decide.
        last = these.topk(count, 1).values[:, -1:]
        among = int((these >= last).sum(1).max())
        chosen = these.topk(among, 1).indices
        chosen = chosen.gather(1, those.gather(1, chosen).argsort(1))
        order = these.gather(1, chosen).argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen = chosen.gather(1, order)
        best |= {f"{prefix}values": sign * these.gather(1, chosen), f"{prefix}train": those.gather(1, chosen)}
    return best
