"""One self-contained HTML page: which training sequences are behind each query.

The page knows texts and a score matrix, nothing of models or factors. All of it is written here as
HTML, so it reads without JavaScript; the script only picks, filters, unfolds and shades what already
stands in the document. That also keeps texts out of scripts and attributes: every one of them goes
through the template's escaping into plain element content (but for the titles of figures, which are
also what a reader gets who cannot see them), and a content security policy allows the page's own
style and script and nothing else.

Each training sequence's text stands once, in the list at the foot, however many queries show it.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from wherefrom.report.histogram import HISTOGRAM_HEIGHT, Histogram, histogram, signed_number
from wherefrom.report.passages import Figure, Passage, Passages, TokenContributions, checked_passages
from wherefrom.report.shading import Shares, encode_lengths, encode_shares, visible_pieces
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores, TopScores, extremes
from wherefrom.store.files import write_text
from wherefrom.store.fingerprint import Fingerprint

EXCERPT_LENGTH = 160
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Control characters are shown as Unicode's pictures of them: a page must not carry them raw, and a
# reader should see that a sequence holds them.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
CONTROL_PICTURES[0x7F] = 0x2421


@dataclass(frozen=True)
class HitView:
    """A training sequence in a query's list; `bar` is in percent of the query's longest bar.

    `shares` says where in the sequence the score comes from, if that is known.
    """

    rank: int
    index: int
    score: str
    bar: float
    passage: Passage
    excerpt: str
    same_label: bool
    shares: Shares | None


@dataclass(frozen=True)
class SequenceView:
    """A training sequence in the list at the foot; `lengths` cut its text into tokens, if they are known."""

    passage: Passage
    lengths: str = ""


@dataclass(frozen=True)
class FigureView:
    """A plot as the page holds it."""

    title: str
    caption: str
    data: str  # base64


@dataclass(frozen=True)
class QueryView:
    """What the page shows of a query; `histogram` is None where all its scores are zero."""

    index: int
    passage: Passage
    excerpt: str
    positive: Sequence[HitView]
    negative: Sequence[HitView]
    histogram: Histogram | None


def write_page(file: Path, page: str) -> None:
    """Write a page; nothing that is no page, such as a device or a run's own files, is ever replaced by one.

    Raises:
        InputError: the file's name does not end in .html.
        StorageError: it cannot be written.
    """
    if file.suffix.lower() not in (".html", ".htm") or "\0" in str(file):
        raise InputError(f"The page was to be {str(file)!r}: expected a file whose name ends in .html.")
    write_text(file, page)


def render_report(
    *,
    title: str,
    queries: Passages,
    train: Passages,
    scores: Scores | TopScores,
    settings: Mapping[str, str] | None = None,
    profile: str = "",
    summary: str = "",
    k: int = 10,
    tokens: TokenContributions | None = None,
    figures: Sequence[Figure] = (),
) -> str:
    """The page as a string.

    Args:
        title: The heading of the page.
        queries: The query sequences that were scored; where they were added up, the page has one row that says so.
        train: The training sequences, in the order of the columns; of a list only those shown are read.
        scores: Finite, on any device. Of `TopScores` there is no histogram, only what was kept.
        settings: What to show beside the fingerprint of the scores, as pairs.
        profile: Preformatted text, such as a table of durations.
        summary: One line under the title.
        k: How many of the most positive and of the most negative sequences a query shows at most.
        tokens: Where the scores come from inside the sequences; asked only for pairs that are shown.
        figures: Plots of an evaluation, shown below the queries.

    Raises:
        InputError: a score is not finite, or an argument does not fit.
        MismatchError: as `checked_passages`, where these are not the texts that the scores are about.
    """
    _check(queries, train, scores, k)
    queries = checked_passages(scores, queries, train, tokens)
    reader = _Reader(train, tokens)
    views = [_query_view(row, _clean_passage(queries[row]), scores, reader, k) for row in range(len(queries))]
    templates = package_templates()
    style = templates.get_template("report.css").render()
    script = templates.get_template("report.js").render()
    return templates.get_template("report.html").render(
        title=_clean(title),
        summary=_clean(summary),
        queries=views,
        train_count=len(train),
        sequences=sorted(reader.seen.items()),
        shaded=any(sequence.lengths for sequence in reader.seen.values()),
        figures=[_figure_view(figure) for figure in figures],
        kept=_clean(_kept(scores.fingerprint)),
        settings=[(_clean(name), _clean(value)) for name, value in {**(settings or {}), **scores.fingerprint}.items()],
        profile=_clean(profile),
        histogram_height=HISTOGRAM_HEIGHT,
        style=style,
        script=script,
        policy=security_policy(style, script),
    )


def _kept(fingerprint: Fingerprint) -> str:
    """Which scores are there, where not all are; empty where they are."""
    candidates = f"candidates: {fingerprint['candidates']}" if "candidates" in fingerprint else ""
    return "; ".join(filter(None, (fingerprint.get("kept", ""), candidates)))


def _check(queries: Passages, train: Passages, scores: Scores | TopScores, k: int) -> None:
    """Refuse what cannot be shown, naming the argument, what it is and what was expected."""
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1 sequence to show for each query")
    for name, count in (("queries", len(queries)), ("train", len(train))):
        if count == 0:
            raise InputError(f"{name} is empty; expected at least one sequence")
    _check_finite("values", scores.values)
    if isinstance(scores, TopScores):
        _check_finite("lowest_values", scores.lowest_values)


def _check_finite(name: str, values: Tensor) -> None:
    if values.is_complex():
        raise InputError(f"{name} is {values.dtype}; expected real numbers")
    for index, row in enumerate(values):
        finite = torch.isfinite(row)
        if not finite.all():
            column = int((~finite).nonzero()[0])
            raise InputError(
                f"{name}[{index}, {column}] is {row[column].item()}; expected finite scores "
                f"({int((~finite).sum())} of {len(row)} in this row are not)"
            )


class _Reader:
    """Reads what is shown of the training set: each passage once, however many queries show it, and kept in `seen`."""

    def __init__(self, train: Passages, tokens: TokenContributions | None) -> None:
        self.train = train
        self.tokens = tokens
        self.seen: dict[int, SequenceView] = {}

    def passage(self, index: int) -> Passage:
        """The sequence; its text is that of its tokens once `shares` has seen them."""
        if index not in self.seen:
            self.seen[index] = SequenceView(_clean_passage(self.train[index]))
        return self.seen[index].passage

    def shares(self, query: int, index: int) -> Shares | None:
        """The shares of the sequence's visible pieces in the score of (query, index), if they are known."""
        pieces = visible_pieces((self.tokens and self.tokens(query, index)) or ())
        if not pieces:
            return None
        for text, share in pieces:
            if not math.isfinite(share):
                raise InputError(f"tokens({query}, {index}) gives {text!r} a share of {share}; expected finite numbers")
        self._keep(query, index, [_clean_piece(text) for text, _ in pieces])
        return encode_shares([share for _, share in pieces])

    def _keep(self, query: int, index: int, texts: Sequence[str]) -> None:
        """Show the sequence as these pieces, or see that it is shown as these already."""
        passage = self.passage(index)
        sequence = SequenceView(replace(passage, text="".join(texts)), encode_lengths(texts))
        if self.seen[index].lengths and self.seen[index] != sequence:
            raise InputError(
                f"tokens({query}, {index}) gives other pieces of text than for an earlier query; "
                "expected the same pieces of a training sequence for every query"
            )
        self.seen[index] = sequence


