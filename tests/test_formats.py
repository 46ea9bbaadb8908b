"""Every format of fine-tuning data: its tokens and which of them are counted, against what is written here by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_huggingface import TEMPLATE, WORDS, counted, ids, prepared, tokenizer
from wherefrom.hf.preparation import Preparation, read_examples
from wherefrom.report.passages import DatasetPassages, excerpt
from wherefrom.runtime.errors import InputError

UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As templates that take earlier reasoning away: an answer is rendered in another way when it is the last.
ANSWER = "{% if m.role == 'assistant' %}"
FORGETFUL = UNMARKED.replace(ANSWER, ANSWER + "{% if loop.last %}g {% endif %}")
CHAT = [
    {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"},
]  # fmt: skip
CHAT_TOKENS = "user : a b assistant : c d <end> user : e assistant : f <end>"
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[each["role"]], "value": each["content"]} for each in CHAT
]  # fmt: skip
ALL = CHAT_TOKENS.split()[1:]  # the first token is not predicted


@pytest.mark.parametrize(
    ("example", "options", "template", "tokens", "expected"),
    [
        ({"text": "a b"}, {}, None, "a b <end>", "b <end>"),
        ({"text": "a b"}, {"end_token": False}, None, "a b", "b"),
        ({"body": "a b", "n": 1}, {}, None, "a b <end>", "b <end>"),  # the only column of strings
        ({"body": "a b", "title": "c"}, {"column": "body"}, None, "a b <end>", "b <end>"),
        ({"prompt": "a b ", "completion": "c d"}, {}, None, "a b c d <end>", "c d <end>"),
        ({"prompt": "a b ", "completion": "c d"}, {"count": "all"}, None, "a b c d <end>", "b c d <end>"),
        ({"prompt": "a b ", "completion": "c d"}, {"format": "text", "column": "prompt"}, None, "a b <end>", "b <end>"),
        ({"messages": CHAT}, {}, TEMPLATE, CHAT_TOKENS, "c d <end> f <end>"),
        ({"messages": CHAT}, {}, UNMARKED, CHAT_TOKENS, "c d <end> f <end>"),
        ({"messages": CHAT}, {"count": "completion"}, UNMARKED, CHAT_TOKENS, "f <end>"),
        ({"messages": CHAT}, {"count": "completion"}, TEMPLATE, CHAT_TOKENS, "f <end>"),
        ({"messages": CHAT}, {"count": "all"}, UNMARKED, CHAT_TOKENS, " ".join(ALL)),
        ({"messages": CHAT[:2]}, {}, FORGETFUL, "user : a b assistant : g c d <end>", "g c d <end>"),
        ({"messages": CHAT}, {"count": "completion"}, FORGETFUL, CHAT_TOKENS.replace("f", "g f"), "g f <end>"),
        ({"talk": CHAT}, {"column": "talk"}, UNMARKED, CHAT_TOKENS, "c d <end> f <end>"),
        ({"conversations": SHAREGPT}, {}, UNMARKED, CHAT_TOKENS, "c d <end> f <end>"),
        ({"conversations": CHAT}, {}, UNMARKED, CHAT_TOKENS, "c d <end> f <end>"),
        ({"conversations": SHAREGPT[:2], "system": "g"}, {}, UNMARKED, "system : g user : a b assistant : c d <end>",
         "c d <end>"),
        ({"conversations": [*SHAREGPT[:3], {"from": "tool", "value": "g"}, SHAREGPT[3]]}, {}, UNMARKED,
         "user : a b assistant : c d <end> user : e tool : g assistant : f <end>", "c d <end> f <end>"),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {}, UNMARKED, CHAT_TOKENS, "f <end>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, TEMPLATE, CHAT_TOKENS, " ".join(ALL[5:])),
        ({"messages": CHAT[:1]}, {}, UNMARKED, "user : a b", ""),
    ],
)  # fmt: skip
def test_what_is_counted(
    example: dict[str, Any], options: dict[str, Any], template: str | None, tokens: str, expected: str
) -> None:
    (row,) = prepared([example], template, **options)
    unknown = WORDS.index("a")  # what the tokenizer makes of other words
    assert row["input_ids"] == [WORDS.index(word) if word in WORDS else unknown for word in tokens.split()]
    assert counted(row) == expected.split()


def pieces(example: dict[str, Any]) -> tuple[str, str]:
    """A prompt and a counted completion as text, by a tokenizer whose tokens are letters."""
    letters = byte_tokenizer()
    row: Any = Preparation(end_token=False).prepare(read_examples([example]), tokenizer=letters)[0]
    tokens, labels = row["input_ids"], row["labels"]
    start = next(number for number, label in enumerate(labels) if label != -100)
    assert labels[start:] == tokens[start:]
    return letters.decode(tokens[:start]), letters.decode(tokens[start:])


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Of bytes, and of some pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(each) for each in merges)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="A")


def test_prompts_of_alpaca_and_of_questions_are_those_that_models_were_trained_on() -> None:
    prompt, answer = pieces({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert answer == "3"
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:"
    )
    prompt, _ = pieces({"instruction": "Say hello.", "input": "", "output": "Hello."})
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hello.\n\n### Response:"
    )
    assert pieces({"question": "2 + 2?", "answer": "4"}) == ("Question: 2 + 2?\nAnswer:", " 4")


def test_a_token_of_both_prompt_and_completion_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """A prompt that ends with a space, of a vocabulary in which words begin with theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"?": 0, "Ġ": 1, "a": 2, "Ġa": 3, "Ġb": 4}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = PreTrainedTokenizerFast(tokenizer_object=made)
    row: Any = Preparation().prepare(read_examples([{"prompt": "a a ", "completion": "b"}]), tokenizer=words)[0]
    assert row["input_ids"] == [2, 3, 4]
    assert row["labels"] == [-100, -100, 4]
    assert "1 of the 1 examples of the dataset have a token with the prompt's end" in caplog.text


