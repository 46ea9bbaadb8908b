"""A training that can be repeated step by step, bit for bit, and differentiated by the weights of its examples.

All that a step changes is one tensor, the state: parameters, running mean of gradients, and of their squares,
[3, parameters]. This module knows models, tasks and batches; it must not know which states are stored, nor what the
derivatives are for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from wherefrom.engine.loading import Examples, collated, map_tensors
from wherefrom.methods.magic.recipe import TrainingRecipe
from wherefrom.runtime.errors import InputError, LossError, check_argument
from wherefrom.store.files import write_tensors
from wherefrom.store.fingerprint import Dataset, checked_length
from wherefrom.store.recording import MOMENTS, ParameterGroup, RecordedCheckpoint
from wherefrom.tasks.adapters.quantized import multiplying_dequantized
from wherefrom.tasks.task import Batch, Objective, Task, evaluating

_TOLERANCE = 1e-3  # of the check that weights act on examples; rounding in float32 is far below


class ReplayableTraining(Generic[Batch]):
    """A model's training with a weight for each example, which is 1 unless said otherwise.

    A step follows the gradient of `sum_i weight_i loss_i / count` over its batch. The count does not depend on the
    weights: a weight of 0 leaves the example's loss out, and all else as it was. An example's weight multiplies what
    comes back from its loss to its part of the model's outputs, so a batch takes one pass, and any task will do whose
    summed loss is a function of the model's outputs, example by example; a first batch is checked for that, once.

    The model trains in the mode that it is in: with dropout after `model.train()`, whose masks depend on the seed and
    the step alone, without it after `model.eval()`, as `from_pretrained` leaves it. Measurements are made without.
    It trains on its device; on a GPU, embeddings are bit for bit the same each time only after
    `torch.use_deterministic_algorithms(True)`.

    Args:
        model: where the training starts; it is copied. Weights that do not require gradients stay as they are.
        task: gives the summed loss, and the measurement of a query.
        train: the training examples.
        recipe: the optimizer, its steps and the order.
        count: what a batch's summed loss is divided by, a scalar; by default its number of examples.

    Raises:
        InputError: the training set is empty; no weight is trained, or some are of another type than others; batch
            normalisation is in training mode; or the task's loss cannot be weighted by example.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task[Batch],
        train: Dataset[object],
        recipe: TrainingRecipe,
        count: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        examples = checked_length("train", train)
        self.model, self.task, self.train, self.recipe, self.count = copy.deepcopy(model), task, train, recipe, count
        self.batches = recipe.batches(examples)
        self._objective = _WatchedObjective(self.model, task)
        self._trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        _check_model(model, list(self._trained.values()))
        self._device = next(iter(self._trained.values())).device
        self._check_weighting()

    def start(self) -> Tensor:
        """The state before the first step."""
        parameters = torch.cat([each.detach().flatten() for each in self._trained.values()])
        return torch.stack([parameters, torch.zeros_like(parameters), torch.zeros_like(parameters)])

    def advance(self, state: Tensor, step: int, weights: Tensor | None = None) -> Tensor:
        """The state after a step.

        Args:
            state: the one before it, [3, parameters].
            weights: of the training examples, [train].
        """
        batch_indices = self.batches[step]
        chosen = torch.ones(len(batch_indices)) if weights is None else weights[batch_indices]
        parameters = state[0].detach().requires_grad_()
        gradient = self._gradient(parameters, step, chosen.to(state), twice=False)
        with torch.no_grad():
            return self.recipe.update(state, gradient, step)

    def pull_back(self, state: Tensor, step: int, cotangents: Tensor, at_once: int | None = None) -> Tensor:
        """Take the derivatives of some numbers back through a step, at weights of 1.

        Args:
            state: the one before the step, [3, parameters].
            cotangents: the numbers' derivatives by the state after it, [numbers, 3, parameters]; replaced, in place, by
                those by the state before it.
            at_once: how many numbers are taken through the step together; None is all.

        Returns:
            The derivatives by the weights of the step's examples, [numbers, batch].
        """
        state = state.detach().requires_grad_()
        weights = state.new_ones(len(self.batches[step])).requires_grad_()
        after = self.recipe.update(state, self._gradient(state[0], step, weights, twice=True), step)
        by_weights = []
        for part in cotangents.split(at_once or len(cotangents)):
            by_state, by_weight = torch.autograd.grad(
                after, (state, weights), part, retain_graph=True, is_grads_batched=True
            )
            part.copy_(by_state)
            by_weights.append(by_weight)
        return torch.cat(by_weights)

    def parameters(self, weights: Tensor | None = None) -> Tensor:
        """Train to the end: the parameters, [parameters].

        Args:
            weights: of the training examples, [train].
        """
        state = self.start()
        for step in range(len(self.batches)):
            state = self.advance(state, step, weights)
        return state[0]

    def record(self, folder: str | Path, checkpoints: int = 6) -> list[RecordedCheckpoint]:
        """Train to the end, and write checkpoints with Adam's second moments: a study's history.

        Args:
            folder: where they lie, `checkpoint-STEP` each.
            checkpoints: how many, at even distances; the last is the trained model.

        Raises:
            InputError: there are fewer steps than checkpoints, or none are wanted.
            StorageError: they cannot be written.
        """
        recipe, steps, state = self.recipe, len(self.batches), self.start()
        check_argument(1 <= checkpoints <= steps, "checkpoints", checkpoints, f"1 to {steps}, the number of steps")
        marks = [steps - steps // checkpoints * left for left in reversed(range(checkpoints))]
        recorded = list[RecordedCheckpoint]()
        for step, rate in enumerate(recipe.learning_rates, start=1):
            state = self.advance(state, step - 1)
            if step in marks:
                path = Path(folder) / f"checkpoint-{step}"
                for name, row in (("model.safetensors", state[0]), (MOMENTS, state[2])):
                    tensors = {key: each.detach().cpu().contiguous() for key, each in self.by_name(row).items()}
                    write_tensors(path / name, tensors, {"format": "pt"})
                group = ParameterGroup(rate, recipe.betas, recipe.epsilon, recipe.weight_decay)
                epoch = sum(map(len, self.batches[:step])) / len(self.train)
                since = step - (recorded[-1].step if recorded else 0)
                recorded.append(RecordedCheckpoint(path, step, epoch, since, "AdamW", (group,)))
        return recorded

    def divisor(self, step: int) -> float:
        """What a step's summed loss is divided by."""
        batch_indices = self.batches[step].tolist()
        return float(self._count(self._batch(self.train, batch_indices), len(batch_indices)))

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Parts of a row of the state, [parameters], in the shapes and by the names of the model's trained parameters.

        `model.load_state_dict(training.by_name(training.parameters()), strict=False)` makes the trained model.
        """
        parts = vector.split([each.numel() for each in self._trained.values()])
        named = zip(self._trained.items(), parts, strict=True)
        return {name: part.view(each.shape) for (name, each), part in named}

    def measurements(self, parameters: Tensor, queries: Dataset[object]) -> Tensor:
        """Each query's measurement, [queries]; differentiable by the parameters, [parameters]."""
        return torch.stack(list(self._measured(parameters, queries)))

    def measured_gradients(self, parameters: Tensor, queries: Dataset[object]) -> Tensor:
        """The gradient of each query's measurement by the parameters: [queries, parameters].

        Raises:
            LossError: the training has diverged, or a query's measurement is not finite.
        """
        parameters = parameters.detach().requires_grad_()
        found = []
        for query, measured in enumerate(self._measured(parameters, queries)):
            if not bool(measured.isfinite()):
                raise LossError(
                    f"The measurement of query {query} after the training is {float(measured.detach())}. Look whether "
                    "the training diverges; smaller learning rates, or clipping with max_norm, keep it from that."
                )
            found.append(torch.autograd.grad(measured, parameters)[0])
        return torch.stack(found)

    def _measured(self, parameters: Tensor, queries: Dataset[object]) -> Iterator[Tensor]:
        with evaluating(self.model):
            for query in range(len(queries)):
                with sdpa_kernel(SDPBackend.MATH):
                    measured = self._called(parameters, self._batch(queries, [query]), measured=True)
                yield measured

    def _gradient(self, parameters: Tensor, step: int, weights: Tensor, twice: bool) -> Tensor:
        """The weighted gradient of a step's batch, [parameters]; differentiable itself if `twice`."""
        batch = self._batch(self.train, self.batches[step].tolist())
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.recipe.dropout_seed(step))
            return self._weighted_gradient(parameters, batch, weights, twice) / self._count(batch, len(weights))

    def _count(self, batch: Batch, examples: int) -> Tensor | int:
        return examples if self.count is None else self.count(batch)

    def _weighted_gradient(self, parameters: Tensor, batch: Batch, weights: Tensor, twice: bool) -> Tensor:
        """`sum_i weight_i dloss_i/dparameters` of a batch, [parameters].

        The chain rule is cut at the model's outputs, where every example has a part of its own: the loss is
        differentiated by them, and they, times the weights, by the parameters.
        """
        # Kernels of fused attention cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH), self._objective.watched(len(weights)) as outputs:
            loss = self._called(parameters, batch, measured=False)
            slopes = torch.autograd.grad(loss, [seen for _, seen in outputs], create_graph=twice, allow_unused=True)
            used = [(made, slope) for (made, _), slope in zip(outputs, slopes, strict=True) if slope is not None]
            weighted = [slope * weights.view(-1, *[1] * (slope.dim() - 1)).to(slope.dtype) for _, slope in used]
            return torch.autograd.grad([made for made, _ in used], parameters, weighted, create_graph=twice)[0]

    def _called(self, parameters: Tensor, batch: Batch, measured: bool) -> Tensor:
        """The loss, or the measurement, of a batch for given parameters: a scalar."""
        replaced = {f"model.{name}": part for name, part in self.by_name(parameters).items()}
        with multiplying_dequantized(self.model):  # also in training, whose layers may not be differentiable twice
            return cast(Tensor, functional_call(self._objective, replaced, (batch, measured)))

    def _batch(self, dataset: Dataset[object], batch_indices: list[int]) -> Batch:
        batch, _ = collated(Examples(dataset, self.task), batch_indices, self.model)
        batch = cast(Batch, map_tensors(batch, lambda values: values.to(self._device)))
        self.task.verify(self.model, batch)
        return batch

    def _check_weighting(self) -> None:
        """Refuse a loss whose examples cannot be weighted at the model's outputs: compare with one at a time."""
        batch_indices = self.batches[0].tolist()
        weights = torch.rand(len(batch_indices), generator=torch.Generator().manual_seed(0))
        parameters = self.start()[0].requires_grad_()
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH):
            batch = self._batch(self.train, batch_indices)
            found = self._weighted_gradient(parameters, batch, weights.to(parameters), False)
            expected = torch.zeros_like(found)
            for index, weight in zip(batch_indices, weights.tolist(), strict=True):
                loss = self._called(parameters, self._batch(self.train, [index]), measured=False)
                expected += weight * torch.autograd.grad(loss, parameters)[0]
        error = float((found - expected).norm() / expected.norm().clamp(min=torch.finfo(found.dtype).tiny))
        if not error < _TOLERANCE:
            raise InputError(
                f"{type(self.task).__name__}.train_loss cannot be weighted by example: the gradient of the first "
                f"batch, weighted, differs by {error:.1e} of its norm from that of one example at a time. Give a loss "
                "that is a sum over examples, and of the outputs of `model(...)` alone; divide by a `count` instead."
            )


