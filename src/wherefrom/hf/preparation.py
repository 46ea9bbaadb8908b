"""From raw examples (texts, prompts, conversations) to token sequences, as Hugging Face's and TRL's trainers make them.

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

from wherefrom.hf.pairs import Example, judged, preferred, rewarded
from wherefrom.hf.text import read_dataset
from wherefrom.runtime.errors import InputError, first_line, require
from wherefrom.store.fingerprint import Dataset
from wherefrom.tasks.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("wherefrom")

Target = Literal["causal", "masked", "seq2seq", "classification", "tokens", "preference", "reward"]
RawExamples = str | Path | Sequence[str] | Dataset[object]

_MASKED_SHARE = 0.15  # Devlin et al. 2019, section 3.1
_SHOWN = ("title", "label")  # columns that reports show
_TOKENISED = ("input_ids", "chosen_ids", "completion_ids")  # columns of examples that stay as they are


@dataclass(frozen=True)
class Preparation:
    """How raw examples become those of a task.

    Attributes:
        target: what the model predicts.
        tokenizer: the model's; None where only tokenised examples are to be prepared.
        max_length: texts are cut off after so many tokens; None leaves them whole.
        end_token: put the end-of-sequence token after a text or completion, as TRL's SFTTrainer does.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase | None
    max_length: int | None = None
    end_token: bool = True

    def prepare(self, examples: RawExamples, split: str = "train") -> Dataset[object]:
        """Token sequences, in the order of the examples; those that are tokenised stay as they are.

        Args:
            examples: dicts, or texts, or where they are: a file, a saved dataset, a hub name (see `text.read_texts`).
            split: of a saved or hub dataset.

        Raises:
            InputError: there are no examples, or not the columns that the target needs.
        """
        data = read_examples(examples, split)
        if any(name in data[0] for name in _TOKENISED):
            return data
        columns, encode = self._encoder(data[0])
        prepared = [self._prepared(columns, encode, data[number], number) for number in range(len(data))]
        _report_uncounted(prepared)
        made: Dataset[object] = require("datasets").Dataset.from_list(prepared)
        return made

    def _encoder(self, example: Example) -> tuple[tuple[str, ...], _Encoder]:
        """The columns to read of examples like this one, and what makes token sequences of them."""
        known = _ENCODERS[self.target]
        for columns, encode in known.items():
            if all(name in example for name in columns):
                return columns, encode
        expected = ", or ".join(" and ".join(map(repr, columns)) for columns in known)
        raise InputError(
            f"The dataset has the columns {sorted(example)}: expected 'input_ids' (tokenised), or {expected}. Rename a "
            "column, or tokenise the dataset as it was for training."
        )

    def _prepared(self, columns: tuple[str, ...], encode: _Encoder, example: Example, number: int) -> dict[str, Any]:
        lacking = next((name for name in columns if example.get(name) is None), None)
        if lacking is not None:
            raise InputError(f"Example {number} of the dataset has no {lacking!r}; leave it out.")
        try:
            encoded = encode(self, example, number)
        except InputError:
            raise
        except Exception as error:  # whatever tokenizers, chat templates and json make of examples that are not theirs
            raise InputError(
                f"Example {number} of the dataset makes no tokens ({type(error).__name__}: {first_line(error)}). "
                f"Check its columns {', '.join(columns)}, and the tokenizer's chat template."
            ) from error
        if not encoded.get("input_ids", True):
            raise InputError(f"Example {number} of the dataset has no token; leave it out.")
        whole = "labels" if self.target == "classification" else None  # of all outputs, not of tokens
        cut = {
            name: values[: self.max_length] if isinstance(values, list) and name != whole else values
            for name, values in encoded.items()
        }
        shown = {name: example[name] for name in _SHOWN if name in example and name not in cut}
        text = encoded.get("text") or (example["text"] if "text" in example else self.decoded(cut["input_ids"]))
        return {**shown, **cut, "text": text}

    @property
    def tokens(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InputError: there is none.
        """
        if self.tokenizer is None:
            raise InputError(
                "The dataset has text, and the model's directory no tokenizer: pass tokenizer=, or examples with "
                "'input_ids'."
            )
        return self.tokenizer

    def decoded(self, ids: list[int]) -> str:
        """Tokens as a text for readers."""
        return str(self.tokens.decode(ids, skip_special_tokens=True))

    def ids(self, text: str, end: bool = False) -> list[int]:
        """A text as tokens; at its `end` the end-of-sequence token, if there is to be one."""
        end_token = self.tokens.eos_token
        if end and self.end_token and isinstance(end_token, str) and not text.endswith(end_token):
            text += end_token
        # verbose=False: a text longer than the model's context is cut afterwards.
        return list(self.tokens(text, verbose=False)["input_ids"])

    def chat(self, messages: object, example: Example, **options: bool) -> dict[str, list[int]]:
        """A conversation as tokens; `assistant_masks` where the options say so.

        Raises:
            InputError: the tokenizer has no chat template.
        """
        if not self.tokens.chat_template:
            raise InputError(
                "The dataset has messages, and the tokenizer no chat template: set tokenizer.chat_template."
            )
        tools = example.get("tools")
        encoded: Any = self.tokens.apply_chat_template(
            messages,  # type: ignore[arg-type]
            tokenize=True,
            return_dict=True,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **options,  # type: ignore[arg-type]
        )
        return {name: list(encoded[name]) for name in ("input_ids", "assistant_masks") if name in encoded}

    def cut_off(self, text: str, **options: Any) -> Any:
        """What the tokenizer makes of a text that it cuts itself, before the special tokens that it puts at the end."""
        return self.tokens(text, truncation=self.max_length is not None, max_length=self.max_length, **options)


def read_examples(examples: RawExamples, split: str = "train") -> Dataset[Example]:
    """Examples that are dicts: those that are given, or read from where they are; texts as `text`.

    Raises:
        InputError: there are none, or they are neither.
    """
    data: Any = read_dataset(str(examples), split) if isinstance(examples, str | Path) else examples
    if not hasattr(data, "__len__"):
        raise InputError(
            f"The dataset is a {type(data).__name__}, without a length: expected one that is loaded whole."
        )
    if len(data) == 0:
        raise InputError("The dataset is empty: expected at least one example. Check the path or the filter.")
    if isinstance(data[0], str):
        data = [{"text": text} for text in data]
    if not isinstance(data[0], Mapping):
        raise InputError(f"The dataset has examples of type {type(data[0]).__name__}: expected dicts or texts.")
    return data  # type: ignore[no-any-return]


_Encoder = Callable[[Preparation, Example, int], dict[str, Any]]


def _text(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    return {"input_ids": preparation.ids(example["text"], end=True)}


def _completion(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """The loss is of the completion only; both are texts, or messages."""
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        start, whole = preparation.ids(prompt), preparation.ids(prompt + completion, end=True)
    else:
        start = preparation.chat(prompt, example, add_generation_prompt=True)["input_ids"]
        whole = preparation.chat([*prompt, *completion], example)["input_ids"]
    return {"input_ids": whole, "completion_mask": [int(position >= len(start)) for position in range(len(whole))]}


def _messages(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """The loss is of the assistant's turns, where the template marks them, and otherwise of everything."""
    template = preparation.tokens.chat_template and preparation.tokens.get_chat_template()
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", template or "") is not None
    encoded = preparation.chat(example["messages"], example, return_assistant_tokens_mask=marked)
    if not marked and number == 0:
        logger.info(
            "The chat template does not mark the assistant's turns ({% generation %}): the loss is of all tokens."
        )
    return encoded


def _masked_text(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """15% of the tokens are masked, the same ones whenever the dataset is prepared."""
    encoded = preparation.cut_off(example["text"], return_special_tokens_mask=True)
    ids, mask_token = encoded["input_ids"], preparation.tokens.mask_token_id
    maskable = [position for position, special in enumerate(encoded["special_tokens_mask"]) if not special]
    if not maskable or mask_token is None:
        raise InputError(f"Example {number} of the dataset has no token to mask, or the tokenizer no mask token.")
    order = torch.randperm(len(maskable), generator=torch.Generator().manual_seed(number)).tolist()
    masked = {maskable[each] for each in order[: max(1, round(_MASKED_SHARE * len(maskable)))]}
    return {
        **{name: list(encoded[name]) for name in ("token_type_ids",) if name in encoded},
        "input_ids": [mask_token if position in masked else each for position, each in enumerate(ids)],
        "labels": [each if position in masked else IGNORED for position, each in enumerate(ids)],
    }


def _pair(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
    """What an encoder and what a decoder takes; these tokenizers end a sequence themselves."""
    encoded = preparation.cut_off(example["prompt"], text_target=example["completion"])
    return {name: list(encoded[name]) for name in ("input_ids", "labels")}


def _classified(column: str) -> _Encoder:
    def encode(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
        encoded = preparation.cut_off(example["text"])
        inputs = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**inputs, "labels": example[column]}

    return encode


def _words(column: str) -> _Encoder:
    """A label for each word is that of its first token; others are not counted, as in transformers' run_ner.py."""

    def encode(preparation: Preparation, example: Example, number: int) -> dict[str, Any]:
        encoded = preparation.cut_off(example["tokens"], is_split_into_words=True)
        words, labels = encoded.word_ids(), example[column]
        before = [None, *words[:-1]]
        counted = [IGNORED if word in (None, last) else labels[word] for word, last in zip(words, before, strict=True)]
        return {"input_ids": list(encoded["input_ids"]), "labels": counted}

    return encode


# Columns that examples have, and what makes token sequences of them; the first that fit.
_ENCODERS: dict[Target, dict[tuple[str, ...], _Encoder]] = {
    "causal": {("messages",): _messages, ("prompt", "completion"): _completion, ("text",): _text},
    "masked": {("text",): _masked_text},
    "seq2seq": {("prompt", "completion"): _pair},
    "classification": {("text", "label"): _classified("label"), ("text", "labels"): _classified("labels")},
    "tokens": {("tokens", "labels"): _words("labels"), ("tokens", "ner_tags"): _words("ner_tags")},
    "preference": {("chosen", "rejected"): preferred, ("prompt", "completion", "label"): judged},
    "reward": {("chosen", "rejected"): rewarded},
}


def _report_uncounted(examples: Sequence[Example]) -> None:
    for name in ("completion_mask", "assistant_masks"):
        empty = [number for number, example in enumerate(examples) if not any(example.get(name, [1]))]
        if empty:
            logger.warning(
                f"{len(empty)} examples have no counted token ({name}), example {empty[0]} for one: they score 0."
            )
