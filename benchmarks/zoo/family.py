"""What a family is: a tiny model, the usual one without numbers, a task and examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import wherefrom as wf
from zoo.examples import VOCABULARY

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: as its users call it.
        tiny: makes a model of a few thousand weights.
        task: makes the task.
        examples: makes the examples, of different lengths where the model takes such.
        large: makes the model in the size that it usually has; None is the tiny one.
        note: what else is to be known.
    """

    name: str
    tiny: Callable[[], nn.Module]
    task: Callable[[], wf.Task[Any]]
    examples: Callable[[], list[object]]
    large: Callable[[], nn.Module] | None = None
    note: str | None = None

    def model(self) -> nn.Module:
        """The tiny one in float64, with every weight moved, so that no bias is zero and no attention uniform."""
        torch.manual_seed(0)
        model = self.tiny().double().eval()
        with torch.no_grad():
            for each in model.parameters():
                each.add_(torch.randn_like(each), alpha=0.25)
        return model

    def without_numbers(self) -> nn.Module:
        """The usual one on the meta device: what weights it has."""
        with torch.device("meta"):
            return (self.large or self.tiny)()


@dataclass(frozen=True)
class OfTransformers:
    """A class of transformers in any size; its library is imported when a model is made.

    Attributes:
        settings: of its configuration; what transformers does not say itself has that of its first checkpoint.
    """

    kind: str
    settings: Settings = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        """The model."""
        import transformers  # noqa: PLC0415  (slow)

        kind = getattr(transformers, self.kind)
        model: nn.Module = kind(kind.config_class(**self.settings))
        return model


# What most configurations call their sizes, and what they take.
SIZES: Settings = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED: Settings = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
EXPERTS: Settings = {
    **GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
    "experts_implementation": "eager",
}  # fmt: skip
