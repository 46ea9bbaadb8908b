"""Sampled targets follow the right distribution and depend on the seed and the example only."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wherefrom.tasks.sampling import Sampler


def drawn_one_by_one(seed: int, example: int, logits: torch.Tensor) -> list[int]:
    """One row's draws, from [positions, classes]: for each, down a tree of Python numbers."""
    digest = hashlib.sha256(f"{seed}/{example}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    draws = []
    for position in logits.double():
        probabilities = position.softmax(0).tolist()
        start, size = 0, 2 ** max(1, (len(probabilities) - 1).bit_length())
        for uniform in torch.rand(size.bit_length() - 1, generator=generator, dtype=torch.float64).tolist():
            size //= 2
            left, both = sum(probabilities[start : start + size]), sum(probabilities[start : start + 2 * size])
            start += size if uniform * both >= left and len(probabilities) > 1 else 0
        draws.append(start)
    return draws


@given(
    classes=st.integers(1, 70) | st.sampled_from([127, 128, 129, 500]),
    length=st.integers(1, 20),
    seed=st.integers(0, 99),
    chunk_bytes=st.sampled_from([1, 2**10, 2**21]),
)
@settings(max_examples=60, deadline=None)
def test_draws_are_those_of_walking_down_a_tree(classes: int, length: int, seed: int, chunk_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, length, classes, generator=generator, dtype=torch.float64)
    where = torch.rand(2, length, generator=generator) < 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wherefrom.tasks.losses._CHUNK_BYTES_PER_THREAD", chunk_bytes)
        found = Sampler(seed, [8, 5]).categorical(logits, where)
    assert (found[~where] == 0).all()
    for row, example in enumerate([8, 5]):
        assert found[row, where[row]].tolist() == drawn_one_by_one(seed, example, logits[row, where[row]])


@pytest.mark.parametrize("depth", [1, 3, 16])
@pytest.mark.parametrize("few", [1, 5, 100])
def test_more_numbers_of_a_stream_begin_with_the_fewer(few: int, depth: int) -> None:
    """What the draws rest on: they take numbers for all positions, and use those of the counted ones."""
    more = torch.empty(257, depth, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(3))
    fewer = torch.rand(few, depth, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(more[:few], fewer)


@pytest.mark.parametrize("where", [None, torch.empty(2, 9, dtype=torch.bool, device="meta")])
def test_no_value_is_looked_at(where: torch.Tensor | None) -> None:
    """Tensors without values have none to look at: a GPU would have been waited for."""
    sampler, logits = Sampler(0, [0, 1]), torch.empty(2, 9, 50, device="meta")
    assert sampler.categorical(logits, where).shape == (2, 9)
    assert sampler.normal(logits).shape == (2, 9, 50)


def test_narrow_logits_are_drawn_from_in_float32() -> None:
    logits = torch.randn(2, 3000, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(Sampler(0, [0, 1]).categorical(logits), Sampler(0, [0, 1]).categorical(logits.float()))


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
