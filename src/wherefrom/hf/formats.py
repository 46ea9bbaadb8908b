"""Formats of fine-tuning data: by which columns each is recognised, and what an example of it says.

This module knows columns; it knows no tokenizers, files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from wherefrom.runtime.errors import InputError

Target = Literal["causal", "masked", "seq2seq", "classification", "tokens", "preference", "reward"]
Format = Literal[
    "tokens", "messages", "conversations", "prompt-completion", "alpaca", "question-answer", "preference",
    "unpaired-preference", "words", "text",
]  # fmt: skip
Count = Literal["all", "completion", "assistant"]
Example = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

# Stanford Alpaca's prompts (Taori et al. 2023), for an instruction alone and for one with an input.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)
# ShareGPT's speakers, and those of its relatives, as chat templates call them.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
_KNOWN_ROLES = ("user", "assistant", "system", "tool")


class Pair(NamedTuple):
    """A prompt and its completion; `question` is the prompt as a reader wants it, without what surrounds it."""

    prompt: str
    completion: str
    question: str

    @property
    def shown(self) -> list[str]:
        """What a reader is shown; the last part is the answer."""
        return [self.question, f"→ {self.completion}"]


class Chat(NamedTuple):
    """A conversation, and which of its messages are the answer to those before."""

    messages: Messages
    answer: range

    @property
    def shown(self) -> list[str]:
        """What a reader is shown; the last part is the answer."""
        turns = [f"{each['role']}: {_said(each)}" for each in self.messages]
        return [*turns[: self.answer.start], "\n\n".join(turns[self.answer.start :])]

    def spoken(self, role: str) -> list[range]:
        """The runs of messages of a role."""
        found: list[range] = []
        for number, message in enumerate(self.messages):
            if message["role"] == role:
                follows = bool(found) and found[-1].stop == number
                start = found.pop().start if follows else number
                found.append(range(start, number + 1))
        return found


Content = str | Pair | Chat
NUMBERS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "margin", "kl")
"""Columns that tasks of preferences read beside texts."""
_TOKENISED = ("input_ids", "chosen_ids", "completion_ids")  # columns of examples that stay as they are


def readable(content: Content) -> dict[str, Any]:
    """What a reader is shown: the column `text`, and where in it the answer to a prompt begins."""
    if isinstance(content, str):
        return {"text": content}
    text = "\n\n".join(content.shown)
    return {"text": text, "answer_start": len(text) - len(content.shown[-1])}


class Reading(NamedTuple):
    """How examples of a format are read.

    Attributes:
        columns: by which they are recognised; a single one may have another name.
        called: by a log.
        counts: what of them can be counted; the first is the default. None of tokens, which stay as they are.
        read: what an example says, given the name of the first column.
        also: other columns that are read where there are any.
    """

    columns: tuple[str, ...]
    called: str
    counts: tuple[Count, ...]
    read: Callable[[Example, str], Content]
    also: tuple[str, ...] = ()


def _text(example: Example, column: str) -> str:
    value = example[column]
    if not isinstance(value, str | int | float):  # or what Python prints of it would be read as text
        raise InputError(f"{column!r} is a {type(value).__name__}: expected a text.")
    return str(value)


def _words(example: Example, column: str) -> str:
    return " ".join(example[column])


def _itself(example: Example, column: str) -> str:
    """Nothing: such examples are encoded as they are, with a text of their own for readers."""
    return ""


def _prompt_completion(example: Example, column: str) -> Pair | Chat:
    prompt, completion = example[column], example["completion"]
    if isinstance(prompt, str):
        return Pair(prompt, completion, prompt)
    return Chat(messages_of([*prompt, *completion]), range(len(prompt), len(prompt) + len(completion)))


def _alpaca(example: Example, column: str) -> Pair:
    instruction, given = _text(example, column), _text(example, "input") if example.get("input") else ""
    prompt = (_ALPACA_WITH_INPUT if given else _ALPACA).format(instruction=instruction, input=given)
    return Pair(prompt, example["output"], f"{instruction}\n{given}".strip())


def _question_answer(example: Example, column: str) -> Pair:
    question = _text(example, column)
    return Pair(f"Question: {question}\nAnswer:", f" {_text(example, 'answer')}", question)


def _conversation(example: Example, column: str) -> Chat:
    messages = messages_of(example[column])
    if example.get("system") and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": example["system"]}, *messages]
    chat = Chat(messages, range(len(messages), len(messages)))
    return chat._replace(answer=[chat.answer, *chat.spoken("assistant")][-1])


def messages_of(turns: Messages) -> Messages:
    """Turns as chat templates want them; without entries of None, which a table has for what others say."""
    found = []
    for turn in turns:
        message = {name: each for name, each in turn.items() if each is not None}
        if "from" in message:
            message = {"role": message.pop("from"), "content": message.pop("value", ""), **message}
            message["role"] = _ROLES.get(message["role"], message["role"])
            if message["role"] not in _KNOWN_ROLES:
                known = ", ".join((*_ROLES, *_KNOWN_ROLES))
                raise InputError(f"A turn is from {message['role']!r}: expected one of {known}.")
        found.append(message)
    return found


def _said(message: Mapping[str, Any]) -> str:
    """What a message says, for a reader: also that of several parts, and a call of a tool."""
    content = message.get("content", "")
    if not isinstance(content, str):
        content = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)
    return content if "tool_calls" not in message else f"{content} {message['tool_calls']}".strip()


_OF_PAIRS: tuple[Count, ...] = ("completion", "all")
_OF_CHATS: tuple[Count, ...] = ("assistant", "completion", "all")
_TEMPLATE = ("tools", "chat_template_kwargs")
_OF_PREFERENCES = ("prompt", *_TEMPLATE, *NUMBERS)
READINGS: dict[Format, Reading] = {
    "tokens": Reading(("input_ids",), "tokens", (), _itself),
    "messages": Reading(("messages",), "messages", _OF_CHATS, _conversation, (*_TEMPLATE, "system")),
    "conversations": Reading(("conversations",), "conversations", _OF_CHATS, _conversation, (*_TEMPLATE, "system")),
    "prompt-completion": Reading(
        ("prompt", "completion"), "prompt and completion", _OF_PAIRS, _prompt_completion, _TEMPLATE
    ),
    "alpaca": Reading(
        ("instruction", "output"), "instruction and output, in Alpaca's prompt", _OF_PAIRS, _alpaca, ("input",)
    ),
    "question-answer": Reading(
        ("question", "answer"), "'Question: ...' and 'Answer: ...'", _OF_PAIRS, _question_answer
    ),
    "preference": Reading(("chosen", "rejected"), "chosen and rejected", ("completion",), _itself, _OF_PREFERENCES),
    "unpaired-preference": Reading(
        ("prompt", "completion", "label"), "completions with a label", ("completion",), _itself, _OF_PREFERENCES
    ),
    "words": Reading(("tokens",), "words", ("all",), _words, ("labels", "ner_tags")),
    "text": Reading(("text",), "text", ("all",), _text),
}
"""The formats, in the order in which they are looked for."""

_PAIRS: tuple[Format, ...] = ("prompt-completion", "alpaca", "question-answer")
_OF_TARGETS: dict[Target, tuple[Format, ...]] = {
    "causal": ("tokens", "messages", "conversations", *_PAIRS, "text"),
    "masked": ("tokens", "text"),
    "seq2seq": ("tokens", *_PAIRS),
    "classification": ("tokens", "text"),
    "tokens": ("tokens", "words"),
    "preference": ("tokens", "preference", "unpaired-preference"),
    "reward": ("tokens", "preference"),
}


def answered(reading: Reading, example: Example, prompt: str, answer: str) -> Pair | Chat:
    """What an example says that answers a prompt, of the format that a model was trained on; a text goes on.

    Args:
        reading, example: of the training examples, and one of them.
    """
    if reading.read is _alpaca:
        return _alpaca({"instruction": prompt, "output": answer}, "instruction")
    if reading.read is _question_answer:
        return _question_answer({"question": prompt, "answer": answer}, "question")
    chat = reading.read is _conversation or isinstance(example.get("prompt"), list)
    if chat:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return Chat(turns, range(1, 2))
    return Pair(prompt, answer, prompt)


UNPAIRED = frozenset(READINGS[name].columns[-1] for name in _OF_TARGETS["causal"])
"""Columns with what a language model is trained on without preferences."""


def recognized(target: Target, example: Example, format: Format | None, column: str | None) -> Reading:
    """How examples like this one are read for a target.

    Args:
        format, column: what was said of it; None is found out.

    Raises:
        InputError: there is none, or the columns are not there.
    """
    readings = {name: READINGS[name] for name in _OF_TARGETS[target] if format in (None, name)}
    if column is None:
        if "tokens" in readings and any(each in example for each in _TOKENISED):
            return readings["tokens"]
        for reading in readings.values():
            if all(each in example for each in reading.columns):
                return reading
        strings = [name for name, value in example.items() if isinstance(value, str)]
        if "text" in readings and len(strings) == 1:
            return readings["text"]._replace(columns=(strings[0],))
    elif column in example:
        found = format or ("messages" if isinstance(example[column], list) else "text")
        if found in readings and len(readings[found].columns) == 1:
            return readings[found]._replace(columns=(column,))
    said = "".join(f"{name}={value!r}: " for name, value in (("format", format), ("column", column)) if value)
    expected = ", or ".join(" and ".join(map(repr, each.columns)) for each in readings.values())
    raise InputError(
        f"{said}The dataset has the columns {sorted(example)}: expected {expected or 'another format'}. Rename a "
        "column, tokenise the dataset as it was for training, or say which has the text: pass column=NAME."
    )
