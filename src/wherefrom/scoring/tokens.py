"""Scores of single tokens, and of chunks of some: which positions of a training sequence make up its score.

A weight's gradient is a sum over positions, so a score is too: position t of a training example adds
`s_t^T P a_t`, with the layer's input a_t and output gradient s_t there and the preconditioned query gradient P. The
values lie on disk, since there are as many as training tokens times queries, and are read pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.engine.sweep import Collector
from wherefrom.runtime.errors import DamagedError, InputError, LayerError, check_argument
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.results import LAYER_PARTS, OF_TOKENS, ONLY_EXTREMES, WITH_SELF_INFLUENCE, Scaled, in_notebooks
from wherefrom.store.artifacts import Artifact, Layout, check_layout, check_same, read_manifest
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.files import remove
from wherefrom.store.fingerprint import Dataset, Fingerprint, differences, tensors_digest

INDEX = "index"
_INDEX: Layout = {
    "pairs": (torch.int64, ("pair", 2)),
    "lengths": (torch.int64, ("train",)),
    "shards": (torch.int64, ("shard",)),
}

# How large a file of token scores may be: what a sweep over it holds in memory.
PART_BYTES = 2**28


def extreme_pairs(values: Tensor, count: int) -> Tensor:
    """The pairs of each query with its `count` highest and `count` lowest scores.

    Args:
        values: [query, train].

    Returns:
        int64 [pairs, 2], (query, training position).
    """
    count = min(count, values.shape[1])
    ends = torch.cat([values.topk(count, dim=1, largest=largest).indices for largest in (True, False)], 1)
    queries = torch.arange(len(values)).repeat_interleave(ends.shape[1])
    pairs: Tensor = torch.stack([queries, ends.flatten()], 1).unique(dim=0)
    return pairs


def token_parts(queries: range, train: int, chosen: Tensor | None, bytes_each: int) -> Iterator[Tensor]:
    """Cut pairs into parts of bounded size, by ascending training position.

    Args:
        queries: whose pairs are wanted.
        chosen: int64 [pairs, 2], (query, training position); None is every pair.
        bytes_each: what a pair's scores take.
    """
    fitting = max(1, PART_BYTES // bytes_each)
    if chosen is not None:
        mine = chosen[(chosen[:, 0] >= queries.start) & (chosen[:, 0] < queries.stop)]
        yield from mine[mine[:, 1].argsort(stable=True)].split(fitting)
        return
    together = max(1, fitting // len(queries))
    for start in range(0, train, together):
        examples = torch.arange(start, min(start + together, train))
        yield torch.cartesian_prod(examples, torch.arange(queries.start, queries.stop)).flip(1)


class TokenCollector(Collector):
    """Adds up, layer by layer, what every position adds to the scores of chosen pairs.

    Args:
        pairs: int64 [pairs, 2]: a query of the bank, and the position of a training example in the swept dataset, which
            does not descend.
        lengths: int64 [examples]: how many tokens each example of the swept dataset has.
        tokens: how many there is memory for, at least as many as the longest example has.
    """

    def __init__(
        self,
        bank: GradientBank,
        pairs: Tensor,
        lengths: Tensor,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._bank = bank
        self._lengths = lengths
        self._queries, self._examples = pairs.T.contiguous()
        self.sums = {"values": torch.zeros(len(pairs), tokens, dtype=dtype, device=device)}

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        tokens = int(self._lengths[batch].max())
        check_tokens(layer, captured, tokens)
        first, last = torch.searchsorted(self._examples, torch.tensor([batch.start, batch.stop])).tolist()
        queries, examples = self._queries[first:last], self._examples[first:last] - batch.start
        captured = self._bank.in_basis(layer, captured)
        for query in queries.unique().tolist():
            chosen = (queries == query).nonzero().squeeze(1)
            some = captured.examples(examples[chosen])
            products = self._bank.token_products(layer, query, some)
            if some.positions is None:
                folded = products.view(len(chosen), some.calls, tokens).sum(1)  # [chosen, tokens]
            else:
                folded = products.new_zeros(len(chosen), tokens).scatter_add_(1, some.positions.tokens, products)
            self.sums["values"][first + chosen, :tokens] += folded


def check_tokens(layer: str, captured: Captured, tokens: int) -> None:
    """Refuse a layer whose vectors belong to no single tokens.

    It must see one vector for each token of the batch's longest example, in each of its calls, or say which ones it
    sees.

    Args:
        tokens: of that example.

    Raises:
        LayerError: names the layer.
    """
    seen, calls, positions = captured.gradients.shape[1], captured.calls, captured.positions
    told = positions is not None and positions.length == tokens
    if not told and (positions is not None or not calls or seen != calls * tokens):
        raise LayerError(
            f"Layer {layer!r} sees {seen} vectors an example in {calls or 'unequal'} call(s), where the longest "
            f"example of the batch has {tokens} tokens: its part of a score belongs to no single token. Leave the "
            "layer out with `layers=[...]`, or ask for sequence scores."
        )


@dataclass(frozen=True)
class TokenScores:
    """What each token of a training example adds to its score for a query; over tokens, the values sum to the score.

    In half precision they do so up to rounding: the score's own gradient is rounded after it was summed over tokens.

    The value at position t belongs to the input token t: to what the layers read there, and to the losses at t and
    later that this influences.

    Attributes:
        folder: where the values lie.
        pairs: int64 [pairs, 2]: query and training position of each stored pair.
        lengths: int64 [train]: tokens of each training example.
        shards: how many pairs each file holds, in the order of `pairs`.
        fingerprint: what the scores were computed from.
        queries: the examples that were scored, where they are at hand.
    """

    folder: Path
    pairs: Tensor
    lengths: Tensor
    shards: Sequence[int]
    fingerprint: Fingerprint
    queries: Dataset[object] | None = field(default=None, repr=False, compare=False)
    _opened: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What they are called in their run directory."""
        return self.folder.name

    @classmethod
    def load(cls, folder: str | Path) -> TokenScores:
        """Read finished token scores, `RUN/tokens/NAME`, without the model or the data.

        Raises:
            InputError: there are no token scores.
            DamagedError: the files are not what was written.
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            raise InputError(f"{folder}: no token scores there. Compute them first, with keep=Tokens().")
        fingerprint = read_manifest(folder / INDEX)["fingerprint"]
        index = Artifact(folder / INDEX, fingerprint).load()
        check_layout(folder / INDEX, index, _INDEX)
        pairs, shards, train = index["pairs"], index["shards"], len(index["lengths"])
        if int(shards.sum()) != len(pairs) or bool((pairs < 0).any()) or bool((pairs[:, 1] >= train).any()):
            raise DamagedError(
                f"{folder / INDEX} cannot be used: its pairs are not those of its files. Delete {folder}, and compute "
                "it again."
            )
        return cls(folder, index["pairs"], index["lengths"], index["shards"].tolist(), fingerprint)

    def _repr_html_(self) -> str | None:
        return in_notebooks(self)

    def differences(self, scores: Fingerprint) -> list[str]:
        """What these were computed from and sequence scores were not, or the other way round; empty if they match."""
        return differences(*(of_values(each) for each in (self.fingerprint, scores)))

    def __contains__(self, pair: tuple[int, int]) -> bool:
        """Whether (query, training position) is stored."""
        return self._index(pair) is not None

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        """The values of (query, training position), one for each token of the training example.

        Raises:
            InputError: the pair is not stored.
            DamagedError: its file is not what was written.
        """
        index = self._index(pair)
        if index is None:
            raise InputError(
                f"{self.folder} holds no token scores of query {pair[0]} and training example {pair[1]}: it has "
                f"{self.fingerprint[OF_TOKENS]}. Compute them with a larger `top`, or for all pairs."
            )
        shard = 0
        while index >= self.shards[shard]:
            index, shard = index - self.shards[shard], shard + 1
        return self._shard(shard)[index, : int(self.lengths[pair[1]])].clone()

    @property
    def values(self) -> Tensor:
        """All of them in memory, [query, train, token]; zero past an example's end and for pairs that are not stored.

        For a small study; `scores[query, train]` reads single pairs of a large one.
        """
        stored = torch.cat([self._shard(number) for number in range(len(self.shards))])  # [pairs, token]
        queries = int(self.pairs[:, 0].max()) + 1
        dense = stored.new_zeros(queries, len(self.lengths), stored.shape[1])
        dense[self.pairs[:, 0], self.pairs[:, 1]] = stored
        return dense

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Each stored pair as one number, ascending, and where it is stored."""
        return (self.pairs[:, 0] * len(self.lengths) + self.pairs[:, 1]).sort()

    def _index(self, pair: tuple[int, int]) -> int | None:
        query, train = pair
        if query < 0 or not 0 <= train < len(self.lengths):
            return None
        keys, indices = self._sorted
        key = query * len(self.lengths) + train
        found = int(torch.searchsorted(keys, key))
        return int(indices[found]) if found < len(keys) and keys[found] == key else None

    def _shard(self, number: int) -> Tensor:
        """The values of one file, [pairs, token], memory-mapped once it has been checked."""
        if number not in self._opened:
            pairs = self._pairs(number)
            artifact = Artifact(self.folder / part_name(pairs), part_fingerprint(self.fingerprint, pairs))
            check_same(artifact.path, read_manifest(artifact.path)["fingerprint"], artifact.fingerprint)
            tensors = artifact.mapped()
            check_layout(artifact.path, tensors, {"values": (None, (len(pairs), "token"))})
            self._opened[number] = tensors["values"]
        return self._opened[number]

    def _pairs(self, number: int) -> Tensor:
        start = sum(self.shards[:number])
        return self.pairs[start : start + self.shards[number]]


