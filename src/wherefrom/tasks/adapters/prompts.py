"""Learned prompts of peft: looked up for each example by itself, and how many tokens they put before a text's.

This module knows how peft calls what learns a prompt; it knows nothing of what is done with its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from wherefrom.runtime.errors import InputError
from wherefrom.runtime.placement import computes_by

# Prompts that are keys and values of attention, and no tokens.
_CACHED = {"PREFIX_TUNING", "CARTRIDGE"}


def _config(model: Any) -> Any:
    """The configuration of a model's prompt; None of one that learns none, or while peft has switched it off."""
    if not hasattr(model, "prompt_encoder") or vars(model).get("forward") == model.base_model.forward:
        return None
    config = model.active_peft_config
    return config if config.is_prompt_learning else None


def prompt_length(model: nn.Module) -> int:
    """How many positions before a text's the model's prompt takes."""
    config = _config(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def virtual_tokens(model: nn.Module) -> int:
    """How many tokens of a prompt come before those of a text in the logits.

    Raises:
        InputError: its prompt is of a kind that is trained with a loss of its own.
    """
    config = _config(model)
    if config is not None and config.peft_type == "CPT":
        raise InputError(
            "the model's prompt was trained by CPT, whose loss no task here has. Write a Task that has it."
        )
    return 0 if config is None or config.peft_type in _CACHED else prompt_length(model)


@contextmanager
def prompting_each(model: nn.Module) -> Iterator[None]:
    """Within it, a prompt's table is looked up by each example: peft would look it up once and repeat what is there."""
    config = _config(model)
    if config is None:
        yield
        return
    wrapped: Any = model
    encoder, inference = wrapped.prompt_encoder[wrapped.active_adapter], config.inference_mode

    def prompts(batch_size: int, **_: object) -> Tensor:
        tokens = wrapped.prompt_tokens[wrapped.active_adapter].to(encoder.embedding.weight.device)
        found: Tensor = encoder(tokens.expand(batch_size, -1))
        return found

    with ExitStack() as stack:
        if inference:  # what made the prompt is gone, and it stands in the table itself
            stack.enter_context(computes_by(encoder, encoder.embedding))
        if config.peft_type not in _CACHED:
            stack.callback(vars(wrapped).pop, "get_prompt", None)
            wrapped.get_prompt = prompts
        stack.callback(setattr, config, "inference_mode", inference)
        config.inference_mode = False
        yield
