"""`docs/leaderboard.md`, its plots and the README's table out of the leaderboard's figures.

This module computes no figure of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from tables import README, rendered, with_block
from workload import ROOT

from leaderboard.methods import METHODS
from leaderboard.plots import calibration_curves, score_against_cost
from wherefrom.evaluate.plots import save_png

DOCUMENT, IMAGES = ROOT / "docs" / "leaderboard.md", ROOT / "docs" / "images"

# The methods that the README shows, and those in the plot of predicted rises.
SHORT = (
    "magic", "trajectory flow, 8 iterations, 100 examples, half precision",
    "trajectory flow, 5 iterations, 40 examples, half precision",
    "flow, 8 iterations, 100 examples, half precision", "flow, 5 iterations, 40 examples, half precision",
    "block cg, no factors, 8 iterations, 100 examples, half precision", "astra, all weights, 40 batches",
    "fisher, all weights", "shampoo, adam, all weights", "ekfac, all weights", "shampoo", "ekfac", "kfac",
    "source, adam", "trackstar", "logra", "bm25", "trak", "dot", "random",
)  # fmt: skip
CURVES = {
    "Damping 1/tau x P^-1": (
        "flow, 8 iterations, 100 examples, half precision",
        "block cg, no factors, 8 iterations, 100 examples, half precision", "fisher, adam, all weights, 1/tau",
    ),
    "Kronecker factors, 0.1 x mean eigenvalue": ("shampoo, adam, all weights", "ekfac, all weights", "ekfac"),
}  # fmt: skip


def write_page(result: Mapping[str, Any], second: Mapping[str, Any], third: Mapping[str, Any]) -> None:
    """Write all of it.

    Args:
        second, third: of the other boards.
    """
    # Each run has measured some rows: the last one's choice is not what gave all.
    result, second, third = ({**each, "command": _whole(each["command"])} for each in (result, second, third))
    rises = {name: (mean(found), stdev(found) / len(found) ** 0.5) for name, found in result["rises"].items()}
    figures = {"result": result, "second": second, "third": third, "rises": rises, "methods": METHODS}
    DOCUMENT.write_text(rendered("leaderboard.md.jinja", **figures))
    short = rendered("leaderboard_short.md.jinja", names=SHORT, **figures)
    README.write_text(with_block(README.read_text(), "leaderboard", short))
    save_png(score_against_cost(result), IMAGES / "leaderboard.png")
    found = result["calibration"]
    panels = {title: {name: found[name]["curve"] for name in names} for title, names in CURVES.items()}
    save_png(calibration_curves(panels), IMAGES / "calibration.png")


def _whole(command: str) -> str:
    """A run's command without its choice of rows."""
    chosen, words = False, []
    for word in shlex.split(command):
        if word.startswith("--"):
            chosen = word in ("--methods", "--removed")
        if not chosen:
            words.append(word)
    return shlex.join(words)
