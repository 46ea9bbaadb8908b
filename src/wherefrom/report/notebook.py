"""Results as a notebook shows them: a short fragment of HTML with its own style, without scripts or requests.

It is made of what the page is made of. This module knows results of scoring and how texts are shown; whoever stands
above it hands over what is to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from wherefrom.report.histogram import signed_number
from wherefrom.report.html import HitView, cleaned, package_templates, strongest
from wherefrom.report.passages import Passage, Passages, TokenContributions, checked_passages, excerpt
from wherefrom.report.reading import Reading, reading
from wherefrom.report.shading import visible_pieces, window
from wherefrom.scoring.results import Scores, TopScores, in_notebooks
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.fingerprint import Dataset

QUERIES, HITS = 3, 3  # of a result that is shown by itself
_STRIP = 128  # parts of a sequence that have a bar each
_LOOKED_AT = 100  # pairs of a query
_MORE = "study.show(scores, query=0) has the texts, study.report(scores) is a page of all."


@dataclass(frozen=True)
class Piece:
    """A part of a text, with its share of the score in percent of the largest, and whether the answer has it too."""

    text: str
    kind: str
    share: int
    score: str
    same: bool


@dataclass(frozen=True)
class ShownHit:
    """A training example; its text unfolds, and of the first is unfolded if something in it is marked."""

    view: HitView
    pieces: Sequence[Piece]
    marked: bool

    @classmethod
    def of(
        cls,
        index: int,
        score: float,
        limit: float,
        read: Reading,
        passage: Passage,
        tokens: Sequence[tuple[str, float]] = (),
        overlaps: Sequence[tuple[int, int]] = (),
        label: str = "",
    ) -> ShownHit:
        """A training example as it is found.

        Args:
            limit: the score with the longest bar.
            tokens: its visible pieces with their parts of the score; empty where these are not known.
            overlaps: what is to be underlined, in characters.
            label: of the query.
        """
        shown, raw = signed_number(read.factor * score, read.factor * limit), signed_number(score, limit)
        bar, same = round(100 * abs(score) / limit, 1) if limit else 0.0, bool(label) and passage.label == label
        pieces = list(_pieces(tokens or [(passage.text, 0.0)], overlaps, read))
        return cls(HitView(index, shown, raw, bar, passage, same, None), pieces, bool(tokens or overlaps))


@dataclass(frozen=True)
class End:
    """Training examples of one sign: `kind` is positive or negative."""

    title: str
    kind: str
    hits: Sequence[ShownHit]


@dataclass(frozen=True)
class Text:
    """A text with its name; pieces that are true are marked."""

    label: str
    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Strip:
    """Numbers as bars between -1 and 1, each one wide: SVG paths."""

    positive: str
    negative: str
    parts: int

    @classmethod
    def of(cls, values: Tensor) -> Strip:
        """The values [n]; of many, sums of neighbours."""
        bars = [float(part.sum()) for part in values.double().tensor_split(min(len(values), _STRIP))]
        limit = max(map(abs, bars)) or 1.0
        paths = [f"M{x} 0v{-bar / limit:.2f}h.8V0z" for x, bar in enumerate(bars)]
        higher, lower = (
            "".join(path for path, bar in zip(paths, bars, strict=True) if sign * bar > 0) for sign in (1, -1)
        )
        return cls(higher, lower, len(bars))


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words; those below "Text" may take several lines."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str | Strip]]


@dataclass(frozen=True)
class View:
    """What a notebook shows.

    Attributes:
        facts: beside the title.
        meaning: what the numbers are.
        settings: what they were computed from, folded.
    """

    title: str
    facts: Sequence[str]
    texts: Sequence[Text] = ()
    ends: Sequence[End] = ()
    tables: Sequence[Table] = ()
    meaning: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        templates, texts = package_templates(), {**vars(self), "settings": list(self.settings.items())}
        style = templates.get_template("notebook.css").render()
        return templates.get_template("notebook.html").render(cleaned(texts), style=style)


def _pieces(tokens: Sequence[tuple[str, float]], overlaps: Sequence[tuple[int, int]], read: Reading) -> Iterator[Piece]:
    """The part of a text that says most, cut into its tokens and where overlaps begin and end."""
    shown, limit, position = window(tokens, overlaps), max(abs(part) for _, part in tokens), 0
    cuts = {shown.start, shown.stop, *(edge for each in overlaps for edge in each)}
    if shown.start:
        yield Piece("…", "", 0, "", False)
    for text, part in tokens:
        stop = position + len(text)
        edges = sorted({position, stop, *(each for each in cuts if position < each < stop)})
        kind = "positive" if part > 0 else "negative" if part < 0 else ""
        share = round(100 * abs(part) / limit) if limit else 0
        for start, end in pairwise(edges):
            same = any(first <= start and end <= last for first, last in overlaps)
            if start in shown:
                yield Piece(text[start - position : end - position], kind, share, read(part), same)
        position = stop
    if shown.stop < position:
        yield Piece("…", "", 0, "", False)


def query_view(
    scores: Scores | TopScores,
    query: int,
    queries: Passages,
    train: Passages,
    tokens: TokenContributions | None = None,
    k: int = HITS,
) -> View:
    """A query and the k training examples of each sign behind it, with their texts.

    Raises:
        WherefromError: as `checked_passages`, where these are not the texts that the scores are about.
    """
    passage = checked_passages(scores, queries, train, tokens)[query]
    read, found = reading(scores, query), strongest(scores, query, k)
    limit = max((abs(score) for end in found for _, score in end), default=0.0)
    ends = []
    for title, kind, end in zip(("Most positive", "Most negative"), ("positive", "negative"), found, strict=True):
        hits = []
        for index, score in end:
            pieces, shown = visible_pieces((tokens and tokens(query, index)) or ()), train[index]
            if pieces:
                shown = replace(shown, text="".join(text for text, _ in pieces), answer_start=0)
            hits.append(ShownHit.of(index, score, limit, read, shown, pieces, label=passage.label))
        ends.append(End(title, kind, hits))
    return View(
        f"Query {query}",
        [each for each in (passage.title, passage.label, scores.fingerprint.get("method")) if each],
        [Text("Text", [(excerpt(passage.text, 480, passage.answer_start), False)])],
        ends,
        meaning=f"{read.heading}: {read.meaning}.",
        settings=scores.fingerprint,
    )


@in_notebooks.register(Scores)
@in_notebooks.register(TopScores)
def _of_scores(scores: Scores | TopScores) -> str:
    """The highest scores of the first queries; texts of training examples are the study's."""
    (count, train), texts = scores.values.shape, _texts(scores.queries, len(scores.values))
    together = "aggregated training examples" in scores.fingerprint
    rows: list[list[str]] = []
    for query in range(min(count, QUERIES)):
        read, best = reading(scores, query), scores.values[query].topk(min(train, HITS))
        positions = best.indices if isinstance(scores, Scores) else scores.train[query, best.indices]
        for rank, (position, score) in enumerate(zip(positions.tolist(), best.values.tolist(), strict=True), start=1):
            named = [str(query), *texts[query : query + 1]] if rank == 1 else ["", *([""] if texts else [])]
            rows.append([*named, str(rank), "all" if together else str(position), read(score), f"{score:,.4g}"])
    headings = ["Query", *(["Text"] if texts else []), "Rank", "Train", read.heading, "Raw score"]
    of = "the {:,} highest and lowest" if isinstance(scores, TopScores) else "{:,} training examples"
    of = "all training examples added up" if together else of.format(train)
    return View(
        scores.fingerprint.get("method", "Scores"),
        [f"{count:,} queries, {of}", *([scores.name] if scores.name else [])],
        tables=[Table(headings, rows)],
        meaning=f"{read.heading}: {read.meaning}. {_MORE}",
        settings=scores.fingerprint,
    )._repr_html_()


