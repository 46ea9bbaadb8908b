"""From what an example says to tokens and labels, as Hugging Face's and TRL's trainers make them.

This module knows tokenizers and chat templates; it knows nothing of files, columns or models.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from wherefrom.hf.formats import Chat, Content, Count, Example, Messages, Pair, Target, messages_of
from wherefrom.hf.pairs import common_start, judged, preferred, rewarded
from wherefrom.runtime.errors import InputError
from wherefrom.tasks.losses import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MASKED_SHARE = 0.15  # Devlin et al. 2019, section 3.1


@dataclass(frozen=True)
class Encoder:
    """Makes the columns of a task of what examples say.

    Attributes:
        target: what the model predicts.
        max_length: sequences are cut off after so many tokens; None leaves them whole.
        end_token: put the end-of-sequence token after a text or completion, as TRL's SFTTrainer does.
        count: the tokens whose loss is meant.
        notes: what has to be said of examples, and of which.
    """

    target: Target
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    end_token: bool
    count: Count
    notes: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, content: Content, example: Example, number: int) -> dict[str, Any]:
        """The columns of an example that the task reads: its `input_ids`, `labels` where not all are counted, ...

        Also the `text` that is left, where what a causal model reads was cut off, and that of preferences.

        Args:
            content: what the example says, of a kind that the target takes.
            number: of the example in its dataset.
        """
        if self.target == "reward":
            return rewarded(self, example)
        if self.target == "preference":
            return preferred(self, example) if "chosen" in example else judged(self, example)
        encoders: dict[Target, Callable[[Any, Example, int], dict[str, Any]]] = {
            "causal": self._causal,
            "masked": self._masked,
            "seq2seq": self._pair,
            "classification": self._classified,
            "tokens": self._words,
        }
        return encoders[self.target](content, example, number)

    def ids(self, text: str, end: bool = False) -> list[int]:
        """A text as tokens; at its `end` the end-of-sequence token, if there is to be one."""
        end_token = self.tokenizer.eos_token
        if end and self.end_token and isinstance(end_token, str) and not text.endswith(end_token):
            text += end_token
        # verbose=False: a text longer than the model's context is cut afterwards.
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def chat_ids(self, messages: Messages, example: Example, answering: bool = False) -> list[int]:
        """A conversation as tokens; with the beginning of an answer to it, if the model is `answering`."""
        text = self._rendered(messages_of(messages), example, add_generation_prompt=answering)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decoded(self, ids: list[int]) -> str:
        """Tokens as a text for readers."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def note(self, what: str, number: int) -> None:
        """Remember that this has to be said of an example."""
        self.notes.setdefault(what, []).append(number)

    def _causal(self, content: Content, example: Example, number: int) -> dict[str, Any]:
        ids, counted = self._chat(content, example) if isinstance(content, Chat) else self._text(content, number)
        left = {}
        if self.max_length is not None and len(ids) > self.max_length:
            self.note(f"are longer than {self.max_length:,} tokens and cut off there", number)
            ids, counted = ids[: self.max_length], counted[: self.max_length]
            left["text"] = self.decoded(ids)
        if not any(counted[1:]):
            self.note("have no counted token and score 0", number)
        labels = [each if count else IGNORED for each, count in zip(ids, counted, strict=True)]
        return {"input_ids": ids, **({} if all(counted) else {"labels": labels}), **left}

    def _text(self, content: str | Pair, number: int) -> tuple[list[int], Sequence[bool]]:
        """Tokens of a text, all counted, or of a prompt and its completion.

        A completion begins with the first token that the prompt alone would not have there.
        """
        if isinstance(content, str):
            ids = self.ids(content, end=True)
            return ids, [True] * len(ids)
        prompt, ids = self.ids(content.prompt), self.ids(content.prompt + content.completion, end=True)
        start = common_start(prompt, ids)
        if start < len(prompt) and prompt[start] not in self.tokenizer.all_special_ids:
            self.note("have a token with the prompt's end and the completion's beginning, which is counted", number)
        return ids, [self.count == "all" or position >= start for position in range(len(ids))]

    def _chat(self, chat: Chat, example: Example) -> tuple[list[int], Sequence[bool]]:
        """A conversation as tokens, and which of them are counted.

        Where the template marks the assistant's turns, its marks count. Otherwise a turn is what the whole has beyond
        the conversation before it, with the beginning of an answer that the template adds when it is to be generated.
        A token that is partly of a turn is counted, as transformers does with marks.

        Raises:
            InputError: there is no template, or the whole does not begin with its parts, so that turns cannot be told.
        """
        whole: str = self._rendered(chat.messages, example)
        template = self.tokenizer.get_chat_template(tools=example.get("tools"))
        if self.count == "assistant" and re.search(r"\{%-?\s*generation\s*-?%\}", template):
            tokens = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            marked = self._rendered(chat.messages, example, **tokens)
            return list(marked["input_ids"]), [bool(each) for each in marked["assistant_masks"]]
        if self.count == "all":
            ids = self.chat_ids(chat.messages, example)
            return ids, [True] * len(ids)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        first, last = ([offset[end] for offset in encoded["offset_mapping"]] for end in (0, 1))
        counted = [False] * len(first)
        for turn in filter(len, chat.spoken("assistant") if self.count == "assistant" else [chat.answer]):
            answered = chat.messages[turn.start]["role"] == "assistant"
            before = self._rendered(chat.messages[: turn.start], example, add_generation_prompt=answered)
            upto = self._rendered(chat.messages[: turn.stop], example)
            if not (upto.startswith(before) and whole.startswith(upto)):
                raise InputError(
                    "the chat template renders the beginning of its conversation in another way than the whole (some "
                    "leave out earlier reasoning), so that turns cannot be told apart. Pass count='completion', the "
                    "last answer alone, or count='all'; or give the tokenizer a chat_template with {% generation %} "
                    "around the assistant's turns."
                )
            found = range(bisect_right(last, len(before)), bisect_left(first, len(upto)))
            counted[found.start : found.stop] = [True] * len(found)
        return list(encoded["input_ids"]), counted

    def _rendered(self, messages: Messages, example: Example, **options: Any) -> Any:
        """What the chat template makes of messages, with the tools that an example names: a text, or as options say."""
        if not self.tokenizer.chat_template:
            raise InputError("it is a conversation, and the tokenizer has no chat template: set its chat_template.")
        tools = example.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tokenize": False, "tools": tools, **(example.get("chat_template_kwargs") or {}), **options}
        return self.tokenizer.apply_chat_template(list(messages), **options)  # type: ignore[arg-type]

    def _masked(self, text: str, example: Example, number: int) -> dict[str, Any]:
        """15% of the tokens are masked, the same ones whenever the dataset is prepared."""
        encoded = self._cut_off(text, number, return_special_tokens_mask=True)
        ids, mask_token = encoded["input_ids"], self.tokenizer.mask_token_id
        maskable = [position for position, special in enumerate(encoded["special_tokens_mask"]) if not special]
        if not maskable or mask_token is None:
            raise InputError("it has no token to mask, or the tokenizer no mask token.")
        order = torch.randperm(len(maskable), generator=torch.Generator().manual_seed(number)).tolist()
        masked = {maskable[each] for each in order[: max(1, round(_MASKED_SHARE * len(maskable)))]}
        return {
            **{name: list(encoded[name]) for name in ("token_type_ids",) if name in encoded},
            "input_ids": [mask_token if position in masked else each for position, each in enumerate(ids)],
            "labels": [each if position in masked else IGNORED for position, each in enumerate(ids)],
        }

    def _pair(self, pair: Pair, example: Example, number: int) -> dict[str, Any]:
        """What an encoder and what a decoder takes; these tokenizers end a sequence themselves."""
        encoded = self._cut_off(pair.prompt, number, text_target=pair.completion)
        return {name: list(encoded[name]) for name in ("input_ids", "labels")}

    def _classified(self, text: str, example: Example, number: int) -> dict[str, Any]:
        encoded = self._cut_off(text, number)
        inputs = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**inputs, "labels": _labels(example, "label", "labels")}

    def _words(self, text: str, example: Example, number: int) -> dict[str, Any]:
        """A label for each word is that of its first token; others are not counted, as in transformers' run_ner.py."""
        labels = _labels(example, "labels", "ner_tags")
        if len(labels) != len(example["tokens"]):
            raise InputError(f"it has {len(labels)} labels of {len(example['tokens'])} words: expected one of each.")
        encoded = self._cut_off(example["tokens"], number, is_split_into_words=True)
        words = encoded.word_ids()
        before = [None, *words[:-1]]
        counted = [IGNORED if word in (None, last) else labels[word] for word, last in zip(words, before, strict=True)]
        return {"input_ids": list(encoded["input_ids"]), "labels": counted}

    def _cut_off(self, text: str | list[str], number: int, **options: Any) -> Any:
        """What the tokenizer makes of a text that it cuts itself, before the special tokens that it puts at the end."""
        encoded = self.tokenizer(text, verbose=False, **options)
        if self.max_length is None or all(len(each) <= self.max_length for each in encoded.values()):
            return encoded
        self.note(f"are longer than {self.max_length:,} tokens and cut off there", number)
        return self.tokenizer(text, truncation=True, max_length=self.max_length, **options)


def _labels(example: Example, *columns: str) -> Any:
    """What stands in the first of the columns that an example has."""
    found = next((example[name] for name in columns if example.get(name) is not None), None)
    if found is None:
        raise InputError(f"it has no {' or '.join(map(repr, columns))}; leave it out.")
    return found
