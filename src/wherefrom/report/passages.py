"""Passages: sequences as a reader sees them, and a dataset's examples as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from wherefrom.fingerprint import Dataset


@dataclass(frozen=True)
class Passage:
    """One sequence as the page shows it.

    `label` is its class or topic; a training sequence with its query's label is marked.
    """

    text: str
    title: str = ""
    label: str = ""


class Passages(Protocol):
    """Passages by index: a list, or an adapter that decodes a sequence when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Passage: ...


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class DatasetPassages:
    """A dataset's examples as passages, made when they are asked for.

    The columns `text`, `title` and `label` are used where an example has them; without `text` the tokenizer decodes
    `input_ids`, and without either the example is shown as Python prints it.
    """

    def __init__(self, dataset: Dataset[object], tokenizer: Tokenizer | None = None) -> None:
        self._dataset = dataset
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, position: int) -> Passage:
        example = self._dataset[position]
        if not isinstance(example, Mapping):
            return Passage(repr(example))
        columns = {name: str(example[name]) for name in ("title", "label") if example.get(name) is not None}
        return Passage(self._text(example), **columns)

    def _text(self, example: Mapping[str, object]) -> str:
        text = example.get("text")
        if isinstance(text, str):
            return text
        if self._tokenizer is not None and "input_ids" in example:
            tokens = [int(token) for token in example["input_ids"]]  # type: ignore[attr-defined]
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
        return repr(dict(example))
