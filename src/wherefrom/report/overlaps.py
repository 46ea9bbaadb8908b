"""Where a text says what another one says, word for word. This module knows strings alone."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")
LONG = 5  # words; shorter runs are shared by texts that have nothing to do with each other


def overlaps(text: str, other: str, words: int = LONG) -> list[tuple[int, int]]:
    """The runs of at least so many words of `text` that stand in `other` too, in the same order.

    Words are runs of letters and digits; their case, and what stands between them, makes no difference. Linear in the
    number of words.

    Returns:
        Where each begins and ends, in characters of `text`; runs that meet are one.
    """
    mine, known = list(_WORD.finditer(text)), runs(other, words)
    spoken = [each[0].casefold() for each in mine]
    found: list[tuple[int, int]] = []
    last = -1  # the last word of the latest run
    for at in range(len(mine) - words + 1):
        if tuple(spoken[at : at + words]) not in known:
            continue
        stop = mine[at + words - 1].end()
        if at <= last:
            found[-1] = found[-1][0], stop
        else:
            found.append((mine[at].start(), stop))
        last = at + words - 1
    return found


def runs(text: str, words: int = LONG) -> set[tuple[str, ...]]:
    """All runs of so many words of a text, in lower case."""
    found = _WORD.findall(text.casefold())
    return {tuple(found[at : at + words]) for at in range(len(found) - words + 1)}
