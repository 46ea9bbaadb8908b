"""Scores that cost next to nothing, which a method of attribution has to beat: chance, and shared words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError, check_argument, require
from wherefrom.scoring.keep import Keep
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import MODEL, Dataset, read_example

WORD = r"(?u)\w+"


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Chance: independent standard normal numbers.

    Attributes:
        seed: of the numbers.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        def compute(_: Unfinished) -> Mapping[str, Tensor]:
            return {"values": random_scores(len(queries), len(context.train), self.seed)}

        return Job("random", {"seed": str(self.seed)}, compute, without=[MODEL])


@dataclass(frozen=True, kw_only=True)
class BM25(Method):
    """Shared words of the examples' texts (see `bm25_scores`); of examples without a text, shared tokens.

    Attributes:
        column: of the text.
    """

    column: str = "text"

    name: ClassVar[str] = "bm25"

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        def compute(_: Unfinished) -> Mapping[str, Tensor]:
            return {"values": bm25_scores(self.texts(queries.dataset), self.texts(context.train.dataset))}

        return Job("bm25", {"column": self.column}, compute, without=[MODEL])

    def texts(self, dataset: Dataset[object]) -> list[str]:
        """What is read of each example.

        Raises:
            InputError: one has neither a text nor tokens.
        """
        found = []
        for position in range(len(dataset)):
            example = read_example(dataset, position)
            columns = example if isinstance(example, Mapping) else {}
            text = columns.get(self.column)
            if text is None and "input_ids" in columns:
                text = " ".join(map(str, torch.as_tensor(columns["input_ids"]).flatten().tolist()))
            if not isinstance(text, str):
                raise InputError(
                    f"BM25: example {position} has no text in {self.column!r}; it has {sorted(map(str, columns))}. "
                    "Give examples with a column of texts, and its name."
                )
            found.append(text)
        return found


def random_scores(queries: int, train: int, seed: int) -> Tensor:
    """Independent standard normal scores [queries, train], float32; the same for the same seed.

    Raises:
        InputError: a count is less than 1.
    """
    for name, count in (("queries", queries), ("train", train)):
        check_argument(count >= 1, name, count, "at least 1")
    return torch.randn(queries, train, generator=torch.Generator().manual_seed(seed))


def bm25_scores(queries: Sequence[str], train: Sequence[str]) -> Tensor:
    """BM25 of each training text for each query, [queries, train] float32; 0 where they share no word.

    Lucene's variant (Kamphuis et al. 2020) with k1 = 1.5 and b = 0.75: a sum over the query's words, a repeated word
    each time, of `log(1 + (N - n + 0.5) / (n + 0.5)) * f / (f + k1 (1 - b + b length / mean length))`, where n of the N
    training texts hold the word and f is how often this one does.

    Words are runs of letters and digits in lower case, as they stand: no stemming, and no list of stop words, which
    would tie the baseline to English; the logarithm makes words that stand everywhere count little. Scripts written
    without spaces would need a tokenizer of their own. Words of a query that no training text holds add nothing.

    Args:
        queries: texts.
        train: texts.

    Raises:
        InputError: there are no queries, or no training text has a word.
    """
    if not queries:
        raise InputError("queries: no texts; give at least one.")
    return SharedWords(train).scores(queries)


class SharedWords:
    """Training texts that are searched by their words again and again, as `bm25_scores` says.

    Raises:
        InputError: no training text has a word.
    """

    def __init__(self, train: Sequence[str]) -> None:
        words = _words(train)  # [train] lists
        if not any(words):
            raise InputError(f"train: not one word in {len(train)} texts; expected texts, not their token numbers.")
        self._index = require("bm25s", "evaluate").BM25(method="lucene", k1=1.5, b=0.75, dtype="float32")
        self._index.index(words, create_empty_token=False, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Tensor:
        """BM25 of each training text for each query, [queries, train] float32."""
        index = self._index
        scores = [index.get_scores_from_ids(index.get_tokens_ids(query)) for query in _words(queries)]  # each [train]
        return torch.stack([torch.from_numpy(each) for each in scores])


def _words(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = require("bm25s", "evaluate").tokenize(
        list(texts), token_pattern=WORD, stopwords=[], return_ids=False, show_progress=False
    )
    return found
