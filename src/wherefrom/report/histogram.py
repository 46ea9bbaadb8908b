"""A query's scores over the whole training set as a histogram, and a score as the page writes it.

This module knows numbers; it must not know texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 144
HEIGHT = 40.0
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Histogram:
    """A query's scores over the whole training set: SVG paths in a box `bins` wide."""

    negative: str
    positive: str
    bins: int
    zero: float  # where the score 0 lies, in percent of the width
    low: str
    high: str
    quartiles: tuple[str, str]


def histogram(scores: Tensor) -> Histogram | None:
    """Counts of scores [train] in equal bins with an edge at zero; heights are logarithmic.

    Influence is heavy-tailed: nearly all sequences lie close to zero, and the few far out are the ones that matter. On
    a linear scale of counts they would not be visible.
    """
    limit = scores.abs().max().item()
    if limit == 0:
        return None
    scaled = scores / limit
    low, high = min(scaled.min().item(), 0.0), max(scaled.max().item(), 0.0)
    width = (high - low) / BINS
    below, above = math.ceil(-low / width), math.ceil(high / width)
    bins = (scaled / width).floor().long().clamp(-below, above - 1) + below
    counts = torch.bincount(bins, minlength=below + above).double()
    heights = (counts.log1p() / counts.max().log1p() * HEIGHT).tolist()
    ordered = scores.sort().values
    lower, upper = (ordered[round(part * (len(ordered) - 1))].item() for part in (0.25, 0.75))
    typical = max(abs(lower), abs(upper))
    return Histogram(
        negative=_bars(heights[:below], start=0),
        positive=_bars(heights[below:], start=below),
        bins=below + above,
        zero=round(100 * below / (below + above), 1),
        low=signed_number(ordered[0].item(), limit),
        high=signed_number(ordered[-1].item(), limit),
        quartiles=(signed_number(lower, typical), signed_number(upper, typical)),
    )


def _bars(heights: Sequence[float], start: int) -> str:
    """Bars of one unit's width with a small gap, the first at x = `start`, as one SVG path."""
    return "".join(
        f"M{x} {HEIGHT:g}v-{height:.1f}h.8v{height:.1f}z" for x, height in enumerate(heights, start) if height
    )


def signed_number(value: float, scale: float) -> str:
    """A score with its sign, with as many decimals as give a number of size `scale` four digits."""
    exponent = math.floor(math.log10(scale)) if scale > 0 else 0
    style = f",.{max(0, 3 - exponent)}f" if -4 < exponent < 6 else ".2e"
    sign = "+" if value > 0 else MINUS if value < 0 else ""
    return sign + format(abs(value), style).replace("-", MINUS)
