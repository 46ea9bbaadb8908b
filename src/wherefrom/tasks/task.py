"""Tasks: what the loss is, what is measured, which tokens count, which layers are tracked.

A task is the only thing that knows how a model is called and what a batch holds. It knows nothing of sweeps, curvature
or scores. A task of your own is a subclass of `Task` with a `train_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Generic, TypeVar

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from wherefrom.runtime.errors import InputError, check_argument, first_line
from wherefrom.runtime.memory import out_of_memory
from wherefrom.runtime.precision import widened
from wherefrom.tasks.adapters.prompts import prompting_each
from wherefrom.tasks.adapters.quantized import multiplying_dequantized
from wherefrom.tasks.descriptions import described, described_class
from wherefrom.tasks.losses import half_squared_error, summed_binary_cross_entropy
from wherefrom.tasks.sampling import Sampler

Batch = TypeVar("Batch")


class Task(Generic[Batch]):
    """What a model was trained for and what is measured of it.

    Args:
        layers: names or glob patterns (`transformer.h.*.mlp.*`) of the layers to track. None tracks linear layers and
            convolutions, also inside of attention, recurrent modules and experts, that run and are not frozen, except
            the output head; of a model with LoRA adapters, these alone.
    """

    convex: ClassVar[bool] = True
    """Whether the training loss is convex in what the model returns, as solvers need."""

    by_token: ClassVar[bool] = False
    """Whether the measurement is a sum over tokens, so that a person reads it by the token."""

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        expected = f"a list of names or patterns; write layers=[{layers!r}]"
        check_argument(not isinstance(layers, str), "layers", layers, expected)
        check_argument(layers is None or len(layers) > 0, "layers", layers, "names or patterns, or None for the usual")
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

        Lower is more of what is measured, as with a loss: return minus a logit or a log-probability. A positive
        score then says that training on the example made it more likely.
        """
        return self.train_loss(model, batch)

    @property
    def unit(self) -> str:
        """What the measurement is in."""
        return "units of the loss"

    def trained(self, model: nn.Module, batch: Batch) -> int:
        """How many tokens the training loss of a batch of one example is a sum over; 1 without tokens."""
        return 1

    def counted(self, model: nn.Module, batch: Batch) -> int:
        """How many tokens the measurement of a batch of one example is a sum over; those of the loss by default."""
        return self.trained(model, batch)

    def mask(self, batch: Batch) -> Tensor | None:
        """Which tokens are real rather than padding: boolean [batch, tokens], or None when all are."""
        return None

    def masks(self, batch: Batch) -> Sequence[Tensor]:
        """`mask`, or several: where layers see different tokens, as in an encoder and a decoder, or where the loss
        calls the model several times, for each call one.

        A layer's is the one with as many tokens as the layer sees. Of several with equally many, unless nothing is
        padded, it is that of the call, and so there has to be one for each.
        """
        mask = self.mask(batch)
        return () if mask is None else (mask,)

    def measured_masks(self, batch: Batch) -> Sequence[Tensor]:
        """`masks` for the measurement, where that calls the model otherwise than the training loss does."""
        return self.masks(batch)

    def head(self, model: nn.Module) -> nn.Module | None:
        """The output head, which is not tracked unless `layers` names it; None when the model has no such layer."""
        return None

    def collate(self, examples: Sequence[object]) -> Batch:
        """Make a batch out of examples, or refuse them; PyTorch's default collation unless a task pads."""
        try:
            batch: Batch = default_collate(list(examples))
        except (TypeError, RuntimeError, KeyError, AttributeError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise  # a smaller batch may fit
            raise InputError(
                f"{type(self).__name__}: examples cannot be put together ({type(error).__name__}: "
                f"{first_line(error)}). Give all of them tensors or numbers of the same names and "
                "shapes, or write a Task whose collate pads them."
            ) from error
        return batch

    def select(self, model: nn.Module, example: object) -> object:
        """What of an example goes into a batch for this model; all of it unless a task knows better.

        Raises an `InputError` where the model would use a part of the example that cannot be passed on.
        """
        return example

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Refuse a batch that the model cannot take, with an `InputError`; the batch is still on the host.

        Called for every batch: what a GPU would only find out by ending the process belongs here.
        """

    def verify(self, model: nn.Module, batch: Batch) -> None:
        """Refuse a model that would make something else of a batch than training did, with an `InputError`.

        Called for every batch, which is on the model's device: what only a pass through the model can tell.
        """

    def settings(self) -> dict[str, str]:
        """What makes two tasks the same, for fingerprints: the class with its code, and its public attributes.

        `measure` is what only queries depend on: factors and self-influence serve every value of it.
        """
        public = {
            name: described(f"The task's attribute {name!r}", value)
            for name, value in vars(self).items()
            if not name.startswith("_")
        }
        return {"class": described_class(type(self)), **public}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with weights of few bits dequantized and prompts of their own for each example.

    Every module is put back as it was.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with multiplying_dequantized(model), prompting_each(model):
            yield
    finally:
        for module, flag in training:
            module.training = flag


class Objective(nn.Module, Generic[Batch]):
    """A model with its task, so that a task sees the model itself while `functional_call` exchanges the weights."""

    def __init__(self, model: nn.Module, task: Task[Batch]) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Batch, measured: bool) -> Tensor:
        """The measurement of a batch, or its summed loss: a scalar."""
        return self._task.measurement(self.model, batch) if measured else self._task.train_loss(self.model, batch)


def unit_of(task: Task[Batch]) -> str:
    """What a person reads the measurement in."""
    return f"{task.unit} a token" if task.by_token else task.unit


def checked_settings(task: Task[Batch]) -> dict[str, str]:
    """The settings of a task, which fingerprints are made of; refuses what are not texts by name, always the same."""
    found = task.settings()
    wrong = not isinstance(found, dict) or not all(isinstance(each, str) for pair in found.items() for each in pair)
    if wrong or task.settings() != found:
        raise InputError(
            f"{type(task).__name__}.settings returned {str(found)[:80]}: expected a dict of strings, the same in "
            "every call."
        )
    return found


class Classification(Task[Sequence[Tensor]]):
    """Classification of batches `(inputs, labels)` by cross-entropy; the model returns logits [batch, classes].

    Labels are class numbers [batch], or probabilities of classes [batch, classes].
    """

    @property
    def unit(self) -> str:
        return "nats"

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        """The cross-entropy, summed over the batch; refuses labels that are not of the model's classes."""
        inputs, labels = _pair(self, batch)
        logits = _output(self, model(inputs))
        if labels.shape != logits.shape:
            labels = _classes(labels, logits)
        if sampler is not None:
            labels = sampler.categorical(logits.detach())
        try:
            return functional.cross_entropy(logits, labels, reduction="sum")
        except IndexError as error:  # on a CPU; elsewhere, looking at the numbers would hold up every batch
            raise InputError(
                f"Classification: {error} The model has the classes 0 to {logits.shape[1] - 1}. Look whether the "
                "labels are those that it was trained with."
            ) from error


class Regression(Task[Sequence[Tensor]]):
    """Regression of batches `(inputs, targets)` by half the squared error, the negative log-likelihood of a normal
    distribution of unit variance; the model returns predictions of the targets' shape [batch, ...]."""

    @property
    def unit(self) -> str:
        return "nats"

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        """Half the squared error, summed over the batch; refuses targets of another shape than the model's output."""
        inputs, targets = _pair(self, batch)
        predictions = _output(self, model(inputs))
        _check_alike(self, predictions, targets)
        if sampler is not None:
            targets = sampler.normal(predictions.detach())
        return half_squared_error(predictions, targets)


class MultiLabel(Task[Sequence[Tensor]]):
    """Classification of batches `(inputs, labels)` where an example may have any number of classes, or one question is
    answered by yes or no, by binary cross-entropy; the model returns logits of the labels' shape [batch, ...].

    Labels are 0 or 1, or probabilities.
    """

    @property
    def unit(self) -> str:
        return "nats"

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        """The binary cross-entropy, summed over the batch and the classes; refuses labels of another shape."""
        inputs, labels = _pair(self, batch)
        logits = _output(self, model(inputs))
        _check_alike(self, logits, labels)
        if sampler is not None:
            labels = sampler.binary(logits.detach())
        return summed_binary_cross_entropy(logits, labels)

    def check(self, model: nn.Module, batch: Sequence[Tensor]) -> None:
        """Refuse labels that are no probabilities, with an `InputError`."""
        check_probabilities(_pair(self, batch)[1])


def check_probabilities(labels: Tensor) -> None:
    """Refuse labels of binary cross-entropy, on the host, that are not from 0 to 1."""
    wrong = labels[~((labels >= 0) & (labels <= 1))]
    if len(wrong):
        raise InputError(f"a label is {wrong[0].item():g}: expected 0 or 1 for each output, or a probability.")


def _check_alike(task: Task[Sequence[Tensor]], output: Tensor, targets: Tensor) -> None:
    if output.shape != targets.shape:
        raise InputError(
            f"{type(task).__name__}: the model's output has shape {list(output.shape)} and the targets "
            f"{list(targets.shape)}; reshape one of them, since broadcasting would pair wrong values."
        )


def _pair(task: Task[Sequence[Tensor]], batch: object) -> tuple[Tensor, Tensor]:
    """The inputs and the targets of a batch."""
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    found = [type(each).__name__ for each in batch] if isinstance(batch, list | tuple) else type(batch).__name__
    raise InputError(
        f"{type(task).__name__} needs examples that are pairs of an input and a tensor or number; a batch of these is "
        f"{found}. Write a Task with a train_loss of its own for others."
    )


def _output(task: Task[Sequence[Tensor]], output: object) -> Tensor:
    """What a model returned, as a float tensor."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return widened(output)
    found = output.dtype if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        f"{type(task).__name__}: the model returned {found}: expected a tensor of real numbers. Write a Task whose "
        "train_loss takes the tensor out of it."
    )


def _classes(labels: Tensor, logits: Tensor) -> Tensor:
    """Class numbers [batch] for logits [batch, classes], in the type that cross-entropy wants."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Classification: the model's output has shape {list(logits.shape)} and the labels {list(labels.shape)}: "
            "expected [batch, classes], and [batch] or [batch, classes]. Write a Task whose train_loss reshapes them."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(f"Classification: the labels are {labels.dtype}: expected whole numbers. Call .long().")
    return labels.long()