def _texts(queries: Dataset[object] | None, count: int) -> list[str]:
    """The first queries as a table has them; none where they are not at hand, or no texts."""
    if queries is None or len(queries) != count:
        return []
    examples = [queries[query] for query in range(min(count, QUERIES))]
    found = [each.get("title") or each.get("text") if isinstance(each, Mapping) else None for each in examples]
    return [excerpt(each, 80) for each in found if isinstance(each, str)] if all(found) else []


@in_notebooks.register
def _of_tokens(scores: TokenScores) -> str:
    """Where in their sequences the strongest stored scores of the first queries arise."""
    rows: list[list[str | Strip]] = []
    for query in scores.pairs[:, 0].unique()[:QUERIES].tolist():
        stored = scores.pairs[scores.pairs[:, 0] == query, 1][:_LOOKED_AT].tolist()
        values = {train: scores[query, train] for train in stored}
        for train in sorted(values, key=lambda each: -float(values[each].abs().sum()))[:HITS]:
            each = values[train]
            rows.append(
                [str(query), str(train), f"{len(each):,}", f"{float(each.double().sum()):,.4g}", Strip.of(each)]
            )
    return View(
        f"{scores.fingerprint['method']}, token by token",
        [f"{len(scores.pairs):,} pairs of a query and a training example", scores.name],
        tables=[Table(["Query", "Train", "Tokens", "Raw score", "From its first token to its last"], rows)],
        meaning="study.show(scores, tokens=..., tokenizer=...) shades the texts.",
        settings=scores.fingerprint,
    )._repr_html_()
