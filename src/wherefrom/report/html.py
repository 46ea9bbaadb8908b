"""One self-contained HTML page: which training sequences are behind each query.

The page knows texts and a score matrix, nothing of models or factors. All of it is written here as HTML, so it reads
without JavaScript; the script only picks, filters, unfolds and shades what already stands in the document. That also
keeps texts out of scripts and attributes: every one of them goes through the template's escaping into plain element
content (but for the titles of figures, which are also what a reader gets who cannot see them), and a content security
policy allows the page's own style and script and nothing else.

Each training sequence's text stands once, in the list at the foot, however many queries show it.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cache
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from wherefrom.report.figures import Figure
from wherefrom.report.histogram import HEIGHT, Histogram, histogram, signed_number
from wherefrom.report.passages import Passage, Passages, TokenContributions, checked_passages, excerpt, source_scores
from wherefrom.report.reading import Reading, reading
from wherefrom.report.shading import Shares, encode_lengths, encode_shares, visible_pieces
from wherefrom.runtime.errors import CONTROL_PICTURES, InputError
from wherefrom.scoring.results import ONLY_EXTREMES, GroupScore, Scores, TopScores, extremes
from wherefrom.store.files import write_text
from wherefrom.store.fingerprint import Fingerprint

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# A page must not carry control characters raw, and a reader should see that a sequence holds them; a carriage return
# is a line end here.
_PICTURES = {code: picture for code, picture in CONTROL_PICTURES.items() if chr(code) != "\r"}


@dataclass(frozen=True)
class HitView:
    """A training sequence in a query's list; `bar` is in percent of the query's longest bar.

    `score` is as a person reads it, `raw` as it is stored. `shares` says where in the sequence the score comes from, if
    that is known.
    """

    index: int
    score: str
    raw: str
    bar: float
    passage: Passage
    same_label: bool
    shares: Shares | None


@dataclass(frozen=True)
class QueryView:
    """What the page shows of a query; `histogram` is None where all its scores are zero, `heading` what is shown.

    `sources` are the sums of its scores by source: name, number of sequences, sum, mean.
    """

    index: int
    passage: Passage
    positive: Sequence[HitView]
    negative: Sequence[HitView]
    histogram: Histogram | None
    sources: Sequence[tuple[str, str, str, str]]
    heading: str


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
        queries: The query sequences that were scored; where they were added up, the page has one that says so.
        train: The training sequences, in the order of the columns; of a list only those shown are read.
        scores: Finite, on any device. Of `TopScores` there is no histogram, only what they hold.
        settings: What to show beside the fingerprint of the scores, as pairs.
        profile: Preformatted text, such as a table of durations.
        summary: One line under the title.
        k: How many of the most positive and of the most negative sequences a query shows at most.
        tokens: Where the scores come from inside the sequences; called only for pairs that are shown.
        figures: Plots of an evaluation, shown below the queries.

    Raises:
        InputError: a score is not finite, or an argument does not fit.
        MismatchError: as `checked_passages`, where these are not the texts that the scores are about.
    """
    _check(queries, train, scores, k)
    queries = checked_passages(scores, queries, train, tokens)
    reader = _Reader(train, tokens)
    sources = source_scores(scores, train)
    views = [_query_view(index, queries[index], scores, reader, k, sources[index]) for index in range(len(queries))]
    texts = {
        "title": title,
        "summary": summary,
        "queries": views,
        "sequences": [
            (index, passage, reader.lengths.get(index)) for index, passage in sorted(reader.passages.items())
        ],
        "figures": [{"title": each.title, "caption": each.caption, "data": _base64(each)} for each in figures],
        "stored": _stored(scores.fingerprint),
        "meaning": reading(scores).meaning,
        "settings": [*{**(settings or {}), **scores.fingerprint}.items()],
        "profile": profile,
    }
    templates = package_templates()
    style = templates.get_template("report.css").render()
    script = "\n".join(templates.get_template(f"{name}.js").render() for name in ("components", "report"))
    return templates.get_template("report.html").render(
        cleaned(texts),
        train_count=len(train),
        shaded=bool(reader.lengths),
        histogram_height=HEIGHT,
        style=style,
        script=script,
        policy=security_policy(style, script),
    )


def _stored(fingerprint: Fingerprint) -> str:
    """Which scores are there, where not all are; empty where they are."""
    candidates = f"candidates: {fingerprint['candidates']}" if "candidates" in fingerprint else ""
    return "; ".join(filter(None, (fingerprint.get(ONLY_EXTREMES, ""), candidates)))


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
    for query, scores in enumerate(values):  # one at a time: they may lie on disk
        finite = torch.isfinite(scores)
        if not finite.all():
            column = int((~finite).nonzero()[0])
            raise InputError(
                f"{name}[{query}, {column}] is {scores[column].item()}; expected finite scores "
                f"({int((~finite).sum())} of {len(scores)} of this query are not)"
            )