class ChunkHit(NamedTuple):
    """One chunk of a training example behind a query, the tokens from `start` to before `stop`; rank 1 is the most
    influential."""

    query: int
    rank: int
    train: int
    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class TopChunks(Scaled):
    """Each query's highest and lowest scores of chunks: what some tokens of a training example add to its score.

    Of equal scores, the one of the earlier training example and chunk comes first.

    Attributes:
        values: the highest, best first, [query, k].
        train: the training positions, int64 [query, k]; several chunks can be of one example.
        spans: the first token of each chunk, and the one after its last, int64 [query, k, 2].
        lowest_values, lowest_train, lowest_spans: of the lowest, lowest first.
        fingerprint, rise_per_score, queries: as in `Scores`.
    """

    values: Tensor
    train: Tensor
    spans: Tensor
    lowest_values: Tensor
    lowest_train: Tensor
    lowest_spans: Tensor
    fingerprint: Fingerprint
    rise_per_score: Tensor | None = None
    queries: Dataset[object] | None = field(default=None, repr=False, compare=False)

    def top(self, k: int = 10) -> list[ChunkHit]:
        """The k most influential chunks of each query, best first, query by query.

        Raises:
            InputError: k is less than 1, or more than there are.
        """
        count = self.values.shape[1]
        check_argument(1 <= k <= count, "k", k, f"1 to {count}, which were asked for")
        found = []
        for query in range(len(self.values)):
            parts = (each[query, :k].tolist() for each in (self.train, self.spans, self.values))
            for rank, (train, (start, stop), score) in enumerate(zip(*parts, strict=True), start=1):
                found.append(ChunkHit(query, rank, train, start, stop, score))
        return found


