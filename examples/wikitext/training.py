"""The training loop, for pre-training and fine-tuning alike, and perplexity.

The same seed, examples and settings give the same weights, on the same device and number of threads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from wherefrom import CausalLM
from wherefrom.tasks.losses import IGNORED

console = Console()


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        batch_size: sequences in a step.
        learning_rate: of AdamW; where the schedule is not constant, the highest.
        weight_decay: of AdamW.
        num_epochs: how often every sequence is seen.
        schedule: `constant`, as in the published fine-tuning of GPT-2; or `linear`, up during the first twentieth of
            the steps and then down to zero.
    """

    batch_size: int = 8
    learning_rate: float = 3e-05
    weight_decay: float = 0.01
    num_epochs: int = 3
    schedule: Literal["constant", "linear"] = "constant"

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when `progress` of all steps are done, from 0 to 1."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * min(progress / 0.05, (1 - progress) / 0.95)


def finetune(
    model: PreTrainedModel, dataset: Dataset, settings: TrainSettings, seed: int, description: str | None = None
) -> PreTrainedModel:
    """Train a copy and return it; `model` stays as it is, so that it can be the start of many runs.

    Args:
        model: where to start.
        dataset: examples for `CausalLM`, with `input_ids`.
        settings: how to train.
        seed: decides the order of the examples; nothing else is random.
        description: the label of the progress bar; None shows no bar.
    """
    model = copy.deepcopy(model)
    train(model, dataset, settings, seed, description)
    return model


def train(
    model: PreTrainedModel, dataset: Dataset, settings: TrainSettings, seed: int, description: str | None = None
) -> None:
    """Train `model` in place; the arguments are those of `finetune`."""
    model.train(
        False
    )  # no dropout, as in the published experiment: what an example teaches should not be left to chance
    optimizer = AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    loader = _loader(dataset, settings.batch_size, shuffle=torch.Generator().manual_seed(seed))
    steps = settings.num_epochs * len(loader)
    epochs = (batch for _ in range(settings.num_epochs) for batch in loader)
    for step, batch in enumerate(_with_progress(epochs, steps, description)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step / steps)
        loss, count = _loss(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss / count)
        optimizer.step()


@torch.no_grad()
def perplexity(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> float:
    """The exponential of the mean loss over all predicted tokens."""
    model.train(False)
    losses, counts = zip(*(_loss(model, batch) for batch in _loader(dataset, batch_size)), strict=True)
    return math.exp(sum(losses) / sum(counts))


@torch.no_grad()
def measured_losses(model: PreTrainedModel, dataset: Dataset) -> Tensor:
    """The summed loss of each sequence by itself, [sequences]."""
    model.train(False)
    return torch.stack([_loss(model, batch)[0] for batch in _loader(dataset, 1)]).cpu()


def predicted_tokens(dataset: Dataset) -> int:
    """How many tokens of a dataset have a loss: all but the first of each sequence."""
    return sum(len(tokens) - 1 for tokens in dataset["input_ids"])


def _loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The summed loss of a batch, and over how many predicted tokens it is a sum."""
    batch = {name: values.to(model.device) for name, values in batch.items()}
    predicted = batch["labels"][:, 1:] != IGNORED
    return CausalLM().train_loss(model, batch), int(predicted.sum())


def _loader(dataset: Dataset, batch_size: int, shuffle: torch.Generator | None = None) -> DataLoader[dict[str, Tensor]]:
    collate = CausalLM().collate
    return DataLoader(dataset, batch_size, shuffle=shuffle is not None, generator=shuffle, collate_fn=collate)


def _with_progress(
    batches: Iterable[dict[str, Tensor]], total: int, description: str | None
) -> Iterable[dict[str, Tensor]]:
    hidden = description is None or not console.is_terminal
    return track(batches, description or "", total, console=console, transient=True, disable=hidden)
