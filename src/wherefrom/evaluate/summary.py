"""Results of wherefrom.evaluate in the terminal. This module lays out numbers; it must not compute any."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from wherefrom.evaluate.lds import Estimate, LdsReport


def lds_tables(report: LdsReport) -> RenderableType:
    """A table of methods, best first, with the ceiling above them, and one of every paired difference."""
    ordered = sorted(report.means, key=lambda name: -report.means[name].value)
    queries = len(next(iter(report.queries.values())))
    averaged = f", each with {report.repeats} seeds" if report.repeats > 1 else ""
    methods = _table(
        "Linear datamodeling score",
        ["Method"],
        "Score",
        f"Mean over {queries:,} queries; {report.subsets:,} retrainings{averaged}; intervals from "
        f"{report.resamples:,} resamples of subsets and queries.",
    )
    if report.ceiling:
        methods.add_row(
            "[italic]ceiling from the noise of retraining[/italic]", *_cells(report.ceiling), end_section=True
        )
    for name in ordered:
        methods.add_row(escape(name), *_cells(report.means[name]))
    if not report.differences:
        return methods
    differences = _table(
        "Paired differences",
        ["First", "Second"],
        "First - second",
        "Bold where the interval leaves out 0. Intervals are not corrected for the number of pairs.",
    )
    for place, first in enumerate(ordered):
        for second in ordered[place + 1 :]:
            found = report.difference(first, second)
            clear = found.low > 0 or found.high < 0
            differences.add_row(
                escape(first), escape(second), *_cells(found, sign="+"), style="bold" if clear else None
            )
    return Group(methods, Text(), differences)


def _table(title: str, names: list[str], number: str, caption: str) -> Table:
    table = Table(
        *names,
        title=f"[bold]{title}[/bold]",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        min_width=48,
    )
    table.add_column(number, justify="right")
    table.add_column("95% interval", justify="right")
    return table


def _cells(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    style = f"{sign}.3f"
    return format(estimate.value, style), f"{estimate.low:{style}} to {estimate.high:{style}}"
