"""Models of torch's own modules, and adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wherefrom as wf
from zoo.examples import CLASSES, texts, vectors
from zoo.family import GROUPED, Family, OfTransformers

_ADAPTED = ["q_proj", "v_proj", "up_proj"]


def mlp() -> nn.Module:
    """A perceptron."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def convolutions() -> nn.Module:
    """Convolutions, one of them with groups, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    """Convolution, batch normalisation, and what went in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, width, *positions], as it comes."""
        return torch.relu(inputs + self.norm(self.convolution(inputs)))


def residual_network() -> nn.Module:
    """As a ResNet; in evaluation mode, batch normalisation is the same for any batch."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Residual(4), Residual(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


class Mean(nn.Module):
    """A classifier on the mean over tokens of what a module makes of a sequence.

    Args:
        inside: takes and returns [batch, tokens, features], or a tuple that begins with that.
        several: whether it takes queries, keys and values.
    """

    def __init__(self, inside: nn.Module, features: int = 8, several: bool = False) -> None:
        super().__init__()
        self.first, self.inside, self.classifier = nn.Linear(6, 8), inside, nn.Linear(features, CLASSES)
        self.several = several

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, tokens, 6] -> logits [batch, classes]."""
        hidden = self.first(inputs)
        hidden = self.inside(hidden, hidden, hidden) if self.several else self.inside(hidden)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        result: Tensor = self.classifier(hidden.mean(1))
        return result


def transformer() -> nn.Module:
    """torch's encoder."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return Mean(nn.TransformerEncoder(layer, 2))


class TokensFirst(nn.Module):
    """A module that wants [tokens, batch, features], for others that have the batch first."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, inputs: Tensor) -> Tensor:
        """[batch, tokens, features], as it comes."""
        result: Tensor = self.inside(inputs.transpose(0, 1)).transpose(0, 1)
        return result


def tokens_first() -> nn.Module:
    """torch's encoder as it is by default."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    return Mean(TokensFirst(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)))


def adapted(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """A Llama with adapters of a kind; all else is frozen."""

    def make() -> nn.Module:
        import peft  # noqa: PLC0415  (slow)

        config = getattr(peft, f"{kind}Config")(target_modules=_ADAPTED, task_type="CAUSAL_LM", **settings)
        model: nn.Module = peft.get_peft_model(OfTransformers("LlamaForCausalLM", GROUPED)(), config)
        return model

    return make


def tokens() -> list[object]:
    """Sequences [4, 6] with a class: in a batch of four there are as many tokens as examples."""
    return vectors(4, 6)


MODULES = (
    Family("MLP", mlp, wf.Classification, lambda: vectors(6)),
    Family("CNN", convolutions, wf.Classification, lambda: vectors(3, 8, 8)),
    Family("CNN with batch normalisation (ResNet)", residual_network, wf.Classification, lambda: vectors(3, 8, 8)),
    Family("nn.TransformerEncoder", transformer, wf.Classification, tokens),
    Family("nn.TransformerEncoder, batch_first=False", tokens_first, wf.Classification, tokens),
    Family("nn.MultiheadAttention", lambda: Mean(nn.MultiheadAttention(8, 2, batch_first=True), several=True),
           wf.Classification, tokens),
    Family("nn.LSTM", lambda: Mean(nn.LSTM(8, 8, batch_first=True)), wf.Classification, tokens),
    Family("nn.GRU", lambda: Mean(nn.GRU(8, 4, batch_first=True, bidirectional=True)), wf.Classification, tokens),
    Family("Llama with LoRA", adapted("Lora", r=2), wf.CausalLM, texts),
    Family("Llama with DoRA", adapted("Lora", r=2, use_dora=True), wf.CausalLM, texts),
    Family("Llama with AdaLoRA", adapted("AdaLora", init_r=2, target_r=2, total_step=10), wf.CausalLM, texts),
    Family("Llama with (IA)³", adapted("IA3", feedforward_modules=["up_proj"]), wf.CausalLM, texts),
)  # fmt: skip
