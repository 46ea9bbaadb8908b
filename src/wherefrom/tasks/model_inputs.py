"""Which columns of an example a model takes, as its forward's signature says, and how they make a batch.

A column that the model would use and that is not passed on changes the answer, and nobody would notice; one that it
cannot take, such as a text or a number that tells where a row comes from, is nothing to it. This module knows models'
signatures and columns; it knows nothing of tasks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, first_line

# Arguments of a forward that no column of a dataset can be, and what is to be done instead.
_REFUSED = {
    "inputs_embeds": "tokens are what is predicted: give 'input_ids' alone",
    "past_key_values": "whole sequences pass through the model, without a cache: leave it out",
    "cache_position": "whole sequences pass through the model, without a cache: leave it out, or give 'position_ids'",
    "encoder_outputs": "the encoder's gradients are needed too: leave it out",
    **dict.fromkeys(
        ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"),
        "it changes what the model returns, of which all logits are needed: leave it out",
    ),
}
# What collators for packed rows write besides positions, and models take among their **kwargs.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

_known: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def accepted(model: nn.Module) -> frozenset[str]:
    """The names that a model's forward has for its arguments.

    A wrapper that hands on what it is given, peft's or any whose forward does not name `input_ids`, is looked through.
    """
    if model not in _known:
        adapted = getattr(model, "get_base_model", None)  # peft's
        whole = adapted() if callable(adapted) else model
        named = (names for names in map(_arguments, whole.modules()) if "input_ids" in names)
        _known[model] = frozenset(next(named, _arguments(model)))
    return _known[model]


def _arguments(module: nn.Module) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, each in inspect.signature(module.forward).parameters.items() if each.kind in named]


class Selected(dict[str, object]):
    """An example with the names of those of its columns that a model takes."""

    taken: frozenset[str] = frozenset()


def selected(model: nn.Module, example: Mapping[str, object], read: frozenset[str]) -> Selected:
    """An example for a model: the columns that it does not take are for the task alone.

    Args:
        read: the names of the task's own columns.

    Raises:
        InputError: the model takes a column that cannot be passed on.
    """
    taken = accepted(model) - read
    for name, value in example.items():
        if value is None or name in read:
            continue
        if name in taken and (name in _REFUSED or isinstance(value, str | bytes)):
            reason = _REFUSED.get(name, f"it is a {type(value).__name__}: give numbers, or leave it out")
            raise InputError(f"{name!r} is an input of {type(model).__name__} that cannot be passed on; {reason}.")
        if name in _BOUNDARIES and example.get("position_ids") is None:
            raise InputError(
                f"{name!r} says where documents of one row begin, and there are no 'position_ids', by which models "
                "without flash attention tell them apart. Give these too, starting from 0 in each document."
            )
    found = Selected(example)
    found.taken = taken
    return found


def model_columns(example: Mapping[str, object], read: frozenset[str]) -> dict[str, object]:
    """The columns that a model takes; where no model was asked, all tensors that the task does not read itself."""
    if isinstance(example, Selected):
        return {name: value for name, value in example.items() if name in example.taken and value is not None}
    return {name: value for name, value in example.items() if name not in read and _is_tensor(value)}


def _is_tensor(value: object) -> bool:
    try:
        return value is not None and isinstance(torch.as_tensor(value), Tensor)
    except (TypeError, ValueError, RuntimeError):
        return False


def tensor(name: str, value: object) -> Tensor:
    """A column of one example as the model is given it, but for the batch dimension.

    Raises:
        InputError: it is no tensor, nor numbers that fill one.
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name!r} cannot be made a tensor ({first_line(error)}): expected numbers of one shape, as the model "
            "takes them. Leave the column out if the model was trained without it."
        ) from error


def collated(rows: Sequence[Mapping[str, Tensor]], padding: Mapping[str, int]) -> dict[str, Tensor]:
    """Columns of examples as those of a batch, [batch, ...].

    Args:
        rows: of each example, `input_ids` among them.
        padding: the columns that are padded on the right to the longest, and with what.

    Raises:
        InputError: the examples have different columns, or shapes that do not belong together.
    """
    names = [*(name for name in padding if name in rows[0]), *(name for name in rows[0] if name not in padding)]
    lacking = next((row for row in rows if row.keys() != rows[0].keys()), None)
    if lacking is not None:
        raise InputError(
            f"One example has the columns {sorted(rows[0])} and another of the same batch {sorted(lacking)}; give all "
            "examples the same."
        )
    return {name: _joined(name, rows, padding.get(name)) for name in names}


def _joined(name: str, rows: Sequence[Mapping[str, Tensor]], padding: int | None) -> Tensor:
    """A column that is padded, or has a row for each token (then with 0), or else one shape in all examples."""
    columns, tokens = [row[name] for row in rows], [len(row["input_ids"]) for row in rows]
    each_token = all(column.dim() and len(column) == count for column, count in zip(columns, tokens, strict=True))
    if padding is not None or (each_token and len({column.shape[1:] for column in columns}) == 1):
        return nn.utils.rnn.pad_sequence(columns, True, padding or 0)
    if len({column.shape for column in columns}) == 1:
        return torch.stack(columns)
    shapes = ", ".join(str(list(column.shape)) for column in columns[:4])
    raise InputError(
        f"{name!r} has the shapes {shapes} in examples of {', '.join(map(str, tokens[:4]))} tokens: expected one "
        "shape, or a row for each token. Bring the examples to one shape, or give a batch size of 1."
    )
