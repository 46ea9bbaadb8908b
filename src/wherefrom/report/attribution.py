"""An answer and the training examples behind it: what is found, as a value, for programs and in the terminal.

This module knows texts and numbers; it must not know models, or how scores come about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from wherefrom.report import notebook
from wherefrom.report.passages import Passage, excerpt
from wherefrom.report.reading import Reading
from wherefrom.report.shading import visible_pieces, window
from wherefrom.report.text import figures, shade, sources_table
from wherefrom.runtime.errors import printable
from wherefrom.scoring.results import GroupScore

_WORD = re.compile(r"\w+")
_LIKELIER, _LESS_LIKELY = "Training on these made it likelier", "Training on these made it less likely"
LONG = 5  # words; shorter runs are shared by texts that have nothing to do with each other


@dataclass(frozen=True)
class Found:
    """A training example behind an answer.

    Attributes:
        rank: from 1.
        score: raw.
        passage: the example for a reader; its text is that of the tokens where these are known.
        tokens: the text cut into its tokens, each with its part of the score; empty where that is not known.
        overlaps: what of the text stands in the answer word for word, in characters.
    """

    rank: int
    train: int
    score: float
    passage: Passage
    tokens: Sequence[tuple[str, float]] = ()
    overlaps: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(
        cls,
        rank: int,
        train: int,
        score: float,
        passage: Passage,
        parts: Sequence[tuple[str, float]] = (),
        answer: str = "",
    ) -> Found:
        """An example as it is found.

        Args:
            parts: its tokens' texts, each with its part of the score; empty where they are not known.
            answer: what its text may share words with.
        """
        tokens = visible_pieces(parts)
        if tokens:  # their text has other beginnings and ends
            passage = replace(passage, text="".join(text for text, _ in tokens), answer_start=0)
        return cls(rank, train, score, passage, tokens, overlaps(passage.text, answer))


@dataclass(frozen=True)
class Attribution:
    """Where an answer comes from.

    Attributes:
        prompt, answer: the texts.
        span: what of the answer was attributed, in characters.
        contrast: the other answer, whose scores were subtracted; None without one.
        method: the name of the method of the scores.
        computed_by: that with its damping.
        read: how scores are read.
        in_nats: whether that is a predicted rise.
        supporting: the examples with the highest scores above 0: training on them made the answer likelier.
        opposing: those with the lowest below 0.
        shared: those that share its words (BM25); None where that was not looked for.
        groups: sums over groups of all examples; None where none were asked for.
        column: of the training examples, that these groups are by.
        scored: how many training examples were scored exactly; of: of how many.
    """

    prompt: str
    answer: str
    span: tuple[int, int]
    contrast: str | None
    method: str
    computed_by: str
    read: Reading
    in_nats: bool
    supporting: Sequence[Found]
    opposing: Sequence[Found]
    shared: Sequence[Found] | None
    groups: Sequence[GroupScore] | None
    column: str | None
    scored: int
    of: int

    def to_json(self) -> dict[str, Any]:
        """All of it as json writes it; docs/how-to/ask.md says what each entry is."""
        read = self.read

        def worth(score: float) -> dict[str, float | None]:
            return {"score": score, "rise": read.factor * score if self.in_nats else None}

        def written(each: Found, scored: bool) -> dict[str, Any]:
            shown = each.passage
            return {
                "rank": each.rank,
                "train": each.train,
                **(worth(each.score) if scored else {"score": each.score}),
                **{name: getattr(shown, name) or None for name in ("title", "label", "source")},
                "text": shown.text,
                "answer_start": shown.answer_start,
                "tokens": [{"text": text, **worth(part)} for text, part in each.tokens] or None,
                "overlaps": [list(each) for each in each.overlaps],
            }

        groups = [{"group": each.group, "examples": each.train, **worth(each.sum)} for each in self.groups or ()]
        start, stop = self.span
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "span": {"start": start, "stop": stop, "text": self.answer[start:stop]},
            "contrast": self.contrast,
            "method": self.method,
            "computed_by": self.computed_by,
            "unit": read.heading if self.in_nats else None,
            "meaning": read.meaning,
            "scored": self.scored,
            "of": self.of,
            "supporting": [written(each, True) for each in self.supporting],
            "opposing": [written(each, True) for each in self.opposing],
            "bm25": None if self.shared is None else [written(each, False) for each in self.shared],
            "groups": None if self.groups is None else groups,
        }

    def shown(self) -> RenderableType:
        """All of it for the terminal, which does not obey the texts."""
        start, stop = self.span
        answer = Text(printable(self.answer))
        answer.stylize("reverse", start, stop)
        asked = Table.grid(padding=(0, 2))
        asked.add_row(Text("Prompt", style="bold"), Text(printable(self.prompt)))
        asked.add_row(Text("Answer", style="bold"), answer[len(self.answer) - len(self.answer.lstrip()) :])
        if self.contrast is not None:
            asked.add_row(Text("Not", style="bold"), Text(printable(self.contrast.lstrip())))
        parts: list[RenderableType] = [asked]
        parts += [Text(), *self._end(_LIKELIER, self.supporting)]
        parts += self._end(_LESS_LIKELY, self.opposing)
        if self.shared is not None:
            parts += [self._beside(self.shared), Text()]
        if self.groups is not None and self.column is not None:
            parts += [sources_table(self.groups, self.read, self.column), Text()]
        return Group(*parts, Text(self._meaning, style="dim"))

    def _repr_html_(self) -> str:
        """All of it for a notebook."""
        start, stop = self.span
        answer = [(self.answer[:start], False), (self.answer[start:stop], True), (self.answer[stop:], False)]
        texts = [notebook.Text("Prompt", [(self.prompt, False)]), notebook.Text("Answer", answer)]
        texts += [] if self.contrast is None else [notebook.Text("Not", [(self.contrast, False)])]
        limit, ends, tables = max((abs(each.score) for each in (*self.supporting, *self.opposing)), default=0.0), [], []
        for title, kind, found in (
            (_LIKELIER, "positive", self.supporting),
            (_LESS_LIKELY, "negative", self.opposing),
        ):
            hits = [
                notebook.ShownHit.of(each.train, each.score, limit, self.read, each.passage, each.tokens, each.overlaps)
                for each in found
            ]
            ends.append(notebook.End(title, kind, hits))
        if self.shared is not None:
            beside = [[str(each.rank), str(each.train), _said(each)] for each in self.shared]
            tables.append(notebook.Table(["By shared words (BM25)", "Train", "Text"], beside))
        if self.groups is not None and self.column is not None:
            sums = [[each.group, f"{each.train:,}", self.read(each.sum)] for each in self.groups]
            tables.append(
                notebook.Table([self.column.capitalize(), "Examples", f"Sum: {self.read.heading.lower()}"], sums)
            )
        return notebook.View(self.method, [], texts, ends, tables, self._meaning)._repr_html_()

    @property
    def _meaning(self) -> str:
        """What the numbers are, and how many there are."""
        said = f"{self.read.heading}: {self.read.meaning}."
        if any(each.overlaps for each in (*self.supporting, *self.opposing)):
            said += f" Underlined: {LONG} words or more that the answer has too."
        return f"{said} {self.scored:,} of {self.of:,} examples were scored exactly, by {printable(self.computed_by)}."

    def _end(self, heading: str, found: Sequence[Found]) -> list[RenderableType]:
        parts: list[RenderableType] = [Text(f"{heading}{'' if found else ': none'}", style="bold"), Text()]
        for each in found:
            line = Text(f"{each.rank:>2}. ")
            line.append(self.read(each.score), style="bold")
            parts += [line.append(f"  {_named(each)}"), _text(each), Text()]
        return parts

    def _beside(self, shared: Sequence[Found]) -> Table:
        """The examples of the highest scores, and those that share the answer's words."""
        table = Table(*figures("Rank", self.read.heading), "By influence", "By shared words (BM25)")
        influential = {each.train: each.rank for each in self.supporting}
        for place in range(max(len(self.supporting), len(shared))):
            worth, ours, theirs = "", Text(), Text()
            if place < len(self.supporting):
                each = self.supporting[place]
                worth, ours = self.read(each.score), _brief(each)
            if place < len(shared):
                also = influential.get(shared[place].train)
                theirs = _brief(shared[place]).append(f" (there {also}.)" if also else "", style="dim")
            table.add_row(str(place + 1), worth, ours, theirs)
        return table


