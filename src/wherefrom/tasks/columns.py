"""Columns of examples: what their values have to be, and how those of several examples make a batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, first_line
from wherefrom.tasks.losses import IGNORED

# Columns of models that flatten the patches of all images, and say how many each image has.
_PATCHES = ("pixel_values", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def tensor(
    name: str,
    value: object,
    problem: str = "cannot be made a tensor",
    advice: str = "Expected numbers of one shape, as the model takes them; leave out what it was trained without.",
) -> Tensor:
    """A column of one example as a tensor; refuses what is none, nor numbers that fill one."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name!r} {problem} ({first_line(error)}). {advice}") from error


def vector(name: str, values: object) -> Tensor:
    """A column of one example that has a whole number for each token, int64 [tokens]; refuses others.

    Args:
        values: [tokens], or [1, tokens] as processors make them.
    """
    found = tensor(name, values, "is not a list of whole numbers", "Tokenise the dataset first.")
    found = found[0] if found.dim() == 2 and len(found) == 1 else found
    exact = not (found.is_floating_point() or found.is_complex()) or not found.numel()  # an empty list is of floats
    if found.dim() != 1 or not exact or found.is_meta:
        kind = "on the meta device, without values," if found.is_meta else f"{found.dtype} {list(found.shape)}"
        raise InputError(f"{name!r} is {kind}: expected whole numbers of one sequence, [tokens].")
    return found.to(torch.int64)


def number(name: str, value: object) -> int:
    """A column of one example that is one whole number, of 64 bits; refuses others."""
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{name!r} is {value!r}: expected a whole number.") from error
    if not -(2**63) <= found < 2**63:
        raise InputError(f"{name!r} is {found}: expected a whole number of at most 64 bits.")
    return found


def real(name: str, value: object) -> float:
    """A column of one example that is one finite number; refuses others."""
    found = tensor(name, value, "is no number", "Expected one finite number.")
    if found.dim() or found.is_complex() or found.is_meta or not math.isfinite(found):
        raise InputError(f"{name!r} is {str(value)[:40]}: expected one finite number.")
    return float(value)  # type: ignore[arg-type]  # of the value, which the tensor has in float32


def check_length(name: str, values: Tensor, tokens: int, of: str = "input_ids") -> None:
    """Refuse a column that has not one number for each token of another column."""
    if len(values) != tokens:
        raise InputError(
            f"{name!r} has {len(values)} numbers and {of!r} {tokens} tokens: expected one for each. Cut both "
            "in the same way."
        )


def check_mask(mask: Tensor) -> None:
    """Refuse an attention mask that is not of 0 and 1, or of 0 alone."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise InputError(f"'attention_mask' holds {int(wrong[0])}: expected 1 for a real token and 0 for padding.")
    if not bool(mask.any()):
        raise InputError("'attention_mask' is 0 everywhere: expected at least one real token. Leave the example out.")


def check_highest(name: str, values: Tensor, known: int, what: str) -> None:
    """Refuse numbers that are not from 0 up to `known`, or labels that are ignored, of a tensor on the host."""
    wrong = values[((values < 0) | (values >= known)) & (values != IGNORED if name == "labels" else True)]
    if len(wrong):
        ignored = f", and {IGNORED} for what is not counted" if name == "labels" else ""
        raise InputError(
            f"{name!r} holds {int(wrong[0])}, and the model has {what} 0 to {known - 1}{ignored}. Look whether the "
            "examples are those that the model was trained with."
        )


def is_batch(example: object) -> bool:
    """Whether an example is a batch of one, as processors of images and texts make it: its tokens are [1, tokens]."""
    ids = example.get("input_ids") if isinstance(example, Mapping) else None
    first = ids[0] if isinstance(ids, list | tuple) and len(ids) == 1 else None
    return getattr(ids, "ndim", 2 if isinstance(first, list | tuple | Tensor) else 1) == 2


def batched_columns(
    examples: Sequence[Mapping[str, Tensor]], padding: Mapping[str, int], batches: bool = False
) -> dict[str, Tensor]:
    """Columns of examples, `input_ids` among them, as those of a batch, [batch, ...]; refuses unlike examples.

    Args:
        padding: the columns that are padded on the right to the longest, and with what; they come first.
        batches: whether each example is a batch of one, whose other columns, such as images, are concatenated. Those of
            models that say how many patches images have (`image_grid_thw`) are so in any case.
    """
    columns = examples[0].keys()
    lacking = next((each for each in examples if each.keys() != columns), None)
    if lacking is not None:
        raise InputError(
            f"One example has the columns {sorted(columns)} and another of the same batch {sorted(lacking)}; give all "
            "examples the same."
        )
    names = [*(name for name in padding if name in columns), *(name for name in columns if name not in padding)]
    packed = any(name.endswith("_grid_thw") for name in columns)
    return {
        name: _batched(name, examples, padding.get(name), batches, packed and name.startswith(_PATCHES))
        for name in names
    }


def _batched(
    name: str, examples: Sequence[Mapping[str, Tensor]], padding: int | None, batches: bool, packed: bool
) -> Tensor:
    """A column that is padded, or has an entry for each token (then with 0), or else one shape in all examples."""
    columns, tokens = [each[name] for each in examples], [len(each["input_ids"]) for each in examples]
    each_token = all(column.dim() and len(column) == count for column, count in zip(columns, tokens, strict=True))
    alike = len({column.shape[1:] for column in columns}) == 1
    if padding is not None or (each_token and alike and not packed):
        return nn.utils.rnn.pad_sequence(columns, True, padding or 0)
    one_image = name.endswith("_grid_thw") and columns[0].dim() == 1
    if (packed or batches) and alike and columns[0].dim() and not one_image:
        return torch.cat(columns)
    if len({column.shape for column in columns}) == 1:
        return torch.stack(columns)
    shapes = ", ".join(str(list(column.shape)) for column in columns[:4])
    raise InputError(
        f"{name!r} has the shapes {shapes} in examples of {', '.join(map(str, tokens[:4]))} tokens: expected one "
        "shape, or an entry for each token. Bring the examples to one shape, or give a batch size of 1."
    )
