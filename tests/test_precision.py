"""Agreement of two score matrices: the correlations are scipy's, and the summary counts what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import stats

from wherefrom.evaluate.agreement import compare_scores
from wherefrom.runtime.errors import InputError


@st.composite
def matrices(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 8)))
    numbers = st.integers(-4, 4).map(float)  # ties, constant rows and zeros are frequent
    return draw(arrays(np.float64, shape, elements=numbers)), draw(arrays(np.float64, shape, elements=numbers))


@given(matrices(), st.sampled_from([1.0, 1e-40, 1e38]))
@settings(max_examples=80, deadline=None)
def test_correlations_are_scipys_at_any_scale_of_float32(
    pair: tuple[NDArray[np.float64], NDArray[np.float64]], scale: float
) -> None:
    reference, other = pair
    found = compare_scores(torch.from_numpy(reference * scale), torch.from_numpy(other))
    for query, (left, right) in enumerate(zip(reference, other, strict=True)):
        varies = np.ptp(left) > 0 and np.ptp(right) > 0
        spearman = stats.spearmanr(left, right).statistic if varies else 0.0
        pearson = stats.pearsonr(left, right).statistic if varies else 0.0
        assert found.spearman.values[query].item() == pytest.approx(spearman, abs=1e-12)
        assert found.pearson.values[query].item() == pytest.approx(pearson, abs=1e-12)


def test_summary_and_its_json() -> None:
    # Rank correlations of 1, 0.5 and -1.
    reference = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    other = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 2.0], [3.0, 2.0, 1.0]])
    found = compare_scores(reference, other)
    assert found.spearman.values.tolist() == pytest.approx([1, 0.5, -1])
    assert found.spearman.mean.value == pytest.approx(0.5 / 3)
    assert found.spearman.median == pytest.approx(0.5)
    assert found.spearman.worst == 2
    assert found.spearman.minimum == pytest.approx(-1)
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["spearman"]["worst_query"] == 2
    assert stored["spearman"]["mean"]["low"] == found.spearman.mean.low
    assert stored["pearson"]["queries"] == found.pearson.values.tolist()
    assert stored["train"] == 3


def test_interval_is_that_of_the_mean_over_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(300, 40, generator=generator)
    found = compare_scores(reference, reference + torch.randn(300, 40, generator=generator)).spearman
    # With this many queries the mean is nearly normal.
    low, high = stats.norm.interval(0.95, found.mean.value, stats.sem(found.values.numpy()))
    width = high - low
    assert found.mean.low == pytest.approx(low, abs=0.1 * width)
    assert found.mean.high == pytest.approx(high, abs=0.1 * width)


def test_half_precision_costs_what_rounding_costs() -> None:
    scores = torch.randn(5, 2000, generator=torch.Generator().manual_seed(0))
    found = compare_scores(scores, scores.bfloat16())
    # Rounding to 8 bits is noise of relative size u, uniform within 2^-8: a share u^2 of the variance.
    lost = 1 - found.pearson.values
    assert (lost > 0).all()
    assert (lost < 2.0**-16).all()


def test_matrices_that_cannot_be_compared_are_named() -> None:
    scores = torch.ones(2, 3)
    for other in (torch.ones(2, 4), torch.ones(3)):
        with pytest.raises(InputError, match="other: scores of shape"):
            compare_scores(scores, other)
    with pytest.raises(InputError, match="2 training examples"):
        compare_scores(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(InputError, match="needs a query"):
        compare_scores(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(InputError, match=r"other\[1, 0\] is inf"):
        compare_scores(scores, torch.tensor([[1.0, 2, 3], [torch.inf, 2, 3]]))