def token_part(cache: Cache, pairs: Tensor, compute: Callable[[Unfinished], Mapping[str, Tensor]]) -> None:
    """Have the file of some pairs, computed unless it is there; named by its pairs: another memory cuts other parts."""
    replace(cache, fingerprint=part_fingerprint(cache.fingerprint, pairs)).get_or_compute(part_name(pairs), compute)


def remove_other_parts(folder: Path, parts: Sequence[Tensor]) -> None:
    """Delete what an earlier run has cut otherwise."""
    wanted = {INDEX, *map(part_name, parts)}
    for path in list(folder.iterdir()):
        if path.name.partition(".")[0] not in wanted:
            remove(path)


def part_name(pairs: Tensor) -> str:
    """The name of the file of some pairs."""
    return tensors_digest({"pairs": pairs})[:16]


def part_fingerprint(scores: Fingerprint, pairs: Tensor) -> Fingerprint:
    """What one file of token scores depends on: another memory may have cut other files."""
    return {**scores, "pairs": tensors_digest({"pairs": pairs})}


def of_values(fingerprint: Fingerprint) -> dict[str, str]:
    """What the values of scores depend on, without what is stored of them or beside them."""
    stored = (LAYER_PARTS, WITH_SELF_INFLUENCE, ONLY_EXTREMES, OF_TOKENS)
    return {name: value for name, value in fingerprint.items() if name not in stored}
