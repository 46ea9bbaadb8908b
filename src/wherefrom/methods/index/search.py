"""Products of queries with all stored sketches, and the highest and lowest of them.

Signs and whole numbers are multiplied with queries of 8 bits, whose products add up exactly: the same to the last bit
on any device, in any block, beside any other query. Codes are unpacked a block at a time, small enough for a
processor's cache. A few queries of a large index first look for signs that agree, by counting bits. This module knows
sketches and the shards that they are in; it does not know how these came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wherefrom.methods.index.sketches import CODES, LARGEST, NORMS, SCALES, Sketch, whole_numbers
from wherefrom.methods.index.store import Shard

# Codes that are unpacked at a time, or have their bits counted: what a processor's cache holds eight times, or once.
_BLOCK_BYTES, _COUNTED_BYTES, _DEVICE_BLOCK_BYTES = 2**17, 2**19, 2**24
# Scores that are together in memory before the best of them are chosen.
_SCORES = 2**22
# So few queries count bits first, of an index of so many examples, and then multiply this part of it.
_FEW, _MANY, _PART = 4, 2**15, 2**7


_Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


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
        best: dict[str, Tensor] = {}
        waiting: list[tuple[Tensor, Tensor]] = []
        for values, positions in self._scores(counters, norms, normalized):
            waiting.append((values, positions))
            if sum(each.numel() for each, _ in waiting) >= _SCORES:
                best, waiting = _extremes(best, waiting, k), []
        return _extremes(best, waiting, k) if waiting else best

    def _scores(self, counters: Tensor, norms: Tensor, normalized: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores [queries, n] of training examples, and their positions [n], shard by shard."""
        chosen: Sequence[Tensor | None] = [None] * len(self.shards)
        if len(counters) <= _FEW and self._counts_bits:
            chosen = self._agreeing(counters, normalized)
        queries = _Queries(self.sketch, counters.to(self.device))
        for shard, these in zip(self.shards, chosen, strict=True):
            factors, positions = _factors(shard, normalized), shard.positions
            if these is not None:
                factors, positions = factors[these], positions[these]
            values, start = counters.new_empty(len(counters), len(positions), device="cpu"), 0
            for block in self._blocks(shard, these):
                values[:, start : start + len(block)] = queries.products(block.to(self.device)).T
                start += len(block)
            values *= factors
            if normalized:
                values = torch.where(norms.unsqueeze(1) > 0, values / norms.unsqueeze(1), 0.0)
            yield values, positions

    def _blocks(self, shard: Shard, chosen: Tensor | None = None, counted: bool = False) -> Iterator[Tensor]:
        """Codes [n, width] of a shard's examples, or of those that are chosen, some at a time."""
        size = _DEVICE_BLOCK_BYTES if self.device.type != "cpu" else _COUNTED_BYTES if counted else _BLOCK_BYTES
        count = max(1, size // self.sketch.code_bytes)
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
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            counted = pool.map(lambda shard: self._agreement(shard, signs, normalized), self.shards)
            agreement = torch.cat(list(counted), 1)  # [queries, examples]
        count = agreement.shape[1] // _PART
        ends = [agreement.topk(count, 1, largest).indices for largest in (True, False)]
        wanted = torch.zeros(agreement.shape[1], dtype=torch.bool)
        wanted[torch.cat(ends).flatten()] = True
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


class _Queries:
    """Queries as the operands of products with codes.

    Args:
        counters: [queries, numbers].
    """

    def __init__(self, sketch: Sketch, counters: Tensor) -> None:
        self._sketch, self._counters = sketch, counters
        self._whole, self._scales = whole_numbers(counters)
        self._sums = self._whole.sum(1, dtype=torch.int32)

    def products(self, codes: Tensor) -> Tensor:
        """Of the counters of each query and of each example, [n, queries]."""
        if self._sketch.bits == 32:
            return codes @ self._counters.T
        if self._sketch.bits == 8:
            return _whole_products(codes, self._whole, LARGEST) * self._scales
        ones = _whole_products(unpacked(codes), self._whole, 1)  # sums of the counters where a bit is 1
        return ones.mul_(2).sub_(self._sums) * self._scales


def unpacked(codes: Tensor) -> Tensor:
    """Bits [n, bytes] as 0 and 1, int8 [n, 8 bytes], a byte's lowest first."""
    if codes.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1, bitorder="little")).view(torch.int8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (codes.unsqueeze(2) >> places).bitwise_and_(1).flatten(1).view(torch.int8)


def _whole_products(left: Tensor, right: Tensor, largest: int) -> Tensor:
    """left [n, k] times right^T, of right [m, k], both int8, without rounding: int32 [n, m].

    Args:
        largest: of the left.
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


def _extremes(before: dict[str, Tensor], parts: Sequence[tuple[Tensor, Tensor]], k: int) -> dict[str, Tensor]:
    """The fields of `TopScores` of what was found before, and of scores [queries, n] with positions [n]."""
    values = torch.cat([each for each, _ in parts], 1)
    positions = torch.cat([each for _, each in parts]).expand_as(values)
    found: dict[str, Tensor] = {}
    for prefix, sign in (("", 1), ("lowest_", -1)):
        these, those = values, positions
        if before:
            best = before[f"{prefix}values"]
            if best.shape[1] == k:  # what is worse than the last of them for every query is out
                able = (sign * values >= sign * best[:, -1:]).any(0).nonzero().squeeze(1)
                these, those = values[:, able], positions[:, able]
            these, those = torch.cat([best, these], 1), torch.cat([before[f"{prefix}train"], those], 1)
        count = min(k, these.shape[1])
        # All that are equal to the last of them are looked at, since their positions decide.
        last = (sign * these).topk(count, 1).values[:, -1:]
        among = int((sign * these >= last).sum(1).max())
        chosen = (sign * these).topk(among, 1).indices
        chosen = chosen.gather(1, those.gather(1, chosen).argsort(1))
        order = (sign * these.gather(1, chosen)).argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen = chosen.gather(1, order)
        found |= {f"{prefix}values": these.gather(1, chosen), f"{prefix}train": those.gather(1, chosen)}
    return found
