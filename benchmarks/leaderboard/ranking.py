"""What the retrainings say of the methods, as numbers for the page. This module knows scores and losses alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wherefrom.evaluate.datamodels import IntervalEstimate, evaluate_lds
from wherefrom.evaluate.retrainings import GroundTruth

REFERENCE = "ekfac"


def ranking(scores: Mapping[str, Tensor], truth: GroundTruth) -> dict[str, Any]:
    """Linear datamodeling scores, best first; each with its difference from EK-FAC, and what it is not told from."""
    report = evaluate_lds(scores, truth)
    ordered = sorted(report.means, key=lambda name: -report.means[name].value)
    return {
        "ceiling": report.ceiling.to_json() if report.ceiling else None,
        "queries": len(next(iter(report.queries.values()))),
        "train": report.train,
        "resamples": report.resamples,
        "methods": {
            name: {
                **report.means[name].to_json(),
                "repeats": report.repeats,
                "from_reference": None if name == REFERENCE else report.difference(name, REFERENCE).to_json(),
                "not_told_from": [
                    other for other in ordered if other != name and _includes_zero(report.difference(name, other))
                ],
            }
            for name in ordered
        },
    }


def _includes_zero(difference: IntervalEstimate) -> bool:
    return difference.low <= 0 <= difference.high
