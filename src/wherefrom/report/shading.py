"""Which tokens a score comes from, written small enough to travel with the page.

A page of 50 queries with 20 sequences of 512 tokens each has half a million numbers. Those of one hit are whole
multiples of a power of ten, and a sequence's tokens are the lengths of the pieces that its text is to be cut into. Both
are written as source maps write their numbers (base 64, variable length): one character where they are small, as most
are, and two for nearly all others. The page's script reads them.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
SHOWN_DIGITS = 3  # of a hit's largest share; the others have as many decimals
SHOWN = 480  # characters of an example beside others
SMALLEST_EXPONENT = -300  # below it a power of ten is no ordinary float


@dataclass(frozen=True)
class Shares:
    """The shares in one score, a number for each piece: `multiples` (encoded) of 10 ** `exponent`."""

    exponent: int
    multiples: str


def visible_pieces(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The pieces that have text, so that each number has a place on the page where it can be looked up.

    A character that is spread over several tokens appears with the last of them; the shares of the earlier ones, whose
    text is empty, are added to it. Those that no text follows are added to the last that has some.
    """
    merged: list[tuple[str, float]] = []
    waiting = 0.0
    for text, share in pieces:
        waiting += share
        if text:
            merged.append((text, waiting))
            waiting = 0.0
    if merged and waiting:
        text, share = merged[-1]
        merged[-1] = (text, share + waiting)
    return merged


def encode_shares(values: Sequence[float]) -> Shares:
    """Finite values, rounded to the digits that are shown: nothing else is lost."""
    largest = max(abs(value) for value in values)
    exponent = math.floor(math.log10(largest)) - SHOWN_DIGITS + 1 if largest > 0 else 0
    exponent = max(exponent, SMALLEST_EXPONENT)
    return Shares(exponent, encode_numbers(round(value / 10.0**exponent) for value in values))


def encode_lengths(pieces: Sequence[str]) -> str:
    """The pieces' lengths as JavaScript counts them, in UTF-16 units."""
    return encode_numbers(len(piece.encode("utf-16-le", "surrogatepass")) // 2 for piece in pieces)


def encode_numbers(numbers: Iterable[int]) -> str:
    """Whole numbers as text: the sign, then bits from the lowest, five to a character; its sixth bit says "more"."""
    letters: list[str] = []
    for number in numbers:
        bits = abs(number) << 1 | (number < 0)
        while bits >= 32:
            letters.append(BASE64[bits & 31 | 32])
            bits >>= 5
        letters.append(BASE64[bits])
    return "".join(letters)


def window(pieces: Sequence[tuple[str, float]], overlaps: Sequence[tuple[int, int]]) -> range:
    """Which characters are shown of a text beside others: from a long overlap on, or where most of the score is.

    Args:
        pieces: of the text, each with its part of the score.
        overlaps: in characters.
    """
    length = sum(len(text) for text, _ in pieces)
    if length <= SHOWN:
        return range(length)
    if overlaps:
        first = max(0, max(overlaps, key=lambda each: each[1] - each[0])[0] - SHOWN // 4)
        return range(first, min(first + SHOWN, length))
    best, found, begin, end, inside, oldest = -1.0, 0, 0, 0, 0.0, 0
    for newest, (text, part) in enumerate(pieces):  # the window ends behind this piece
        end, inside = end + len(text), inside + abs(part)
        while end - begin > SHOWN and oldest < newest:
            begin, inside = begin + len(pieces[oldest][0]), inside - abs(pieces[oldest][1])
            oldest += 1
        if inside > best:
            best, found = inside, begin
    return range(found, min(found + SHOWN, length))
