"""Passages: sequences as a reader sees them, a dataset's examples as such, and the tokens inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from operator import eq
from typing import Protocol

from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.scoring.results import GroupScore, Scores, TopScores
from wherefrom.scoring.tokens import TokenScores, TopChunks
from wherefrom.store.fingerprint import QUERIES, TRAIN, Dataset, Fingerprint, check_about, dataset_digest, read_example

# How many tokens may wait for the text that they complete. A character has at most four bytes, and so at most four
# tokens; the rest is for decoders that change text when the next word is known.
WAITING_TOKENS = 16


@dataclass(frozen=True)
class Passage:
    """One sequence as the page shows it.

    Attributes:
        label: its class or topic; a training sequence with its query's label is marked.
        source: where it comes from.
        answer_start: the character of `text` where the answer to a prompt begins; 0 where there is none.
    """

    text: str
    title: str = ""
    label: str = ""
    source: str = ""
    answer_start: int = 0


class Passages(Protocol):
    """Passages by index: a list, or an adapter that decodes a sequence when it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Passage: ...


class TokenContributions(Protocol):
    """Where a score comes from inside a training sequence."""

    def __call__(self, query: int, train: int) -> Sequence[tuple[str, float]] | None:
        """The sequence's pieces of text in order, each with its share of the score of (query, train).

        None where it is not known. A training sequence has the same pieces whatever the query.
        """


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = ...) -> str | list[str]: ...