class _WatchedObjective(Objective[Batch]):
    """An objective whose model's outputs can be looked at."""

    @contextmanager
    def watched(self, examples: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect what the model returns: each tensor as it was made, and as the task sees it."""
        outputs: list[tuple[Tensor, Tensor]] = []

        def seen(made: Tensor) -> Tensor:
            if not made.requires_grad:
                return made
            if made.shape[:1] != (examples,):
                raise InputError(
                    f"The model returned a tensor of shape {list(made.shape)} for {examples} examples: expected a row "
                    "for each, by which the example is weighted. Let the task compute the loss out of such outputs."
                )
            outputs.append((made, made.view_as(made)))  # another one, so that none of them depends on another
            return outputs[-1][1]

        hook = self.model.register_forward_hook(lambda _, __, output: tree_map_only(Tensor, seen, output))
        try:
            yield outputs
        finally:
            hook.remove()


def _check_model(model: nn.Module, trained: list[nn.Parameter]) -> None:
    types = {each.dtype for each in trained}
    if len(types) != 1 or not types <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(map(str, types))) or "none that requires gradients"
        raise InputError(f"The model's weights are {found}: expected trained weights in float32, or all in float64.")
    mixing = [name for name, each in model.named_modules() if isinstance(each, _BatchNorm) and each.training]
    if mixing:
        raise InputError(
            f"{mixing[0]} is batch normalisation in training mode, which changes numbers that are no part of the "
            "optimizer's state. Call .eval() on it, to normalise by the stored statistics, or use another one."
        )
