"""Sampled targets follow the right distribution and depend on the seed and the example only."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wherefrom.sampling import Sampler


@given(classes=st.integers(1, 40), rows=st.integers(1, 5), length=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_row_draws_the_same_alone_and_in_a_padded_batch(classes: int, rows: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, classes, generator=generator)
    where = torch.rand(rows, length, generator=generator) < 0.7
    together = Sampler(seed, list(range(rows))).categorical(logits, where)
    assert int(together.max()) < classes
    for row in range(rows):
        kept = where[row]
        alone = Sampler(seed, [row]).categorical(logits[row, kept][None])
        assert torch.equal(alone[0], together[row, kept])


def test_classes_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.25, 0.049, 0.001])
    draws = 200_000
    logits = probabilities.log().expand(1, draws, len(probabilities))
    counts = torch.bincount(Sampler(1, [0]).categorical(logits).flatten(), minlength=len(probabilities))
    assert counts[1] == 0
    possible = probabilities > 0
    expected = (probabilities[possible].double() * draws).numpy()
    assert stats.chisquare(counts[possible].numpy(), expected * draws / expected.sum()).pvalue > 1e-3


def test_normal_draws_are_normal_around_their_mean() -> None:
    mean = torch.full((2, 20_000), 3.0, dtype=torch.float64)
    drawn = Sampler(1, [4, 5]).normal(mean) - 3.0
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1] + 3.0, Sampler(1, [5]).normal(mean[:1])[0])


def test_small_rounding_differences_rarely_change_a_draw() -> None:
    """Other batch sizes move logits by rounding; with a large vocabulary the draws must be nearly all the same."""
    logits = torch.randn(4, 250, 5000, generator=torch.Generator().manual_seed(0)) * 4
    sampler = Sampler(0, [0, 1, 2, 3])
    moved = logits + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    changed = (sampler.categorical(logits) != sampler.categorical(moved)).sum()
    assert int(changed) <= 1