class DatasetPassages:
    """A dataset's examples as passages, made when they are read.

    The columns `text`, `title`, `label`, `source` and `answer_start` are used where an example has them; without `text`
    the tokenizer decodes `input_ids`, and without either the example is shown as Python prints it.
    """

    def __init__(self, dataset: Dataset[object], tokenizer: Tokenizer | None = None) -> None:
        self.dataset = dataset
        self._tokenizer = tokenizer

    @cached_property
    def digest(self) -> str:
        """What tells the dataset from others, as it is when this is first read."""
        return dataset_digest(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Passage:
        example = self.dataset[position]
        if not isinstance(example, Mapping):
            return Passage(repr(example))
        columns = {name: str(example[name]) for name in ("title", "label", "source") if example.get(name) is not None}
        return Passage(self._text(example), **columns, answer_start=int(example.get("answer_start") or 0))

    def of_tokens(self, position: int, start: int, stop: int) -> Passage:
        """An example with the text of its tokens from `start` to before `stop`; all of it where these have no text."""
        example, passage = self.dataset[position], self[position]
        if self._tokenizer is None or not isinstance(example, Mapping) or "input_ids" not in example:
            return passage
        pieces = token_pieces(self._tokenizer, example["input_ids"])
        return replace(passage, text="".join(pieces[start:stop]), answer_start=0)

    def sources(self) -> list[str]:
        """Where each example comes from; empty where the first does not say."""
        if not isinstance(self.dataset[0], Mapping) or "source" not in self.dataset[0]:
            return []
        examples = (read_example(self.dataset, position) for position in range(len(self)))
        return [str(example.get("source", "")) if isinstance(example, Mapping) else "" for example in examples]

    def _text(self, example: Mapping[str, object]) -> str:
        text = example.get("text")
        if isinstance(text, str):
            return text
        if self._tokenizer is not None and "input_ids" in example:
            tokens = [int(token) for token in example["input_ids"]]  # type: ignore[attr-defined]
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return repr(dict(example))


def checked_passages(
    scores: Scores | TopScores | TopChunks,
    queries: Passages,
    train: Passages,
    tokens: TokenContributions | None = None,
) -> Passages:
    """What is shown as queries beside scores: a single passage that says so where they were added up.

    Passages of a dataset are held against what the scores are about, which takes a look at all of its examples; a list
    of passages can be another view of the same examples, and only its length is compared.

    Args:
        tokens: shown beside the same scores.

    Raises:
        InputError: there are more queries or training examples than the scores have, or fewer.
        MismatchError: the scores are about another dataset, or the tokens' scores are no parts of these.
    """
    how = scores.fingerprint.get("aggregated queries")
    if "aggregated training examples" in scores.fingerprint:
        raise InputError(
            "These scores add up all training examples, so none stands beside its score: leave Aggregated(train=...) "
            "out."
        )
    count, shape = len(queries) if how is None else min(1, len(queries)), tuple(scores.values.shape)
    if isinstance(scores, Scores):
        fits = shape == (count, len(train))
    else:
        fits = shape[0] == count and max(int(scores.train.max()), int(scores.lowest_train.max())) < len(train)
    if not fits:
        raise InputError(
            f"scores have shape {shape}; expected a row for each of {count} queries and the scores of {len(train)} "
            "training sequences."
        )
    both = ((QUERIES, queries), (TRAIN, train))
    check_about(scores.fingerprint, {name: each.digest for name, each in both if isinstance(each, DatasetPassages)})
    if isinstance(tokens, DatasetTokens):
        tokens.check(scores.fingerprint)
    return queries if how is None else [Passage(f"The {how} of {len(queries):,} queries.")]


def source_scores(scores: Scores | TopScores | TopChunks, train: Passages) -> list[list[GroupScore]]:
    """For each query, the sums of its scores by where training examples come from; empty where that is not known."""
    sources = train.sources() if isinstance(train, DatasetPassages) and isinstance(scores, Scores) else []
    found: list[list[GroupScore]] = [[] for _ in scores.values]
    for each in scores.by(sources) if sources and isinstance(scores, Scores) else ():
        found[each.query].append(each)
    return found


class DatasetTokens:
    """The pieces of a dataset's examples with their token scores, where those are stored.

    Args:
        scores: of the dataset's examples as training examples.
        dataset: examples with `input_ids`.
        tokenizer: turns token numbers into text.

    Raises:
        MismatchError: the scores are about other training examples.
    """

    def __init__(self, scores: TokenScores, dataset: Dataset[object], tokenizer: Tokenizer) -> None:
        check_about(scores.fingerprint, {TRAIN: dataset_digest(dataset)})
        self._scores = scores
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._pieces: dict[int, list[str]] = {}

    def check(self, scores: Fingerprint) -> None:
        """Refuse to be shown beside sequence scores whose parts these are not.

        Raises:
            MismatchError: names what differs.
        """
        changed = self._scores.differences(scores)
        if changed:
            raise MismatchError(
                f"tokens belong to other scores than these. {'; '.join(changed)}. Call score with keep=Tokens() and "
                "the method of these scores."
            )

    def __call__(self, query: int, train: int) -> Sequence[tuple[str, float]] | None:
        if (query, train) not in self._scores:
            return None
        if train not in self._pieces:
            example = self._dataset[train]
            if not isinstance(example, Mapping) or "input_ids" not in example:
                raise InputError(f"Training example {train} has no 'input_ids': expected a tokenised sequence.")
            self._pieces[train] = token_pieces(self._tokenizer, example["input_ids"])
        return list(zip(self._pieces[train], self._scores[query, train].tolist(), strict=True))


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """One piece of text for each token; joined, they are what the tokenizer makes of all of `ids`, special tokens too.

    A token alone does not say its text: decoders strip the space before the first word, and byte-level tokens may be
    parts of a character. So each is decoded behind the tokens of the piece before it, and its text is what that adds,
    as far as the whole text goes on in the same way, which half a character does not. The token that completes a
    character has it; tokens that complete none have the empty string. What is left at the end goes to the last piece.

    The windows are bounded, so the time is linear in the number of tokens.
    """
    tokens = [int(token) for token in ids]

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(tokens[start:end], skip_special_tokens=False))

    whole = decode(0, len(tokens))
    ending = len(whole.rstrip("\ufffd"))  # what follows may be left over
    pieces: list[str] = []
    written = 0  # characters of the whole text that are in pieces
    start = done = 0  # the window's first token, and the first after those that are complete
    known = settled = 0  # characters before `done`: in the window, in the whole text
    for end in range(1, len(tokens) + 1):
        added = decode(start, end)[known:]
        expected = whole[settled : min(ending, settled + len(added))]
        agreed = sum(takewhile(bool, map(eq, added, expected)))
        complete = bool(added) and agreed == len(added)
        if not complete and end - done >= WAITING_TOKENS:
            # This decoder reads a window in another way than the whole: go on where they agree again.
            agreed = len(added) + max(0, whole.find(added, settled) - settled)
            complete = True
        reached = min(len(whole), max(written, settled + agreed))
        pieces.append(whole[written:reached])
        written = reached
        if complete:
            start, done, settled = done, end, reached
            known = len(decode(start, done))
    if pieces:
        pieces[-1] += whole[written:]
    return pieces


def excerpt(text: str, width: int = 160, answer_start: int = 0) -> str:
    """The beginning of a text on one line, of an answer to a prompt the beginnings of both.

    Cut between words unless there are none to cut between, as in Chinese.

    Args:
        answer_start: as in `Passage`.
    """
    if answer_start:
        prompt = excerpt(text[:answer_start], width // 2)
        return f"{prompt} {excerpt(text[answer_start:], width - len(prompt) - 1)}"
    line = " ".join(text[: 4 * width].split())
    if len(line) <= width:
        return line
    cut = line.rfind(" ", 0, width)
    return line[: cut if cut > width // 2 else width] + "…"
