"""Tasks: what the loss is, what is measured, which tokens count, which layers are tracked.

A task is the only thing that knows how a model is called and what a batch holds. It knows nothing of sweeps,
curvature or scores. A task of your own is a subclass of `Task` with a `train_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from wherefrom.errors import InputError
from wherefrom.precision import widened
from wherefrom.sampling import Sampler

Batch = TypeVar("Batch")


class Task(Generic[Batch]):
    """What a model was trained for and what is asked about it.

    Args:
        layers: names or glob patterns (`transformer.h.*.mlp.*`) of the layers to track. None tracks linear layers and
            convolutions that are not frozen, except the output head; of a model with LoRA adapters, these alone.
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
        """What is attributed, summed over the batch: a scalar. The loss with the dataset's targets by default.

        Lower is more of what is asked about, as with a loss: return minus a logit or a log-probability. A positive
        score then says that training on the example made it more likely.
        """
        return self.train_loss(model, batch)

    def mask(self, batch: Batch) -> Tensor | None:
        """Which tokens are real rather than padding: boolean [batch, tokens], or None when all are."""
        return None

    def masks(self, batch: Batch) -> Sequence[Tensor]:
        """`mask`, or several where layers see different tokens, as in an encoder and a decoder.

        A layer's is the one with as many tokens as the layer sees; so no two may have equally many, unless nothing is
        padded.
        """
        mask = self.mask(batch)
        return () if mask is None else (mask,)

    def head(self, model: nn.Module) -> nn.Module | None:
        """The output head, which is not tracked unless `layers` names it; None when the model has no such layer."""
        return None

    def collate(self, examples: Sequence[object]) -> Batch:
        """Make a batch out of examples; PyTorch's default collation unless a task pads."""
        batch: Batch = default_collate(list(examples))
        return batch

    def settings(self) -> dict[str, str]:
        """What makes two tasks the same, for fingerprints: the class and its public attributes.

        `measure` is what only queries depend on: factors and self-influence serve every value of it.
        """
        public = {name: repr(value) for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **public}


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