def test_turns_that_the_template_does_not_tell_apart_are_refused() -> None:
    rows = [{"messages": CHAT[:2]}, {"messages": CHAT}]
    with pytest.raises(
        InputError, match=r"Example 1 of the dataset: the chat template renders the beginning.*count='all'"
    ):
        prepared(rows, FORGETFUL)


CHATML = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}[end]\n"
    "{% endgeneration %}{% else %}{{ m.content }}[end]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@given(st.lists(st.text("ab é🦉\n", max_size=6), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_turns_are_those_that_marks_in_the_template_would_say(texts: list[str]) -> None:
    """Also where a token is of two turns, of a vocabulary of bytes with a few pairs of them."""
    roles = ("user", "assistant", "tool")
    rows = [{"messages": [{"role": roles[at % 3], "content": text} for at, text in enumerate(texts)]}]
    found = []
    for template in (CHATML, CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")):
        words = byte_tokenizer([("]", "a"), ("a", "b"), ("Ċ", "["), ("Ġ", "a")])
        words.chat_template = template
        row: Any = Preparation().prepare(read_examples(rows), tokenizer=words)[0]
        found.append((row["input_ids"], row.get("labels")))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        (
            {"messages": CHAT},
            {},
            "Example 0 of the dataset: it is a conversation, and the tokenizer has no chat template",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            {},
            "Example 0 of the dataset: A turn is from 'narrator'",
        ),
        ({"text": "a"}, {"count": "completion"}, "count='completion' of text: expected 'all'"),
        ({"prompt": "a", "completion": "b"}, {"count": "assistant"}, "expected 'completion' or 'all'"),
        ({"input_ids": [1, 2]}, {"count": "all"}, "count='all' of tokens: expected labels, or a mask"),
        ({"text": "a"}, {"format": "alpaca"}, "format='alpaca': The dataset has the columns ['text']: expected 'instr"),
        ({"text": "a"}, {"column": "body"}, "column='body': The dataset has the columns ['text']"),
        ({"a": "b", "c": "d"}, {}, "say which has the text: pass column=NAME"),
        ({"prompt": "a", "completion": "b"}, {"unit": "blocks"}, "unit='blocks' of prompt and completion"),
        ({"text": "a"}, {"source_column": "from"}, "Example 0 of the dataset has no 'from'"),
        # Of which Python would print something that no model was trained on.
        ({"text": ["a", "b"]}, {"format": "text"}, "Example 0 of the dataset: 'text' is a list: expected a text."),
        ({"question": "a", "answer": {"value": "b", "aliases": ["c"]}}, {}, "'answer' is a dict: expected a text"),
        ({"question": ["a"], "answer": "b"}, {}, "'question' is a list: expected a text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "c"}, {}, "'input' is a dict: expected a text"),
    ],
)
def test_what_does_not_fit_is_named(example: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        prepared([example], **options)
    assert message in str(caught.value)


def test_what_a_reader_could_not_be_shown_is_named() -> None:
    turns = [{"role": "user", "content": {"parts": "a"}}, CHAT[1]]
    with pytest.raises(InputError, match="Example 0 of the dataset makes no tokens"):
        prepared([{"messages": turns}], TEMPLATE)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "xml"},
        {"count": "some"},
        {"unit": "pages"},
        {"max_length": 1},
        {"unit": "blocks", "format": "alpaca"},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Preparation(**options)


