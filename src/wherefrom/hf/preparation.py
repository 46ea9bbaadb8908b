"""From rows of a dataset to token sequences, as Hugging Face's and TRL's trainers make them.

This module knows tokenizers and the columns that datasets have; it knows nothing of models, tasks or the engine.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from wherefrom.hf.text import read_rows
from wherefrom.runtime.errors import InputError, require
from wherefrom.store.fingerprint import Dataset
from wherefrom.tasks.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wherefrom")

Target = Literal["causal", "masked", "seq2seq", "classification"]
Row = Mapping[str, Any]
Rows = str | Path | Sequence[str] | Dataset[object]

_MASKED_SHARE = 0.15  # Devlin et al. 2019, section 3.1
_KEPT = ("title", "label")  # columns that reports show


@dataclass(frozen=True)
class Preparation:
    """How rows become the examples of a task.

    Attributes:
        target: what the model predicts.
        tokenizer: the model's; None where only tokenised rows are to be prepared.
        max_length: texts are cut off after so many tokens; None leaves them whole.
        end_token: put the end-of-sequence token after a text or completion, as TRL's SFTTrainer does.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None = None
    end_token: bool = True

    def examples(self, rows: Rows, split: str = "train") -> Dataset[object]:
        """Rows as examples, in their order; tokenised ones, with a column `input_ids`, stay as they are.

        Args:
            rows: dicts, or texts, or where they are: a file, a saved dataset, a hub name (see `text.read_rows`).
            split: of a saved or hub dataset.

        Raises:
            InputError: there are no rows, or not the columns that the target needs.
        """
        data: Any = read_rows(str(rows), split) if isinstance(rows, str | Path) else rows
        if not hasattr(data, "__len__"):
            raise InputError(
                f"The dataset is a {type(data).__name__}, without a length: expected one that is loaded whole."
            )
        if len(data) == 0:
            raise InputError("The dataset is empty: expected at least one row. Check the path or the filter.")
        if isinstance(data[0], str):
            data = [{"text": text} for text in data]
        if not isinstance(data[0], Mapping):
            raise InputError(f"The dataset has rows of type {type(data[0]).__name__}: expected dicts or texts.")
        if "input_ids" in data[0]:
            return data  # type: ignore[no-any-return]
        columns, encode = self._encoder(data[0])
        examples = [self._example(columns, encode, data[number], number) for number in range(len(data))]
        _report_uncounted(examples)
        made: Dataset[object] = require("datasets").Dataset.from_list(examples)
        return made

    def _encoder(self, row: Row) -> tuple[tuple[str, ...], _Encoder]:
        """The columns to read of rows like this one, and what makes token sequences of them."""
        known = _ENCODERS[self.target]
        for columns, encode in known.items():
            if all(name in row for name in columns):
                return columns, encode
        expected = ", or ".join(" and ".join(map(repr, columns)) for columns in known)
        raise InputError(
            f"The dataset has the columns {sorted(row)}: expected 'input_ids' (tokenised), or {expected}. Rename a "
            "column, or tokenise the dataset as it was for training."
        )

    def _example(self, columns: tuple[str, ...], encode: _Encoder, row: Row, number: int) -> dict[str, Any]:
        lacking = next((name for name in columns if row.get(name) is None), None)
        if lacking is not None:
            raise InputError(f"Row {number} of the dataset has no {lacking!r}; leave it out.")
        encoded = encode(self, row, number)
        if not encoded["input_ids"]:
            raise InputError(f"Row {number} of the dataset has no token; leave it out.")
        cut = {
            name: values[: self.max_length] if isinstance(values, list) else values for name, values in encoded.items()
        }
        shown = {name: row[name] for name in _KEPT if name in row and name not in cut}
        text = row["text"] if "text" in row else self.tokens.decode(cut["input_ids"], skip_special_tokens=True)
        return {**shown, **cut, "text": text}

    @property
    def tokens(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError(
                "The dataset has text, and the model's directory no tokenizer: pass tokenizer=, or rows with "
                "'input_ids'."
            )
        return self.tokenizer

    def ended(self, text: str) -> str:
        """A text with the end-of-sequence token after it, if it is to have one."""
        end = self.tokens.eos_token
        return text + end if self.end_token and isinstance(end, str) and not text.endswith(end) else text


_Encoder = Callable[[Preparation, Row, int], dict[str, Any]]


def _text(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
    return {"input_ids": _ids(preparation, preparation.ended(row["text"]))}


def _completion(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
    """The loss is of the completion only; both sides are texts, or both are messages."""
    if isinstance(row["prompt"], str):
        prompt = _ids(preparation, row["prompt"])
        whole = _ids(preparation, row["prompt"] + preparation.ended(row["completion"]))
    else:
        prompt = _chat(preparation, row["prompt"], row, add_generation_prompt=True)["input_ids"]
        whole = _chat(preparation, [*row["prompt"], *row["completion"]], row)["input_ids"]
    return {"input_ids": whole, "completion_mask": [int(place >= len(prompt)) for place in range(len(whole))]}


def _messages(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
    """The loss is of the assistant's turns, where the template marks them, and otherwise of everything."""
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", _template(preparation)) is not None
    if not marked and number == 0:
        logger.info(
            "The chat template does not mark the assistant's turns ({% generation %}): the loss is of all tokens."
        )
    return _chat(preparation, row["messages"], row, return_assistant_tokens_mask=marked)


def _masked_text(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
    """15% of the tokens are masked, the same ones whenever the dataset is prepared."""
    tokenizer = preparation.tokens
    encoded = tokenizer(row["text"], return_special_tokens_mask=True, **_cut_off(preparation))
    ids = encoded["input_ids"]
    places = [place for place, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not places or tokenizer.mask_token_id is None:
        raise InputError(f"Row {number} of the dataset has no token to mask, or the tokenizer no mask token.")
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(number)).tolist()
    chosen = {places[each] for each in order[: max(1, round(_MASKED_SHARE * len(places)))]}
    return {
        **{name: list(encoded[name]) for name in ("token_type_ids",) if name in encoded},
        "input_ids": [tokenizer.mask_token_id if place in chosen else each for place, each in enumerate(ids)],
        "labels": [each if place in chosen else IGNORED for place, each in enumerate(ids)],
    }


def _pair(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
    """An encoder's and a decoder's side; these tokenizers end a sequence themselves."""
    encoded = preparation.tokens(row["prompt"], text_target=row["completion"], **_cut_off(preparation))
    return {name: list(encoded[name]) for name in ("input_ids", "labels")}


def _classified(column: str) -> _Encoder:
    def encode(preparation: Preparation, row: Row, number: int) -> dict[str, Any]:
        encoded = preparation.tokens(row["text"], **_cut_off(preparation))
        kept = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**kept, "labels": row[column]}

    return encode


# Columns that rows have, and what makes token sequences of them; the first that fit.
_ENCODERS: dict[Target, dict[tuple[str, ...], _Encoder]] = {
    "causal": {("messages",): _messages, ("prompt", "completion"): _completion, ("text",): _text},
    "masked": {("text",): _masked_text},
    "seq2seq": {("prompt", "completion"): _pair},
    "classification": {("text", "label"): _classified("label"), ("text", "labels"): _classified("labels")},
}


def _ids(preparation: Preparation, text: str) -> list[int]:
    # verbose=False: a text longer than the model's context is cut afterwards.
    return list(preparation.tokens(text, verbose=False)["input_ids"])


def _cut_off(preparation: Preparation) -> dict[str, Any]:
    """Options with which a tokenizer cuts a text itself, before the special tokens that it puts at the end."""
    return {"truncation": preparation.max_length is not None, "max_length": preparation.max_length}


def _template(preparation: Preparation) -> str:
    template = preparation.tokens.chat_template
    if not template:
        raise InputError("The dataset has messages, and the tokenizer no chat template: set tokenizer.chat_template.")
    return preparation.tokens.get_chat_template()


def _chat(preparation: Preparation, messages: object, row: Row, **options: bool) -> dict[str, list[int]]:
    """A conversation as tokens; `assistant_masks` where they are asked for."""
    _template(preparation)
    tools = row.get("tools")
    encoded: Any = preparation.tokens.apply_chat_template(
        messages,  # type: ignore[arg-type]
        tokenize=True,
        return_dict=True,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        **options,  # type: ignore[arg-type]
    )
    return {name: list(encoded[name]) for name in ("input_ids", "assistant_masks") if name in encoded}


def _report_uncounted(examples: Sequence[Row]) -> None:
    for name in ("completion_mask", "assistant_masks"):
        empty = [number for number, example in enumerate(examples) if not any(example.get(name, [1]))]
        if empty:
            logger.warning(f"{len(empty)} rows have no counted token ({name}), row {empty[0]} for one: they score 0.")
