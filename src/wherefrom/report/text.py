"""Scores in the terminal: queries, the training sequences behind them, and the tokens inside those."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from wherefrom.report.passages import (
    DatasetPassages,
    Passage,
    Passages,
    TokenContributions,
    checked_passages,
    excerpt,
    source_scores,
)
from wherefrom.report.reading import Reading, computed_by, reading
from wherefrom.runtime.errors import InputError, printable
from wherefrom.scoring.results import GroupScore, Hit, Scores, TopScores
from wherefrom.scoring.tokens import ChunkHit, TopChunks


def top_tables(
    scores: Scores | TopScores | TopChunks,
    queries: Passages,
    train: Passages,
    *,
    shown: Iterable[int],
    k: int = 5,
    width: int = 160,
) -> RenderableType:
    """For each query in `shown`: its text and a table of its k top training sequences, or chunks of these.

    Args:
        queries: all of them; where scores are aggregated, the one passage says of how many.
        shown: positions of queries.
        width: how many characters of a text are shown.

    Raises:
        WherefromError: as `checked_passages`, where these are not the texts that the scores are about.
    """
    hits, queries = scores.top(k), checked_passages(scores, queries, train)
    by_source = source_scores(scores, train)
    parts: list[RenderableType] = []
    for query in shown:
        passage = queries[query]
        heading = f"Query {query}" + (f" ({printable(passage.label)})" if passage.label else "")
        read = reading(scores, query)
        table = hits_table(None, [each for each in hits if each.query == query], train, read, width)
        parts += [Text(heading, style="bold"), _shown(passage, 2 * width), table, Text()]
        if by_source[query]:
            parts += [sources_table(by_source[query], read), Text()]
    part = "; of a chunk, its part of that" if isinstance(scores, TopChunks) else ""
    said = f"{read.heading}: {read.meaning}{part}. Scores of {printable(computed_by(scores))}." if parts else ""
    return Group(*parts, *([Text(said, style="dim")] if parts else []))


def hits_table(
    heading: str | None, hits: Sequence[Hit | ChunkHit], train: Passages, read: Reading, width: int = 160
) -> Table:
    """Training sequences with their ranks and scores, and their labels and sources where they have some."""
    found = [_hit_passage(hit, train) for hit in hits]
    said = [name for name in ("label", "source") if any(getattr(each, name) for each in found)]
    title = heading and f"[bold]{heading}[/bold]"
    tokens = ["Tokens"] if any(isinstance(hit, ChunkHit) for hit in hits) else []
    table = Table(*figures("Rank", "Train", *tokens, read.heading), title=title, title_justify="left")
    for name in said:
        table.add_column(name.capitalize(), max_width=14, overflow="fold")
    table.add_column("Training sequence", overflow="fold")
    for hit, each in zip(hits, found, strict=True):
        facts = [Text(printable(getattr(each, name))) for name in said]
        span = [f"{hit.start} to {hit.stop - 1}"] if isinstance(hit, ChunkHit) else []
        table.add_row(str(hit.rank), str(hit.train), *span, read(hit.score), *facts, _shown(each, width))
    return table


def _hit_passage(hit: Hit | ChunkHit, train: Passages) -> Passage:
    if isinstance(hit, ChunkHit) and isinstance(train, DatasetPassages):
        return train.of_tokens(hit.train, hit.start, hit.stop)
    return train[hit.train]


def sources_table(found: Sequence[GroupScore], read: Reading, column: str = "source") -> Table:
    """Sums of a query's scores by where training examples come from, or by another column."""
    named = Column(escape(printable(column)).capitalize(), overflow="fold")
    table = Table(named, *figures("Examples", f"Sum: {read.heading.lower()}", "Mean"))
    for each in found:
        name = Text(printable(each.group))
        table.add_row(name, f"{each.train:,}", read(each.sum), read(each.mean))
    return table


def figures(*headings: str) -> list[Column]:
    """Columns of figures for a table, with their units on a line of their own."""
    return [Column(escape(heading).replace(", ", ",\n"), justify="right") for heading in headings]


def token_tables(
    scores: Scores,
    tokens: TokenContributions,
    queries: Passages,
    train: Passages,
    *,
    shown: Iterable[int],
    k: int = 3,
    width: int = 300,
) -> RenderableType:
    """For each query in `shown`: its text, and its k top training sequences as heat maps of their tokens.

    Raises:
        WherefromError: as `checked_passages`, where these are not the texts that the scores are about.
    """
    hits, queries = scores.top(k), checked_passages(scores, queries, train, tokens)
    parts: list[RenderableType] = []
    for query in shown:
        read = reading(scores, query)
        said = Text(f"{read.heading}: {read.meaning}; of a token, its part of that.", style="dim")
        parts += [Rule(f"Query {query}", align="left"), _shown(queries[query], width), said, Text()]
        for hit in (each for each in hits if each.query == query):
            pieces = tokens(query, hit.train)
            if pieces is not None:
                title = train[hit.train].title
                name = f"{hit.rank}. train {hit.train}{f', {title}' if title else ''}: {read(hit.score)}"
                shares = [(piece, read.factor * value) for piece, value in pieces]
                parts += [Text(printable(name), style="bold"), heat_map(shares), Text()]
    return Group(*parts)


def heat_map(pieces: Sequence[tuple[str, float]]) -> RenderableType:
    """A sequence with its tokens shaded by what they add to a score: blue raises it, orange lowers it.

    Args:
        pieces: each token's text and value; the largest absolute value has the full colour.
    """
    wrong = [(piece, value) for piece, value in pieces if not math.isfinite(value)]
    if wrong:
        raise InputError(f"pieces: {wrong[0][0]!r} has the value {wrong[0][1]}; expected finite numbers.")
    limit = max((abs(value) for _, value in pieces), default=0.0) or 1.0
    text = Text()
    for piece, value in pieces:
        text.append(printable(piece.replace("\n", "↵")), shade(value / limit))
    legend = Text("  ")
    for part in (-1.0, -0.5, 0.0, 0.5, 1.0):
        legend.append(f" {part * limit:+,.3g} ", shade(part))
    return Group(text, legend)


def _shown(passage: Passage, width: int) -> Text:
    """The beginning of a text, which the terminal does not obey."""
    return Text(printable(excerpt(passage.text, width, passage.answer_start)))


def shade(part: float) -> Style:
    """From white through to blue (1) or orange (-1), with black letters, which stay readable on all of them."""
    strongest = (86, 180, 233) if part > 0 else (230, 159, 0)
    red, green, blue = (round(255 + abs(part) * (each - 255)) for each in strongest)
    return Style(color="black", bgcolor=f"rgb({red},{green},{blue})")