class _Reader:
    """Reads what is shown of the training set, each passage once, however many queries show it.

    Attributes:
        passages: by training position; the text is that of the tokens once `shares` has seen them.
        lengths: what cuts a passage's text into tokens, where these are known.
    """

    def __init__(self, train: Passages, tokens: TokenContributions | None) -> None:
        self._train = train
        self._tokens = tokens
        self.passages: dict[int, Passage] = {}
        self.lengths: dict[int, str] = {}

    def passage(self, index: int) -> Passage:
        """The sequence at a training position."""
        if index not in self.passages:
            self.passages[index] = self._train[index]
        return self.passages[index]

    def shares(self, query: int, index: int, read: Reading) -> Shares | None:
        """The shares of the sequence's visible pieces in the score of (query, index), as it is read, if known."""
        pieces = visible_pieces((self._tokens and self._tokens(query, index)) or ())
        if not pieces:
            return None
        for text, share in pieces:
            if not math.isfinite(share):
                raise InputError(f"tokens({query}, {index}) gives {text!r} a share of {share}; expected finite numbers")
        texts = [text.replace("\r", "␍") for text, _ in pieces]  # which a browser would read as something else
        # The tokens' text is no longer the one that has its answer at a known character.
        passage = replace(self.passage(index), text="".join(texts), answer_start=0)
        lengths = encode_lengths(texts)
        if self.lengths.get(index, lengths) != lengths or (index in self.lengths and self.passages[index] != passage):
            raise InputError(
                f"tokens({query}, {index}) gives other pieces of text than for an earlier query; "
                "expected the same pieces of a training sequence for every query"
            )
        self.passages[index], self.lengths[index] = passage, lengths
        return encode_shares([read.factor * share for _, share in pieces])


def _query_view(
    query: int,
    passage: Passage,
    scores: Scores | TopScores,
    reader: _Reader,
    k: int,
    sources: Sequence[GroupScore],
) -> QueryView:
    """Everything shown for one query."""
    ends, read = strongest(scores, query, k), reading(scores, query)
    limit = max((abs(score) for end in ends for _, score in end), default=0.0)
    positive, negative = (
        [_hit_view(query, passage.label, index, score, limit, reader, read) for index, score in end] for end in ends
    )
    return QueryView(
        index=query,
        passage=passage,
        positive=positive,
        negative=negative,
        histogram=histogram(read.factor * _on_host(scores.values[query])) if isinstance(scores, Scores) else None,
        sources=[_source_view(each, sources, read) for each in sources],
        heading=read.heading,
    )


def _source_view(each: GroupScore, sources: Sequence[GroupScore], read: Reading) -> tuple[str, str, str, str]:
    """A row of a query's table of sources."""
    largest = [max(abs(getattr(other, name)) for other in sources) for name in ("sum", "mean")]
    total, mean = (
        signed_number(read.factor * value, read.factor * limit)
        for value, limit in zip((each.sum, each.mean), largest, strict=True)
    )
    return each.group, f"{each.train:,}", total, mean


def _on_host(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float64)


def strongest(scores: Scores | TopScores, query: int, k: int) -> list[list[tuple[int, float]]]:
    """The k highest above zero and the k lowest below it, with their training positions: none is in both."""
    if isinstance(scores, TopScores):
        found = {name: getattr(scores, name)[query] for name in ("values", "train", "lowest_values", "lowest_train")}
    else:
        values = _on_host(scores.values[query])
        found = {name: each[0] for name, each in extremes(values[None], torch.arange(len(values)), k).items()}
    highest, lowest = (
        zip(found[f"{end}train"].tolist(), found[f"{end}values"].tolist(), strict=True) for end in ("", "lowest_")
    )
    return [[hit for hit in highest if hit[1] > 0][:k], [hit for hit in lowest if hit[1] < 0][:k]]


def _hit_view(
    query: int, label: str, index: int, score: float, limit: float, reader: _Reader, read: Reading
) -> HitView:
    """A training sequence in the list of a query with this label; the longest bar is that of a score of `limit`."""
    passage = reader.passage(index)
    return HitView(
        index=index,
        score=signed_number(read.factor * score, read.factor * limit),
        raw=signed_number(score, limit),
        bar=round(100 * abs(score) / limit, 1),
        passage=passage,
        same_label=bool(label) and passage.label == label,
        shares=reader.shares(query, index, read),
    )


def _base64(figure: Figure) -> str:
    if not figure.png.startswith(PNG_SIGNATURE):
        raise InputError(
            f"the figure {figure.title!r} starts with {figure.png[:8]!r}; expected the bytes of a PNG file: "
            'save the plot with format="png"'
        )
    return base64.b64encode(figure.png).decode()


def cleaned(value: object) -> object:
    """What a page shows, with all its texts such as any page can hold: no control characters, no half surrogate pairs.

    `str()` is for a `Markup`, a string that the template would trust.
    """
    if isinstance(value, str):
        shown = str(value).translate(_PICTURES)
        return shown.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list | tuple):
        return [cleaned(each) for each in value]
    if isinstance(value, dict):
        return {name: cleaned(each) for name, each in value.items()}
    return cleaned(vars(value)) if is_dataclass(value) else value


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
    templates = Environment(
        loader=PackageLoader("wherefrom.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["excerpt"] = excerpt
    return templates
