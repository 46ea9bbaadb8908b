"""The baselines: BM25 against its formula, and chance that is chance."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wherefrom.methods.baselines import bm25_scores, random_scores
from wherefrom.runtime.errors import InputError

WORDS = ["a", "The", "the", "7", "über", "naïve", "x2", "snake_case"]


def bm25(queries: list[str], train: list[str]) -> list[list[float]]:
    """Kamphuis et al. 2020, table 1, "Lucene (accurate)"."""
    queried, texts = ([re.findall(r"\w+", text.lower()) for text in side] for side in (queries, train))
    mean_length = sum(map(len, texts)) / len(texts)

    def score(word: str, text: list[str]) -> float:
        holding = sum(word in each for each in texts)
        rarity = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        frequency = text.count(word)
        return rarity * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(text) / mean_length))

    return [[sum(score(word, text) for word in query) for text in texts] for query in queried]


texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=7).map(", ".join), min_size=1, max_size=6)


@given(texts, texts)
@settings(max_examples=60, deadline=None)
def test_bm25_is_lucenes_formula(queries: list[str], train: list[str]) -> None:
    queries = [*queries, "words unseen in training", ""]
    if not any(train):
        with pytest.raises(InputError, match="train: not one word"):
            bm25_scores(queries, train)
        return
    found = bm25_scores(queries, train)
    assert found.dtype == torch.float32
    for row, expected in zip(found.tolist(), bm25(queries, train), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_bm25_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    found = bm25_scores(["cats"], ["cats and dogs", "dogs"])
    assert found[0, 0] > found[0, 1] == 0
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InputError, match="queries: no texts"):
        bm25_scores([], ["cats"])


def test_random_scores_depend_on_the_seed_alone() -> None:
    first = random_scores(200, 300, seed=1)
    assert torch.equal(first, random_scores(200, 300, seed=1))
    both = torch.stack([first.flatten(), random_scores(200, 300, seed=2).flatten()])
    assert abs(both.corrcoef()[0, 1].item()) < 5 / math.sqrt(60_000)
    assert first.std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(InputError, match="train=0"):
        random_scores(3, 0, seed=0)
