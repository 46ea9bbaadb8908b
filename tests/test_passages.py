"""Pieces of text for tokens: joined they are the text, and each is what its token stands for."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from wherefrom.report.passages import token_pieces

TEXTS = [
    "The owl is a bird of prey; owls hunt at night, and an owl's face is round.",
    "Prices rose by 3.5 % in 1998 , he said . \n\n = History = \n\tIt doesn't matter ,  does it ?",
    "日本語の文章です。漢字とかな。 Ünïcödé naïve café 😀😀🏳️‍🌈 👩‍👩‍👧 Ω≈ç√",
] * 4
SPECIAL = "<|endoftext|>"
WORDS = st.lists(st.sampled_from(" ".join(TEXTS).split()), max_size=12).map(" ".join)
ANY_TEXT = st.one_of(st.text(max_size=60), WORDS, st.text("日本語😀é \n", max_size=40))


def byte_level() -> Tokenizer:
    """A vocabulary so small that characters beyond ASCII are spread over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece does it: spaces are part of words, and the first one is stripped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>", SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama does it: bytes for characters that the vocabulary lacks, read as one run."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for letter in "▁ abcdefghijklmnopqrstuvwxyzTI.,é":
        words.setdefault(letter, len(words))
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT does it: words are put together with spaces, but not before a full stop."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, metaspace, byte_fallback, word_piece)}


def byte_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The independent truth for a byte-level vocabulary: its bytes through Python's incremental UTF-8 decoder."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's table of bytes
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(bytes(table[letter] for letter in str(tokenizer.id_to_token(each)))) for each in ids]
    return [*pieces[:-1], pieces[-1] + decoder.decode(b"", final=True)] if pieces else []


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT.filter(lambda text: "\ufffd" not in text))
def test_byte_level_pieces_are_what_the_bytes_say(text: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(text).ids
    pieces = token_pieces(tokenizer, ids)
    assert pieces == byte_pieces(tokenizer, ids)
    assert "".join(pieces) == text


def test_a_character_comes_with_its_last_token_and_leftover_bytes_with_the_last_piece() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a🦉b").ids
    assert len(ids) == 5  # 🦉 is three tokens
    assert token_pieces(tokenizer, ids) == ["a", "", "", "🦉", "b"]
    assert token_pieces(tokenizer, ids[:3]) == ["a", "", "\ufffd"]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_text_for_any_text_and_any_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60)
    ids = data.draw(st.one_of(ANY_TEXT.map(lambda text: tokenizer.encode(text).ids), tokens))
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(WORDS.filter(bool))
def test_metaspace_pieces_are_the_tokens_with_spaces(text: str) -> None:
    """Each token says its own text in the vocabulary, "▁" for a space; only the first one loses its space."""
    tokenizer = TOKENIZERS["metaspace"]
    encoding = tokenizer.encode(text)
    expected = [str(token).replace("▁", " ") for token in encoding.tokens]
    pieces = token_pieces(tokenizer, encoding.ids)
    if "" not in pieces:  # a lone "▁" at the start has no text of its own
        assert pieces == [expected[0].removeprefix(" "), *expected[1:]]
    assert "".join(pieces) == "".join(expected).removeprefix(" ")


@settings(max_examples=200, deadline=None)
@given(st.text("thea 🦉日éñ", min_size=1, max_size=40).filter(lambda text: not text.startswith(" ")))
def test_byte_fallback_pieces_are_characters(text: str) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode(text).ids
    pieces = token_pieces(tokenizer, ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_word_piece_puts_the_space_before_the_word() -> None:
    tokenizer = TOKENIZERS["word_piece"]
    ids = tokenizer.encode("The owl is a bird.").ids
    start = [tokenizer.get_vocab()["[CLS]"]]
    pieces = token_pieces(tokenizer, start + ids)
    assert pieces[0] == "[CLS]"
    assert "".join(pieces) == "[CLS] The owl is a bird."
    for token, piece in zip(tokenizer.encode("The owl is a bird.").tokens, pieces[1:], strict=True):
        assert piece == (token[2:] if token.startswith("##") else token if token == "." else f" {token}")


def test_special_tokens_are_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    special = tokenizer.get_vocab()[SPECIAL]
    ids = [special, *tokenizer.encode("owl").ids, special]
    pieces = token_pieces(tokenizer, ids)
    assert (pieces[0], pieces[-1]) == (SPECIAL, SPECIAL)


class CountingTokenizer:
    """Counts the tokens that it is asked to decode."""

    def __init__(self, name: str) -> None:
        self.tokenizer = TOKENIZERS[name]
        self.decoded: Counter[str] = Counter()

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        self.decoded["tokens"] += len(token_ids)
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize("text", ["an owl hunts ", "🦉", "\ufffd", "日本"])
@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_the_work_is_linear_in_the_number_of_tokens(name: str, text: str) -> None:
    work = []
    for repeats in (200, 400):
        counting = CountingTokenizer(name)
        token_pieces(counting, TOKENIZERS[name].encode(text * repeats).ids)
        work.append(counting.decoded["tokens"])
    assert work[1] <= 2.1 * work[0]


def test_no_tokens_have_no_pieces() -> None:
    assert token_pieces(TOKENIZERS["byte_level"], []) == []
