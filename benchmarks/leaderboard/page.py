"""`docs/leaderboard.md`, its plot and the README's table out of the leaderboard's figures.

This module computes no figure of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import README, rendered, with_block
from workload import ROOT

from leaderboard.methods import METHODS
from wherefrom.curvature.solvers import CONVERGED
from wherefrom.evaluate.plots import BLUE, GREY, INK, RESOLUTION, save_png

DOCUMENT, PLOT = ROOT / "docs" / "leaderboard.md", ROOT / "docs" / "images" / "leaderboard.png"

# The methods that the README shows.
SHORT = (
    "magic", "ekfac + cg", "fisher, all weights", "ekfac, all weights", "shampoo", "ekfac", "kfac", "source, adam",
    "trackstar", "logra", "bm25", "trak", "dot", "random",
)  # fmt: skip

TITLES = {"A": "A: half of the examples, averaged over seeds", "B": "B: 1% left out of the very training"}


def write_page(result: Mapping[str, Any]) -> None:
    """Write all three."""
    result, unsolved = ranked(result)
    rises = {name: (mean(found), stdev(found) / len(found) ** 0.5) for name, found in result["rises"].items()}
    whats = {name: method.what for name, method in METHODS.items()}
    figures = {"result": result, "rises": rises, "unsolved": unsolved}
    DOCUMENT.write_text(rendered("leaderboard.md.jinja", whats=whats, **figures))
    short = rendered("leaderboard_short.md.jinja", names=SHORT, **figures)
    README.write_text(with_block(README.read_text(), "leaderboard", short))
    save_png(score_against_cost(result), PLOT)


def ranked(result: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, float]]:
    """The figures of methods that can be ranked, and the residuals of those whose solves have not converged.

    Scores of such solves are those of no method: how far they came says something of the iterations alone.
    """
    residuals = {name: cost.get("residual") for name, cost in result["costs"].items()}
    unsolved = {name: each for name, each in residuals.items() if each is not None and each > CONVERGED}
    protocols = {}
    for protocol, figures in result["protocols"].items():
        kept = {name: dict(found) for name, found in figures["methods"].items() if name not in unsolved}
        for found in kept.values():
            found["not_told_from"] = [other for other in found["not_told_from"] if other not in unsolved]
        protocols[protocol] = {**figures, "methods": kept}
    return {**result, "protocols": protocols}, unsolved


def score_against_cost(result: Mapping[str, Any]) -> Figure:
    """Linear datamodeling scores against cost for both protocols, with the methods that no cheaper one beats."""
    figure = Figure(figsize=(8.8, 11), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    panels = []
    for axes, (protocol, title) in zip(figure.subplots(2, 1), TITLES.items(), strict=True):
        panels.append((axes, _panel(axes, result["protocols"][protocol], result["costs"])))
        axes.set_title(title, loc="left")
    figure.canvas.draw()  # where points are on the page is known when it is laid out
    for axes, points in panels:
        _label(axes, points)
    return figure


def _panel(axes: Axes, ranking: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Draw everything but names, and tell where those belong."""
    methods = ranking["methods"]
    points = {name: (max(costs[name]["epochs"], 0.01), found["value"]) for name, found in methods.items()}
    best = frontier(points)
    for name, (cost, score) in points.items():
        colour = BLUE if name in best else GREY
        span = [[score - methods[name]["low"]], [methods[name]["high"] - score]]
        axes.errorbar(cost, score, span, fmt="o", color=colour, markersize=5, elinewidth=0.8, capsize=2)
    axes.plot(*zip(*(points[name] for name in best), strict=True), color=BLUE, linewidth=1, dashes=(5, 3), zorder=0)
    if ranking["ceiling"]:
        axes.axhline(ranking["ceiling"]["value"], color=INK, linewidth=1, dashes=(2, 2))
        axes.annotate("ceiling", (1, ranking["ceiling"]["value"]), (-4, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", color=INK, fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.14)
    axes.set(xlabel="Cost of all scores, in epochs of plain training", ylabel="Linear datamodeling score")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color=INK, linewidth=0.6)
    return points


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, moved up until it covers no other name."""
    size, best = 8, frontier(points)
    height, taken = 1.15 * size * RESOLUTION / 72, list[tuple[float, float, float]]()  # pixels; left, right, bottom
    for name, point in sorted(points.items(), key=lambda item: (item[1][1], -item[1][0])):
        left, bottom = axes.transData.transform(point)
        start, right = bottom, left + 0.62 * height * len(name) + height
        while any(left < end and begin < right and abs(bottom - other) < height for begin, end, other in taken):
            bottom += 1
        taken.append((left, right, bottom))
        up = (bottom - start) * 72 / RESOLUTION
        colour = BLUE if name in best else GREY
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4} if up else None
        axes.annotate(
            name, point, (5, 3 + up), textcoords="offset points", color=colour, fontsize=size, arrowprops=line
        )


def frontier(points: Mapping[str, tuple[float, float]]) -> Sequence[str]:
    """Names of the points (cost, score) than which none is both cheaper and better, by cost."""
    best, chosen = float("-inf"), []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if score > best:
            best = score
            chosen.append(name)
    return chosen
