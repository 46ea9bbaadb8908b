"""What a model takes: the columns that its forward's signature names, and the tokens and positions it has vectors for.

A column that the model would use and that is not passed on changes the answer, and nobody would notice; one that it
cannot take, such as a text or a number that tells where an example comes from, is nothing to it. A GPU ends a process
on a token beyond its embedding, and a CPU says "index out of range": so the numbers are looked at before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError
from wherefrom.tasks.adapters.composition import beside_text, multimodal
from wherefrom.tasks.adapters.prompts import prompt_length
from wherefrom.tasks.columns import check_highest

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
# What collators for packed sequences write besides positions, and models take among their **kwargs.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

# Tokens that images and sounds take the places of, as configurations have them.
_PLACEHOLDERS = [f"{kind}_token_{ending}" for kind in ("image", "video", "audio") for ending in ("id", "index")]

_known: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_known_placeholders: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def accepted(model: nn.Module) -> frozenset[str]:
    """The names that a model's forward has for its arguments.

    A wrapper that hands on what it is given, peft's or any whose forward does not name `input_ids`, is looked through.
    """
    if model not in _known:
        adapted = getattr(model, "get_base_model", None)  # peft's
        whole = adapted() if callable(adapted) else model
        named = (names for names in map(_arguments, whole.modules()) if "input_ids" in names)
        _known[model] = next(named, _arguments(model))
    return _known[model]


def _arguments(module: nn.Module) -> frozenset[str]:
    parameters = inspect.signature(module.forward).parameters
    return frozenset(name for name, each in parameters.items() if each.kind in _NAMED)


def placeholders(model: nn.Module) -> Tensor:
    """The tokens of a model that an image's or sound's vectors take the places of, int64 [kinds]."""
    if model not in _known_placeholders:
        config = getattr(multimodal(model), "config", None)
        found = {getattr(config, name, None) for name in _PLACEHOLDERS}
        _known_placeholders[model] = torch.tensor(
            sorted(each for each in found if isinstance(each, int)), dtype=torch.int64
        )
    return _known_placeholders[model]


class Selected(dict[str, object]):
    """An example with the names of those of its columns that a model takes."""

    taken: frozenset[str] = frozenset()


def selected(model: nn.Module, example: Mapping[str, object], read: frozenset[str]) -> Selected:
    """An example for a model; refuses one with a column that the model takes and that cannot be passed on.

    Args:
        read: the names of the task's own columns, whose others are only the task's where the model does not take them.
    """
    found = Selected(example)
    found.taken = accepted(model) - read
    for name, value in example.items():
        if value is None or name in read:
            continue
        if name in found.taken and (name in _REFUSED or isinstance(value, str | bytes)):
            reason = _REFUSED.get(name, f"it is a {type(value).__name__}: give numbers, or leave it out")
            raise InputError(f"{name!r} is an input of {type(model).__name__} that cannot be passed on; {reason}.")
        if name in BOUNDARIES and example.get("position_ids") is None:
            raise InputError(
                f"{name!r} says where documents of one sequence begin, and there are no 'position_ids', by which "
                "models without flash attention tell them apart. Give these too, starting from 0 in each document."
            )
    return found


def model_columns(example: Mapping[str, object], read: frozenset[str]) -> dict[str, object]:
    """The columns that a model takes; where no model was looked at, all tensors that the task does not read itself."""
    if isinstance(example, Selected):
        return {name: value for name, value in example.items() if name in example.taken and value is not None}
    return {name: value for name, value in example.items() if name not in read and _is_tensor(value)}


def _is_tensor(value: object) -> bool:
    try:
        return value is not None and isinstance(torch.as_tensor(value), Tensor)
    except (TypeError, ValueError, RuntimeError):
        return False


def check_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse tokens and positions that a Hugging Face model has no vectors for, of a batch on the host."""
    find = getattr(model, "get_input_embeddings", None)
    known = getattr(find() if callable(find) else None, "num_embeddings", None)
    ids = batch["input_ids"]
    beyond = ids[ids >= known] if isinstance(known, int) else ids[:0]
    beyond = beyond[~torch.isin(beyond, placeholders(model))]
    if len(beyond):
        assert isinstance(known, int)
        raise InputError(
            f"'input_ids' holds token {int(beyond.max())}, and the model has tokens 0 to {known - 1}. Tokenise the "
            "examples with the tokenizer that the model was trained with."
        )
    # Without segments of its own, as in GPT-2, a model looks for them among its tokens.
    segments = getattr(getattr(model, "config", None), "type_vocab_size", known)
    if isinstance(segments, int) and "token_type_ids" in batch:
        check_highest("token_type_ids", batch["token_type_ids"], segments, "segments")
    positions = _positions(model)
    if positions is None:
        return
    if "position_ids" in batch:
        check_highest("position_ids", batch["position_ids"], positions.stop, "positions")
        return
    left = len(positions) - prompt_length(model)
    if ids.shape[1] > left:
        raise InputError(
            f"a sequence has {ids.shape[1]} tokens, and the model positions for {left}. Cut the examples as they were "
            "cut for training."
        )


def _positions(model: nn.Module) -> range | None:
    """The positions of tokens that a model has vectors for; None where it has none of its own, as with rotary ones."""
    ends = ("wpe", "position_embeddings", "embed_positions")
    embeddings = [
        each for name, each in model.named_modules() if isinstance(each, nn.Embedding) and name.endswith(ends)
    ]
    if embeddings:
        beside = beside_text(model)
        embeddings = [each for each in embeddings if each not in beside]
    if not embeddings:
        return None
    # Models such as RoBERTa begin behind their padding's position.
    first = [0 if each.padding_idx is None else each.padding_idx + 1 for each in embeddings]
    counts = [each.num_embeddings - begin for each, begin in zip(embeddings, first, strict=True)]
    stated = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    count = min([*counts, stated] if isinstance(stated, int) else counts)
    return range(max(first), max(first) + count)
