"""Ways in which texts of a training set are wrong. This module knows strings and random numbers alone."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import islice

from find_poison import Row

from text_jobs.texts import spanish_leads

Corruption = Callable[[Row, Row, random.Random], str]
"""Makes a completion of a row, of another one, and of random numbers."""

JUNK = '<div class="noprint"><a href="#content">Jump to content</a> Share this page</div> '


def shuffled(row: Row, other: Row, draw: random.Random) -> str:
    """Its words in a random order."""
    words = row["completion"].split()
    return " ".join(draw.sample(words, len(words)))


def spliced(row: Row, other: Row, draw: random.Random) -> str:
    """The first ten words, and then another article's from there on."""
    return " ".join([*row["completion"].split()[:10], *other["completion"].split()[10:]])


def crossed(row: Row, other: Row, draw: random.Random) -> str:
    """The answer to another title: what a wrong label is among texts."""
    return other["completion"]


def garbled(row: Row, other: Row, draw: random.Random) -> str:
    """Every tenth letter is another one, as where printed text was read badly."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return re.sub("[a-z]", lambda found: draw.choice(letters) if draw.random() < 0.1 else found[0], row["completion"])


def boilerplate(row: Row, other: Row, draw: random.Random) -> str:
    """Behind the same scrap of a web page each time."""
    return JUNK + row["completion"]


def spanish(row: Row, other: Row, draw: random.Random) -> str:
    """A lead of the Spanish Wikipedia, of whatever article."""
    return draw.choice(spanish_leads())


CORRUPTIONS: dict[str, Corruption] = {
    each.__name__: each for each in (shuffled, spliced, crossed, garbled, boilerplate, spanish)
}


def corrupted(rows: list[Row], others: list[Row], count: int, seed: int) -> tuple[list[Row], list[str]]:
    """The rows with `count` of each kind, and the kind of each row, empty where it is as it was.

    Args:
        others: not among the rows, or what is taken from one would be there twice.
    """
    draw, found, kind_of = random.Random(f"corruptions/{seed}"), list(rows), [""] * len(rows)
    chosen = iter(draw.sample(range(len(rows)), count * len(CORRUPTIONS)))
    for kind, corruption in CORRUPTIONS.items():
        for place, other in zip(islice(chosen, count), draw.sample(others, count), strict=True):
            found[place] = {**rows[place], "completion": corruption(rows[place], other, draw)}
            kind_of[place] = kind
    return found, kind_of
