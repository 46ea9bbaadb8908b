"""The leaderboard's figures out of its numbers. This module computes no number of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wherefrom.evaluate.plots import BLUE, GREY, INK, ORANGE, RESOLUTION, SPARE_COLOURS

TITLES = {"A": "A: half of the examples, averaged over seeds", "B": "B: 1% left out of the very training"}

CHEAPEST = 0.1  # epochs; what costs less is drawn as if it cost that


def score_against_cost(result: Mapping[str, Any]) -> Figure:
    """Linear datamodeling scores against cost for both protocols, with the methods that no cheaper one beats.

    Points are numbered as the rows of the table are; their names stand beside the panels.
    """
    figure = Figure(figsize=(10.4, 10), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1))
    names = list(result["protocols"]["B"]["methods"])
    panels, best = [], set[str]()
    for row, (protocol, title) in enumerate(TITLES.items()):
        axes = figure.add_subplot(grid[row, 0])
        points = _panel(axes, result["protocols"][protocol], result["costs"])
        axes.set_title(title, loc="left")
        panels.append((axes, points))
        best.update(frontier(points))
    legend = figure.add_subplot(grid[:, 1])
    legend.axis("off")
    for number, name in enumerate(names, 1):
        colour = BLUE if name in best else INK
        height = 1 - number / (len(names) + 1)
        for x, text in ((0.06, f"{number}"), (0.1, name)):
            legend.text(x, height, text, color=colour, fontsize=8, ha="right" if x < 0.1 else "left")
    legend.text(0, 1, "By protocol B; blue: none is cheaper and better", color=INK, fontsize=8)
    figure.canvas.draw()  # where points are on the page is known when it is laid out
    for axes, points in panels:
        _number(axes, points, names)
    return figure


def _panel(axes: Axes, ranking: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Draw everything but numbers, and tell where those belong."""
    methods = ranking["methods"]
    points = {name: (max(costs[name]["epochs"], CHEAPEST), found["value"]) for name, found in methods.items()}
    best = frontier(points)
    for name, (cost, score) in points.items():
        colour = BLUE if name in best else GREY
        span = [[score - methods[name]["low"]], [methods[name]["high"] - score]]
        axes.errorbar(cost, score, span, fmt="o", color=colour, markersize=4, elinewidth=0.6, capsize=0)
    axes.plot(*zip(*(points[name] for name in best), strict=True), color=BLUE, linewidth=1, dashes=(5, 3), zorder=0)
    if ranking["ceiling"]:
        axes.axhline(ranking["ceiling"]["value"], color=INK, linewidth=1, dashes=(2, 2))
        axes.annotate("ceiling", (1, ranking["ceiling"]["value"]), (-4, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", color=INK, fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set(xlabel="Cost of all scores, in epochs of plain training", ylabel="Linear datamodeling score")
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color=INK, linewidth=0.6)
    return points


def _number(axes: Axes, points: Mapping[str, tuple[float, float]], names: Sequence[str]) -> None:
    """Write each point's number beside it: to the right, or wherever it covers no other number and no point."""
    size, best = 8, frontier(points)
    unit = size * RESOLUTION / 72  # pixels
    taken = [
        (x - unit / 2.2, x + unit / 2.2, y - unit / 2.2, y + unit / 2.2)
        for x, y in axes.transData.transform(list(points.values()))
    ]
    for name, point in sorted(points.items(), key=lambda item: (item[1][1], -item[1][0])):
        text = str(names.index(name) + 1)
        x, y = axes.transData.transform(point)
        width, height = 0.62 * unit * len(text), 0.9 * unit
        away = ((side, up) for up in range(60) for side in (0.6 * unit, -0.6 * unit - width))
        for side, step in away:
            left, bottom = x + side, y - height / 2 + step * unit / 4
            box = (left, left + width, bottom, bottom + height)
            if not any(
                box[0] < each[1] and each[0] < box[1] and box[2] < each[3] and each[2] < box[3] for each in taken
            ):
                break
        taken.append(box)
        colour = BLUE if name in best else GREY
        offset = ((left - x) * 72 / RESOLUTION, (bottom - y) * 72 / RESOLUTION)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4} if step > 3 else None
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8}  # bars and lines may be there
        axes.annotate(
            text, point, offset, textcoords="offset points", color=colour, fontsize=size, arrowprops=line, bbox=behind
        )


def frontier(points: Mapping[str, tuple[float, float]]) -> Sequence[str]:
    """Names of the points (cost, score) than which none is both cheaper and better, by cost."""
    best, chosen = float("-inf"), []
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if score > best:
            best = score
            chosen.append(name)
    return chosen


def calibration_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> Figure:
    """Measured against predicted rises of queries' losses, groups of pairs as points, with the line of equals.

    Args:
        panels: by title, then by method: mean predicted and mean measured rise of each group, in nats a token.
    """
    figure = Figure(figsize=(9.6, 4.6), dpi=RESOLUTION, layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, *SPARE_COLOURS[2:]), strict=False):
            x, y = ([1000 * each for each in axis] for axis in zip(*curve, strict=True))
            axes.plot(x, y, marker="o", markersize=3.5, linewidth=1, color=colour, label=name)
        axes.axline((0, 0), slope=1, color=INK, linewidth=0.8, dashes=(5, 3), label="as predicted")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("Predicted rise of a query's loss,\nthousandths of a nat a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.2))  # below the axis
    figure.axes[0].set_ylabel("Measured rise, thousandths of a nat a token")
    return figure
