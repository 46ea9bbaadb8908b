"""Text to sequences: nothing is lost or invented, and bad sources are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wherefrom.hf.text import as_blocks, load_model, read_dataset
from wherefrom.runtime.errors import InputError

WORDS = ["a", "b", "c", "d", "e"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


texts_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), min_size=1, max_size=8)


@given(texts=texts_of_words, block_size=st.integers(2, 7), group=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_blocks_are_the_token_stream_of_each_group(texts: list[str], block_size: int, group: int) -> None:
    expected = []
    for start in range(0, len(texts), group):
        stream = [WORDS.index(word) + 1 for text in texts[start : start + group] for word in text.split()]
        whole = len(stream) // block_size * block_size
        expected += [stream[at : at + block_size] for at in range(0, whole, block_size)]
    if not expected:
        with pytest.raises(InputError, match="fill no block"):
            as_blocks(texts, tokenizer(), block_size, group)
    else:
        assert list(as_blocks(texts, tokenizer(), block_size, group)["input_ids"]) == expected


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    texts = ["one two", "three\nfour", "five"]
    (tmp_path / "t.txt").write_text("\n\none two\n\nthree\nfour\n \n\nfive\n")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    Dataset.from_dict({"content": texts}).to_parquet(str(tmp_path / "t.parquet"))
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    for name in ("t.txt", "t.jsonl", "t.parquet", "saved"):
        column = "content" if name == "t.parquet" else "text"
        assert read_dataset(str(tmp_path / name))[column][:] == texts, name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"\n\n", "holds no text"),
        ("empty.jsonl", b"", "the file is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("broken.jsonl", b'{"text": ', "cannot be read as json"),
        ("picture.png", b"...", "cannot read .png files"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_dataset(str(tmp_path / name))


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
