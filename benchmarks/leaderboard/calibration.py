"""Scores as predictions, in nats a token, held against what retraining measured. This module knows numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.evaluate.datamodels import IntervalEstimate
from wherefrom.evaluate.retrainings import GroundTruth

RESAMPLES, BINS = 1000, 12

Array = NDArray[np.float64]


def calibration(values: Tensor, truth: GroundTruth, whole: Tensor, tokens: Tensor) -> dict[str, Any]:
    """How the rises of queries' losses that scores predict go with the measured ones, over removals x queries.

    Args:
        values: [queries, train], in units of the rise of a query's summed loss when the example is left out.
        truth: trainings without some of the examples.
        whole: each query's summed loss after the training with all of them, [queries].
        tokens: that each query's loss is a sum over, [queries].

    Returns:
        The slope of the least-squares line through the origin that gives measured rises from predicted ones (1 where
        scores are of the right size), and Pearson's correlation, each with a 95% interval from a two-way bootstrap over
        removals and queries; and the points of a curve: mean predicted and measured rises of equally large groups, in
        the order of the predicted ones. Rises are in nats a token.
    """
    predicted: Array = ((~truth.masks).double() @ values.double().T / tokens).numpy()  # [removals, queries]
    measured: Array = ((truth.losses.mean(1) - whole) / tokens).numpy()
    generator = np.random.default_rng(0)
    draws = [generator.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in predicted.shape]
    one = np.ones_like(predicted)
    pairs = (predicted, measured, predicted**2, measured**2, predicted * measured)
    # Sums over all pairs, of the measured ones first and then of each resample: [1 + RESAMPLES] each.
    sums = [np.append(each.sum(), np.einsum("rs,sq,rq->r", draws[0], each, draws[1], optimize=True)) for each in pairs]
    slopes = sums[4] / sums[2]
    p, m, pp, mm, pm = (each / one.size for each in sums)
    correlations = (pm - p * m) / np.sqrt((pp - p**2) * (mm - m**2))
    groups = np.array_split(predicted.ravel().argsort(), BINS)
    return {
        "slope": IntervalEstimate.of_resamples(float(slopes[0]), slopes[1:]).to_json(),
        "pearson": IntervalEstimate.of_resamples(float(correlations[0]), correlations[1:]).to_json(),
        "curve": [[float(each.ravel()[group].mean()) for each in (predicted, measured)] for group in groups],
    }
