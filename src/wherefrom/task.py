"""Tasks: what the loss is, what is measured, which tokens count, which layers are tracked.

A task is the only thing that knows how a model is called and what a batch holds. It knows nothing of sweeps,
curvature or scores. A task of your own is a subclass of `Task` with a `train_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from wherefrom.errors import InputError
from wherefrom.losses import IGNORED, summed_cross_entropy
from wherefrom.precision import widened
from wherefrom.sampling import Sampler

Batch = TypeVar("Batch")


class Task(Generic[Batch]):
    """What a model was trained for and what is asked about it.

    Args:
        layers: names or glob patterns (`transformer.h.*.mlp.*`) of the layers to track. None tracks every supported
            layer except the output head.
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        if isinstance(layers, str):
            raise InputError(f"layers={layers!r}: expected a list of names or patterns; write layers=[{layers!r}].")
        self.layers = None if layers is None else tuple(layers)

    def train_loss(self, model: nn.Module, batch: Batch, sampler: Sampler | None = None) -> Tensor:
        """The training loss of a batch, **summed** over its examples (and tokens): a scalar.

        Args:
            sampler: None for the dataset's own targets; otherwise draw the targets from the model's predictions with
                it (the Fisher information), for example `labels = sampler.categorical(logits)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define train_loss(model, batch, sampler=None).")

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is attributed, summed over the batch: a scalar. The loss with the dataset's targets by default."""
        return self.train_loss(model, batch)

    def mask(self, batch: Batch) -> Tensor | None:
        """Which tokens are real rather than padding: boolean [batch, tokens], or None when all are."""
        return None

    def head(self, model: nn.Module) -> nn.Module | None:
        """The output head, which is not tracked unless `layers` names it; None when the model has no such layer."""
        return None

    def collate(self, examples: Sequence[object]) -> Batch:
        """Make a batch out of examples; PyTorch's default collation unless a task pads."""
        batch: Batch = default_collate(list(examples))
        return batch

    def settings(self) -> dict[str, str]:
        """What makes two tasks the same, for fingerprints: the class and its public attributes."""
        public = {name: repr(value) for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **public}


class CausalLM(Task[dict[str, Tensor]]):
    """Next-token prediction with a Hugging Face causal language model.

    Batches are dicts with `input_ids` [batch, tokens] and, optionally, `attention_mask` (1 = real token) and `labels`
    (-100 = not counted; the inputs themselves by default). The loss is the cross-entropy summed over counted tokens.
    Examples of different lengths are padded on the right when they are collated.
    """

    def train_loss(self, model: nn.Module, batch: dict[str, Tensor], sampler: Sampler | None = None) -> Tensor:
        output = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
        # The labels are shifted, not the logits: a slice of those would be copied, and filled up again going back.
        labels = functional.pad(_labels(batch)[:, 1:], (0, 1), value=IGNORED)
        if sampler is not None:
            counted = labels != IGNORED
            labels = torch.where(counted, sampler.categorical(output.logits.detach(), counted), labels)
        return summed_cross_entropy(output.logits, labels)

    def mask(self, batch: dict[str, Tensor]) -> Tensor | None:
        mask = batch.get("attention_mask")
        return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

    def head(self, model: nn.Module) -> nn.Module | None:
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        return head if isinstance(head, nn.Module) else None

    def collate(self, examples: Sequence[object]) -> dict[str, Tensor]:
        """Pad examples on the right to the longest: input_ids with 0, attention_mask with 0, labels with -100.

        Without padding there is no attention_mask: a model that is given none can take its fast causal attention
        without a look at the values, also when it is compiled.
        """
        rows = [_tensors(example) for example in examples]
        padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
        batch = {
            name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in padding.items()
        }
        if bool((batch["attention_mask"] == 1).all()):
            del batch["attention_mask"]
        return batch


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is not None:
            labels = labels.masked_fill(mask == 0, IGNORED)
    return labels


def _tensors(example: object) -> dict[str, Tensor]:
    """One example's columns as int64 vectors, with attention_mask and labels filled in where they are missing."""
    if not isinstance(example, Mapping) or "input_ids" not in example:
        found = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise InputError(
            f"CausalLM needs examples that are dicts with 'input_ids'; found {found}. "
            "Tokenise the dataset first, or write a Task with its own collate."
        )
    row = {
        name: torch.as_tensor(example[name], dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "labels")
        if example.get(name) is not None
    }
    row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    row.setdefault("labels", _labels(row))
    return row


class Classification(Task[Sequence[Tensor]]):
    """Classification of batches `(inputs, labels)` by cross-entropy; the model returns logits [batch, classes]."""

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        inputs, labels = batch
        logits = widened(model(inputs))
        if sampler is not None:
            labels = sampler.categorical(logits.detach())
        return functional.cross_entropy(logits, labels, reduction="sum")


class Regression(Task[Sequence[Tensor]]):
    """Regression of batches `(inputs, targets)` by half the squared error, the negative log-likelihood of a normal
    distribution of unit variance; the model returns predictions of the targets' shape [batch, ...]."""

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        inputs, targets = batch
        predictions = widened(model(inputs))
        if predictions.shape != targets.shape:
            raise InputError(
                f"Regression: the model's output has shape {list(predictions.shape)} and the targets "
                f"{list(targets.shape)}; reshape one of them, since broadcasting would pair wrong values."
            )
        if sampler is not None:
            targets = sampler.normal(predictions.detach())
        return 0.5 * (predictions - targets).square().sum()
