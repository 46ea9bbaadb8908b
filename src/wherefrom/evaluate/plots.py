"""How scores agree and what retraining said of them: plots as matplotlib figures, and tables in the terminal.

No window and no global state: a figure is made, written and dropped. This module shows numbers that it is given; it
must not know models, and it computes no result of its own beyond means and standard deviations of repeats.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from wherefrom.evaluate.agreement import Agreement, compare_scores
from wherefrom.evaluate.datamodels import IntervalEstimate, LdsReport
from wherefrom.runtime.errors import InputError
from wherefrom.store.files import write_bytes

# Okabe and Ito's palette, which readers with any colour vision can tell apart, without its yellow (too pale on white).
# A method that has a colour here looks the same in every plot; others take what is left, in the order given.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#767676", "#333333"
COLOURS = {
    "ekfac": BLUE,
    "identity": "#E69F00",
    "random": GREY,
    "bm25": "#CC79A7",
    "kfac": "#56B4E9",
    "diagonal": "#009E73",
}
MARKERS = {"ekfac": "o", "identity": "s", "random": "X", "bm25": "D", "kfac": "^", "diagonal": "v"}
SPARE_COLOURS = [ORANGE, "#000000", "#882255", "#8C7B00"]
SPARE_MARKERS = ["P", "*", "p", "h", "<", ">"]
RESOLUTION = 160  # dots an inch


def scatter(reference: Tensor, other: Tensor, names: tuple[str, str], query: str) -> Figure:
    """Two ways of scoring one query against each other, a point for each training example, with the line of equals.

    Args:
        reference: [train] scores, on the horizontal axis.
        other: [train] scores of the same examples.
        names: of the two ways, for the axes.
        query: its name, for the title, which also gives Spearman's correlation.

    Raises:
        InputError: these are not two vectors of finite scores, of one length of at least 2.
    """
    correlation = compare_scores(reference[None], other[None]).spearman.minimum
    left, right = (scores.detach().to("cpu").double().numpy() for scores in (reference, other))
    figure, axes = _figure(5.2, 5.0)
    low, high = min(left.min(), right.min()), max(left.max(), right.max())
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, dashes=(5, 3), label="equal scores", zorder=1)
    # As one picture inside a vector file: thousands of points would make it slow to open.
    axes.scatter(left, right, s=16, color=BLUE, alpha=0.5, linewidths=0, rasterized=True, zorder=2)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=f"Score, {names[0]}", ylabel=f"Score, {names[1]}")
    axes.set_title(f"{query}: Spearman {correlation:.4f} over {len(left):,} examples", loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure


def correlation_histogram(agreement: Agreement) -> Figure:
    """How many queries have which correlation between two score matrices, with the median and the lowest marked."""
    figure, axes = _figure(6.2, 3.6)
    kinds = (("Spearman", agreement.spearman, BLUE), ("Pearson", agreement.pearson, ORANGE))
    both = np.concatenate([found.values.numpy() for _, found, _ in kinds])
    # Not less than a thousandth wide, where all correlations are nearly equal: rounding errors are no news.
    bins = np.linspace(min(both.min(), both.max() - 1e-3), both.max(), 41)
    for name, found, colour in kinds:
        label = f"{name}: median {found.median:.4f}, lowest {found.minimum:.4f} (query {found.worst})"
        heights, edges = np.histogram(found.values.numpy(), bins)
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(heights, edges, color=colour, linewidth=1.4, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=6)
    axes.set(xlabel="Correlation of a query's scores, over training examples", ylabel="Queries")
    axes.set_title(f"Agreement of {len(both) // 2:,} queries' scores", loc="left")
    figure.legend(loc="outside lower left", frameon=False)
    return figure


def lds_bars(report: LdsReport) -> Figure:
    """Each method's linear datamodeling score with its 95% interval, best on top; the ceiling as a dashed line."""
    names = sorted(report.means, key=lambda name: report.means[name].value)
    found = [report.means[name] for name in names]
    figure, axes = _figure(6.6, 1.5 + 0.42 * len(names))
    styles = _styles(report.means)
    axes.barh(names, [each.value for each in found], color=[styles[name][0] for name in names], height=0.62)
    spans = np.array([[each.value - each.low, each.high - each.value] for each in found]).clip(min=0).T  # [2, methods]
    axes.errorbar([each.value for each in found], names, xerr=spans, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for name, each in zip(names, found, strict=True):
        axes.annotate(
            f"{each.value:.3f}", (max(each.high, 0), name), (6, 0), textcoords="offset points", va="center", color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # the ceiling may run behind it
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=0.8)
    if report.ceiling:
        axes.axvspan(report.ceiling.low, report.ceiling.high, color=GREY, alpha=0.15, linewidth=0)
        axes.axvline(report.ceiling.value, color=INK, linewidth=1.1, dashes=(5, 3))
        axes.annotate(
            f"ceiling {report.ceiling.value:.3f}", (report.ceiling.value, 1), (0, 4),
            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", color=INK,
        )  # fmt: skip
    axes.margins(x=0.14)
    queries = len(next(iter(report.queries.values())))
    axes.set_xlabel(f"Linear datamodeling score, 95% interval ({report.subsets:,} subsets, {queries:,} queries)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def removal_curves(counts: Sequence[int], curves: Mapping[str, NDArray[np.float64]], ylabel: str) -> Figure:
    """What retraining without each query's top examples does: a line a method, its bars one standard deviation.

    Args:
        counts: how many examples were removed.
        curves: by method, [counts, repeats]: the measurement after each of `repeats` retrainings.
        ylabel: the measurement and its unit.

    Raises:
        InputError: there are no curves, or one does not have measurements for each count.
    """
    if not curves:
        raise InputError("curves: no methods; give at least one name with its measurements [counts, repeats].")
    for name, curve in curves.items():
        if curve.ndim != 2 or len(curve) != len(counts) or curve.shape[1] == 0:
            raise InputError(
                f"curves[{name!r}]: shape {list(curve.shape)}; expected [{len(counts)}, repeats], a row for each count."
            )
    figure, axes = _figure(6.4, 4.2)
    styles = _styles(curves)
    step = 0.006 * (max(counts) - min(counts))
    for number, (name, curve) in enumerate(curves.items()):
        colour, marker = styles[name]
        # A little to the side of each other, so that bars at the same count can be told apart.
        where = np.asarray(counts) + step * (number - (len(curves) - 1) / 2)
        spread = curve.std(1, ddof=1) if curve.shape[1] > 1 else None  # [counts]
        axes.errorbar(
            where, curve.mean(1), spread, label=name,
            color=colour, marker=marker, markersize=6, linewidth=1.5, capsize=3,
        )  # fmt: skip
    axes.set_xticks(list(counts))
    xlabel = "Training examples removed"
    repeats = sorted({curve.shape[1] for curve in curves.values()})
    if repeats[-1] > 1:
        times = f"{repeats[0]} to {repeats[-1]}" if len(repeats) > 1 else repeats[0]
        xlabel += f"\n(points and bars: mean and standard deviation of {times} retrainings)"
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside upper left", frameon=False, ncols=4)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # Without matplotlib's version in it, so that the same plot is the same file.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: str | Path) -> None:
    """Write the figure as a PNG file under a temporary name, flush it to disk, then rename.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
    """
    write_bytes(Path(path), png(figure))


def lds_tables(report: LdsReport) -> RenderableType:
    """For the terminal: a table of methods, best first, with the ceiling above them, and one of every difference."""
    ordered = sorted(report.means, key=lambda name: -report.means[name].value)
    queries = len(next(iter(report.queries.values())))
    averaged = f", each with {report.repeats} seeds" if report.repeats > 1 else ""
    methods = _table(
        "Linear datamodeling score", ["Method"], "Score",
        f"Mean over {queries:,} queries; {report.subsets:,} retrainings{averaged}; intervals from "
        f"{report.resamples:,} resamples of subsets and queries.",
    )  # fmt: skip
    if report.ceiling:
        ceiling = "[italic]ceiling from the noise of retraining[/italic]"
        methods.add_row(ceiling, *_cells(report.ceiling), end_section=True)
    for name in ordered:
        methods.add_row(escape(name), *_cells(report.means[name]))
    if not report.differences:
        return methods
    differences = _table(
        "Paired differences", ["First", "Second"], "First - second",
        "Bold where the interval leaves out 0. Intervals are not corrected for the number of pairs.",
    )  # fmt: skip
    for first, second in combinations(ordered, 2):
        found = report.difference(first, second)
        style = "bold" if found.low > 0 or found.high < 0 else None
        differences.add_row(escape(first), escape(second), *_cells(found, sign="+"), style=style)
    return Group(methods, Text(), differences)


def _table(title: str, names: list[str], number: str, caption: str) -> Table:
    table = Table(
        *names, min_width=48,
        title=f"[bold]{title}[/bold]", title_justify="left", caption=caption, caption_justify="left",
    )  # fmt: skip
    table.add_column(number, justify="right")
    table.add_column("95% interval", justify="right")
    return table


def _cells(estimate: IntervalEstimate, sign: str = "") -> tuple[str, str]:
    style = f"{sign}.3f"
    return format(estimate.value, style), f"{estimate.low:{style}} to {estimate.high:{style}}"


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method."""
    spare = zip(cycle(SPARE_COLOURS), cycle(SPARE_MARKERS), strict=False)
    return {name: (COLOURS[name], MARKERS[name]) if name in COLOURS else next(spare) for name in names}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches with one pair of axes in the house style."""
    figure = Figure(figsize=(width, height), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    return figure, axes