def _query_view(index: int, query: Passage, scores: Scores | TopScores, reader: _Reader, k: int) -> QueryView:
    """Everything shown for one query, from its row of the scores."""
    ends = _ends(scores, index, k)
    limit = max((abs(score) for end in ends for _, score in end), default=0.0)
    positive, negative = (_hits(index, end, limit, query, reader) for end in ends)
    return QueryView(
        index=index,
        passage=query,
        excerpt=_excerpt(query.text),
        positive=positive,
        negative=negative,
        histogram=histogram(_row(scores.values, index)) if isinstance(scores, Scores) else None,
    )


def _row(values: Tensor, index: int) -> Tensor:
    """One query's numbers, float64 on the CPU."""
    return values[index].detach().to("cpu", torch.float64)


def _ends(scores: Scores | TopScores, index: int, k: int) -> list[list[tuple[int, float]]]:
    """The k highest above zero and the k lowest below it, with their training positions: none is in both."""
    if isinstance(scores, TopScores):
        found = {name: _row(getattr(scores, name), index) for name in ("values", "lowest_values")}
        found |= {name: getattr(scores, name)[index] for name in ("train", "lowest_train")}
    else:
        row = _row(scores.values, index)
        found = {name: each[0] for name, each in extremes(row[None], torch.arange(len(row)), k).items()}
    pairs = [
        list(zip(found[f"{end}train"].tolist(), found[f"{end}values"].tolist(), strict=True)) for end in ("", "lowest_")
    ]
    return [[pair for pair in end if sign * pair[1] > 0][:k] for sign, end in zip((1, -1), pairs, strict=True)]


def _hits(
    row: int, chosen: Sequence[tuple[int, float]], limit: float, query: Passage, reader: _Reader
) -> list[HitView]:
    """Training positions with their scores, the most extreme first; the longest bar is that of a score of `limit`."""
    hits: list[HitView] = []
    for index, score in chosen:
        passage = reader.passage(index)
        hits.append(
            HitView(
                rank=len(hits) + 1,
                index=index,
                score=signed_number(score, limit),
                bar=round(100 * abs(score) / limit, 1),
                passage=passage,
                excerpt=_excerpt(passage.text),
                same_label=bool(query.label) and passage.label == query.label,
                shares=reader.shares(row, index),
            )
        )
    return hits


def _excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 4 * EXCERPT_LENGTH].split())
    if len(line) <= EXCERPT_LENGTH:
        return line
    start = line[:EXCERPT_LENGTH]
    # Cut between words, unless the text has none to cut between, as in Chinese.
    cut = start.rfind(" ")
    return (start[:cut] if cut > EXCERPT_LENGTH // 2 else start) + "…"


def _figure_view(figure: Figure) -> FigureView:
    if not figure.png.startswith(PNG_SIGNATURE):
        raise InputError(
            f"the figure {figure.title!r} starts with {figure.png[:8]!r}; expected the bytes of a PNG file: "
            'save the plot with format="png"'
        )
    return FigureView(_clean(figure.title), _clean(figure.caption), base64.b64encode(figure.png).decode())


def _clean_passage(passage: Passage) -> Passage:
    return Passage(_clean(passage.text), _clean(passage.title), _clean(passage.label))


def _clean_piece(text: str) -> str:
    """A piece whose length stays what it is: a browser reads a carriage return as something else."""
    return _clean(text).replace("\r", "␍")


def _clean(text: str) -> str:
    """Plain text that any page can hold: no control characters, no half of a surrogate pair.

    `str()` comes first because the template would trust a `Markup`, which is a string too.
    """
    plain = str(text).translate(CONTROL_PICTURES)
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def security_policy(style: str, script: str) -> str:
    """A content security policy: this style, this script, embedded pictures, and nothing else."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


@cache
def package_templates() -> Environment:
    """The package's templates; style and script pass through it too, for uniform line ends."""
    return Environment(
        loader=PackageLoader("wherefrom.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
