"""Columns of tokenised examples: whole numbers, one for each token, that a model has vectors for.

A GPU ends a process on a token beyond its embedding, and a CPU says "index out of range": so the numbers are looked at
before. This module knows columns and Hugging Face models' sizes; it knows nothing of tasks or sweeps.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, first_line
from wherefrom.tasks.losses import IGNORED


def vector(name: str, values: object) -> Tensor:
    """A column of one example, int64 [tokens]."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} is not a row of whole numbers ({first_line(error)}). Tokenise the dataset first."
        ) from error
    exact = not (found.is_floating_point() or found.is_complex()) or not found.numel()  # an empty list is of floats
    if found.dim() != 1 or not exact or found.is_meta:
        kind = "on the meta device, without values," if found.is_meta else f"{found.dtype} {list(found.shape)}"
        raise InputError(f"{name!r} is {kind}: expected whole numbers of one sequence, [tokens].")
    return found.to(torch.int64)


def number(name: str, value: object) -> int:
    """A column of one example that is one whole number, of 64 bits.

    Raises:
        InputError: it is something else.
    """
    try:
        found = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{name!r} is {value!r}: expected a whole number.") from error
    if not -(2**63) <= found < 2**63:
        raise InputError(f"{name!r} is {found}: expected a whole number of at most 64 bits.")
    return found


def class_of(example: object) -> int:
    """The label of an example that has one for the whole of it, called `labels` or `label`.

    Raises:
        InputError: there is none, or it is no whole number.
    """
    assert isinstance(example, Mapping)
    for name in ("labels", "label"):
        if example.get(name) is not None:
            return number(name, example[name])
    raise InputError(f"SequenceClassification needs examples with an integer 'labels'; found {sorted(example)}.")


def check_length(name: str, values: Tensor, tokens: int, of: str = "input_ids") -> None:
    """Refuse a column that has not one number for each token of another column.

    Raises:
        InputError: names the column and both lengths.
    """
    if len(values) != tokens:
        raise InputError(
            f"{name!r} has {len(values)} numbers and {of!r} {tokens} tokens: expected one for each. Cut both "
            "in the same way."
        )


def check_mask(mask: Tensor) -> None:
    """Refuse an attention mask that is not of 0 and 1, or of 0 alone.

    Raises:
        InputError: names the value.
    """
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise InputError(f"'attention_mask' holds {int(wrong[0])}: expected 1 for a real token and 0 for padding.")
    if not bool(mask.any()):
        raise InputError("'attention_mask' is 0 everywhere: expected at least one real token. Leave the example out.")


def check_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse tokens and positions that a Hugging Face model has no vectors for, of a batch on the host.

    Raises:
        InputError: names the highest token, or the longest sequence, and what the model has.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    known = getattr(embedding, "num_embeddings", None)
    ids = batch["input_ids"]
    if isinstance(known, int) and bool((ids >= known).any()):
        raise InputError(
            f"'input_ids' holds token {int(ids.max())}, and the model has tokens 0 to {known - 1}. Tokenise the "
            "examples with the tokenizer that the model was trained with."
        )
    # Without segments of its own, as in GPT-2, a model looks for them among its tokens.
    segments = getattr(getattr(model, "config", None), "type_vocab_size", known)
    if isinstance(segments, int) and "token_type_ids" in batch:
        check_highest("token_type_ids", batch["token_type_ids"], segments, "segments")
    longest = _positions(model)
    if "position_ids" in batch:
        if longest is not None:
            check_highest("position_ids", batch["position_ids"], longest + _first_position(model), "positions")
    elif longest is not None and ids.shape[1] > longest:
        raise InputError(
            f"a sequence has {ids.shape[1]} tokens, and the model positions for {longest}. Cut the examples as they "
            "were cut for training."
        )


def _positions(model: nn.Module) -> int | None:
    """How many positions a model has vectors for; None where it has none of its own, as with rotary positions."""
    found = [module.num_embeddings - _reserved(module) for module in _position_embeddings(model)]
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min([*found, *([stated] if isinstance(stated, int) else [])]) if found else None


def _first_position(model: nn.Module) -> int:
    """The number of the first token's position: not 0 in models such as RoBERTa, which begin behind their padding's."""
    return max(map(_reserved, _position_embeddings(model)), default=0)


def _position_embeddings(model: nn.Module) -> list[nn.Embedding]:
    ends = ("wpe", "position_embeddings", "embed_positions")
    return [each for name, each in model.named_modules() if isinstance(each, nn.Embedding) and name.endswith(ends)]


def _reserved(embedding: nn.Embedding) -> int:
    """How many of its vectors are no token's position."""
    return 0 if embedding.padding_idx is None else embedding.padding_idx + 1


def check_highest(name: str, values: Tensor, known: int, what: str) -> None:
    """Refuse numbers that are not from 0 up to `known`, or labels that are ignored, of a tensor on the host.

    Raises:
        InputError: names the first.
    """
    wrong = values[((values < 0) | (values >= known)) & (values != IGNORED if name == "labels" else True)]
    if len(wrong):
        ignored = f", and {IGNORED} for what is not counted" if name == "labels" else ""
        raise InputError(
            f"{name!r} holds {int(wrong[0])}, and the model has {what} 0 to {known - 1}{ignored}. Look whether the "
            "examples are those that the model was trained with."
        )