def _named(each: Found) -> str:
    facts: Mapping[str, str] = {
        "{}": each.passage.title,
        "({})": each.passage.label,
        "from {}": each.passage.source,
    }
    return " ".join([f"train {each.train}", *(how.format(printable(said)) for how, said in facts.items() if said)])


def _brief(each: Found) -> Text:
    return Text(f"{each.train}  {printable(_said(each))}", overflow="fold")


def _said(each: Found) -> str:
    """A title, or the beginning of the text."""
    return each.passage.title or excerpt(each.passage.text, 60, each.passage.answer_start)


def _text(each: Found) -> Text:
    """An example's text around the tokens that say most, shaded, with what the answer has too underlined."""
    pieces = each.tokens or [(each.passage.text, 0.0)]
    text, limit = Text(), max((abs(part) for _, part in pieces), default=0.0)
    for piece, part in pieces:
        # Of the same length as the text, in which overlaps are counted.
        text.append(printable(piece).replace("\n", "↵").replace("\t", " "), shade(part / limit) if limit else Style())
    for start, stop in each.overlaps:
        text.stylize("underline bold", start, stop)
    shown = window(pieces, each.overlaps)
    around = "…" * (shown.start > 0), "…" * (shown.stop < len(text))
    return Text.assemble(around[0], text[shown.start : shown.stop], around[1])


def overlaps(text: str, other: str, words: int = LONG) -> list[tuple[int, int]]:
    """The runs of at least so many words of `text` that stand in `other` too, in the same order.

    Words are runs of letters and digits; their case, and what stands between them, makes no difference. Linear in the
    number of words.

    Returns:
        Where each begins and ends, in characters of `text`; runs that meet are one.
    """
    mine, known = list(_WORD.finditer(text)), runs(other, words)
    spoken = [each[0].casefold() for each in mine]
    found: list[tuple[int, int]] = []
    last = -1  # the last word of the latest run
    for at in range(len(mine) - words + 1):
        if tuple(spoken[at : at + words]) not in known:
            continue
        stop = mine[at + words - 1].end()
        if at <= last:
            found[-1] = found[-1][0], stop
        else:
            found.append((mine[at].start(), stop))
        last = at + words - 1
    return found


def runs(text: str, words: int = LONG) -> set[tuple[str, ...]]:
    """All runs of so many words of a text, in lower case."""
    found = _WORD.findall(text.casefold())
    return {tuple(found[at : at + words]) for at in range(len(found) - words + 1)}