def test_the_log_says_what_was_recognised_and_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "wherefrom"):
        prepared(
            [{"prompt": "a ", "completion": "b c d", "id": 3}, {"prompt": "a b c ", "completion": "d"}], max_length=3
        )
    assert (
        "Read the dataset as prompt and completion: the completion's tokens are counted; not used: id." in caplog.text
    )
    assert (
        "2 of the 2 examples of the dataset are longer than 3 tokens and cut off there; the first is 0." in caplog.text
    )
    assert "1 of the 2 examples of the dataset have no counted token and score 0; the first is 1." in caplog.text


def test_readers_see_prompt_and_answer_apart() -> None:
    rows = [{"prompt": "a b ", "completion": "c d"}, {"prompt": "a " * 300, "completion": "c"}]
    shown = DatasetPassages(prepared(rows, max_length=350))[0], DatasetPassages(prepared(rows))[1]
    assert shown[0].text == "a b \n\n→ c d"
    assert shown[0].text[shown[0].answer_start :] == "→ c d"
    brief = excerpt(shown[1].text, 60, shown[1].answer_start)
    assert brief.startswith("a a") and brief.endswith("… → c") and len(brief) <= 60
    talk = DatasetPassages(prepared([{"messages": CHAT}], UNMARKED))[0]
    assert talk.text == "user: a b\n\nassistant: c d\n\nuser: e\n\nassistant: f"
    assert DatasetPassages(prepared([{"text": "a b c d"}], max_length=2))[0].text == "a b"


def write(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_examples_of_several_files_know_theirs(tmp_path: Path) -> None:
    chat = write(tmp_path / "chat.jsonl", {"messages": CHAT}, {"messages": CHAT[:2]})
    plain = write(tmp_path / "plain.jsonl", {"text": "a b"})
    found = prepared({"chat": chat, "plain": plain, "own": [{"input_ids": [3, 4]}]}, UNMARKED)
    assert [row["source"] for row in found] == ["chat", "chat", "plain", "own"]
    assert [counted(row) for row in found] == [
        ["c", "d", "<end>", "f", "<end>"],
        ["c", "d", "<end>"],
        ["b", "<end>"],
        ["b"],
    ]
    by_column = prepared([{"text": "a", "from": "x"}, {"text": "b", "from": 5}], source_column="from")
    assert [row["source"] for row in by_column] == ["x", "5"]
    assert "source" not in prepared(plain)[0]


def test_of_a_dataset_of_splits_one_is_taken() -> None:
    splits = DatasetDict({"train": Dataset.from_list([{"text": "a"}]), "test": Dataset.from_list([{"text": "b c"}])})
    assert [row["input_ids"] for row in prepared(splits)] == [ids("a <end>")]
    other: Any = Preparation().prepare(read_examples(splits, "test"), tokenizer=tokenizer())
    assert other[0]["input_ids"] == ids("b c <end>")
    with pytest.raises(InputError, match=r"split='valid': The dataset has the splits \['test', 'train'\]"):
        read_examples(splits, "valid")
