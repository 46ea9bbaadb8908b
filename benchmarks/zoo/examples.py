"""Examples for tiny models: few, and of lengths that would show what is mistaken for something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

VOCABULARY, CLASSES = 24, 3
LENGTHS = 4, 2, 3, 2
"""Of the examples. In a batch of four there are as many tokens as examples, which must not be taken for each other."""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _tokens(generator: torch.Generator, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=generator)


def texts() -> list[object]:
    """Token sequences."""
    generator = _generator()
    return [{"input_ids": _tokens(generator, length)} for length in LENGTHS]


def masked_texts(lengths: Sequence[int] = LENGTHS) -> list[object]:
    """Token sequences in which the first and the last are to be found, behind token 3."""
    generator, found = _generator(), list[object]()
    for length in lengths:
        tokens = _tokens(generator, length)
        labels = torch.full_like(tokens, -100)
        labels[[0, -1]] = tokens[[0, -1]]
        tokens[[0, -1]] = 3
        found.append({"input_ids": tokens, "labels": labels})
    return found


def classified_texts() -> list[object]:
    """Token sequences with a class each."""
    generator = _generator()
    return [
        {"input_ids": _tokens(generator, length), "labels": number % CLASSES} for number, length in enumerate(LENGTHS)
    ]


def tagged_texts() -> list[object]:
    """Token sequences with a class for each token."""
    return [{**each, "labels": each["input_ids"] % CLASSES} for each in texts() if isinstance(each, dict)]


def preferences() -> list[object]:
    """Prompts with a better and a worse completion, and what another model thought of these."""
    generator = _generator()
    return [
        {
            "prompt_ids": _tokens(generator, 2), "chosen_ids": _tokens(generator, length - 1),
            "rejected_ids": _tokens(generator, 1 + number), "ref_chosen_logps": -5.0, "ref_rejected_logps": -6.0,
        }
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip


def pairs() -> list[object]:
    """Token sequences with another that is to be written for each."""
    generator = _generator()
    return [
        {"input_ids": _tokens(generator, length), "labels": _tokens(generator, 2 + number)}
        for number, length in enumerate(LENGTHS)
    ]


def images(size: int = 8) -> list[object]:
    """Pictures [3, size, size] with a class each."""
    return numbers("pixel_values", 3, size, size)


def numbers(name: str, *shape: int) -> list[object]:
    """Dicts of numbers [*shape] under a name, with a class each."""
    generator = _generator()
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64), "labels": torch.tensor(number % CLASSES)}
        for number in range(len(LENGTHS))
    ]


def vectors(*shape: int) -> list[object]:
    """Pairs of numbers [*shape] and a class."""
    return [tuple(each.values()) for each in numbers("inputs", *shape) if isinstance(each, dict)]
