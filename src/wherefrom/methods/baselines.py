"""Scores that cost next to nothing, which a method of attribution has to beat: chance, and shared words.

This module knows counts and texts; it must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError

WORD = r"(?u)\w+"


def random_scores(queries: int, train: int, seed: int) -> Tensor:
    """Independent standard normal scores [queries, train], float32; the same for the same seed.

    Raises:
        InputError: a count is less than 1.
    """
    for name, count in (("queries", queries), ("train", train)):
        if count < 1:
            raise InputError(f"{name}={count}: expected at least 1.")
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
    words = _words(train)  # [train] lists
    if not any(words):
        raise InputError(f"train: not one word in {len(train)} texts; expected texts, not their token numbers.")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float32")
    index.index(words, create_empty_token=False, show_progress=False)
    rows = [index.get_scores_from_ids(index.get_tokens_ids(query)) for query in _words(queries)]  # each [train]
    return torch.stack([torch.from_numpy(row) for row in rows])


def _words(texts: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = bm25s.tokenize(
        list(texts), token_pattern=WORD, stopwords=[], return_ids=False, show_progress=False
    )
    return found
