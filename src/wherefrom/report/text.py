"""Scores in the terminal: queries, and the training sequences behind them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from wherefrom.report.passages import Passages
from wherefrom.scores import Scores


def top_tables(
    scores: Scores, queries: Passages, train: Passages, *, shown: Iterable[int], k: int = 5, width: int = 160
) -> RenderableType:
    """For each query in `shown`: its text and a table of its k top training sequences.

    Args:
        shown: which queries.
        width: how many characters of a text are shown.
    """
    hits = scores.top(k)
    parts: list[RenderableType] = []
    for query in shown:
        passage = queries[query]
        heading = escape(f"Query {query}" + (f" ({passage.label})" if passage.label else ""))
        table = Table("Rank", "Train", "Score", title_justify="left", title=f"[bold]{heading}[/bold]")
        labelled = bool(passage.label)
        if labelled:
            table.add_column("Label")
        table.add_column("Training sequence", overflow="fold")
        for hit in (each for each in hits if each.query == query):
            found = train[hit.train]
            label = [Text(found.label)] if labelled else []
            table.add_row(str(hit.rank), str(hit.train), f"{hit.score:,.4g}", *label, Text(excerpt(found.text, width)))
        parts += [table, Text(excerpt(passage.text, 2 * width)), Text()]
    return Group(*parts)


def excerpt(text: str, width: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"
