"""Many small models trained at once: their weights stacked, their gradients by one vectorised pass (torch.func).

An elementwise optimizer on stacked weights is as many independent optimizers, so each model goes exactly the way that
it would go alone, up to rounding. This module knows models, tasks and batches; it must not know what the retrainings
are for or where their results are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from wherefrom.engine.loading import map_tensors
from wherefrom.evaluate.retrain import Retraining, current_device
from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import Dataset, checked_length
from wherefrom.tasks.task import Batch, Objective, Task

Weights = dict[str, Tensor]


class StackedTraining(Generic[Batch]):
    """A training function for `retrain` that trains all that it is given at once; pass `together` there.

    Every retraining starts from the model's weights and visits its own subset in its own order, a new permutation from
    `torch.Generator().manual_seed(seed)` each epoch; nothing else is random. The model is put into evaluation mode: no
    dropout, and batch normalisation by the stored statistics. It trains on its worker's GPU, or on the CPU.

    Args:
        model: where every training starts; it is copied. Weights that do not require gradients stay as they are.
        task: gives the summed loss, and the measurement of each query. Its losses must not look at values to decide
            what to do (`torch.vmap` cannot); a Hugging Face model needs `attn_implementation="eager"` for that.
        train: the training examples; all of them are collated into one batch, so sequences are padded to the longest.
        queries: what is measured in the end, collated likewise.
        optimizer: makes an elementwise optimizer (SGD, Adam, AdamW, ...) for a list of tensors [models, ...].
        batch_size: examples in a step; the last step of an epoch has what is left.
        epochs: how often every example is seen.
        count: what a batch's summed loss is divided by, a scalar tensor; by default its number of examples. It looks
            at one model's batch and is vectorised like the loss.

    Raises:
        InputError: `batch_size` or `epochs` is less than 1, or a collated batch is not made of tensors [examples, ...].
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task[Batch],
        train: Dataset[object],
        queries: Dataset[object],
        *,
        optimizer: Callable[[list[Tensor]], Optimizer],
        batch_size: int,
        epochs: int,
        count: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        if batch_size < 1 or epochs < 1:
            raise InputError(f"batch_size={batch_size}, epochs={epochs}: expected at least 1 of each.")
        self._objective = Objective(copy.deepcopy(model).train(False), task)
        self._count = count or _size
        self._examples = len(train)
        self._train, self._queries = (
            _collated(model, task, each, name) for each, name in ((train, "train"), (queries, "queries"))
        )
        self._optimizer, self._batch_size, self._epochs = optimizer, batch_size, epochs

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        """Train one model for each retraining; each query's measurement after it, [retrainings, queries].

        Raises:
            InputError: the subsets are not of one size, or hold positions that are not in the training set.
        """
        self._check(retrainings)
        device = current_device()
        self._objective.to(device)
        train, queries = (_on_each(lambda values: values.to(device), each) for each in (self._train, self._queries))
        stacked = {
            name: weight.detach().expand(len(retrainings), *weight.shape).clone()
            for name, weight in self._objective.named_parameters()
            if weight.requires_grad
        }
        optimizer = self._optimizer(list(stacked.values()))
        gradients = vmap(grad(self._mean_loss))
        for batch_indices in self._steps(retrainings):
            for name, gradient in gradients(stacked, _picked(train, batch_indices)).items():
                stacked[name].grad = gradient
            optimizer.step()
        return self._measure(stacked, queries)

    def _check(self, retrainings: Sequence[Retraining]) -> None:
        sizes = sorted({len(each.subset) for each in retrainings})
        if len(sizes) != 1:
            raise InputError(
                f"StackedTraining was given subsets of {sizes} examples: expected one size, so that all models take "
                "the same steps. Train each size in a call of its own."
            )
        outside = [example for each in retrainings for example in each.subset if not 0 <= example < self._examples]
        if outside:
            raise InputError(
                f"A subset keeps example {outside[0]}, but the training set has {self._examples}. Make the masks for "
                "this training set."
            )

    def _steps(self, retrainings: Sequence[Retraining]) -> Iterator[Tensor]:
        """Positions in the training set of every model's next batch: int64 [models, batch]."""
        subsets = torch.tensor([each.subset for each in retrainings])
        generators = [torch.Generator().manual_seed(each.seed) for each in retrainings]
        for _ in range(self._epochs):
            orders = [torch.randperm(subsets.shape[1], generator=generator) for generator in generators]
            yield from subsets.gather(1, torch.stack(orders)).split(self._batch_size, dim=1)

    def _mean_loss(self, weights: Weights, batch: Batch) -> Tensor:
        """The loss of one batch for given weights, divided by the count: a scalar."""
        return cast(Tensor, functional_call(self._objective, weights, (batch, False))) / self._count(batch)

    def _measurement(self, weights: Weights, batch: Batch) -> Tensor:
        """The measurement of one batch for given weights: a scalar."""
        return cast(Tensor, functional_call(self._objective, weights, (batch, True)))

    @torch.no_grad()
    def _measure(self, stacked: Weights, queries: Batch) -> Tensor:
        """Each model's measurement of each query alone: [models, queries]."""
        measure = vmap(vmap(self._measurement, in_dims=(None, 0)), in_dims=(0, None))
        # As many queries at once as a training step has examples, for the memory's sake; each is a batch of one.
        blocks = torch.arange(_size(queries))[:, None].split(self._batch_size)
        return torch.cat([measure(stacked, _picked(queries, block)) for block in blocks], dim=1)


def _collated(model: nn.Module, task: Task[Batch], dataset: Dataset[object], name: str) -> Batch:
    """All examples in one batch of tensors [examples, ...]."""
    count = checked_length(name, dataset)
    batch = task.collate([task.select(model, dataset[position]) for position in range(count)])
    wrong = [each for each in _leaves(batch) if not isinstance(each, Tensor) or each.shape[:1] != (count,)]
    if wrong:
        found = f"of shape {list(wrong[0].shape)}" if isinstance(wrong[0], Tensor) else f"{wrong[0]!r:.80}"
        raise InputError(
            f"{name}: a batch of its {count} examples holds a {type(wrong[0]).__name__} {found}; expected only "
            f"tensors with a row for each example. Leave the rest out in the task's collate."
        )
    return batch


def _leaves(batch: object) -> list[object]:
    """What is in a batch's mappings, lists and tuples."""
    found: list[object] = tree_leaves(map_tensors(batch, lambda values: values))  # whose mappings are all dicts
    return found


def _on_each(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    return cast(Batch, map_tensors(batch, function))


def _picked(batch: Batch, batch_indices: Tensor) -> Batch:
    """Examples of a batch, in the shape of `batch_indices`, an int64 tensor."""
    return _on_each(lambda values: values[batch_indices.to(values.device)], batch)


def _size(batch: object) -> int:
    """How many examples a batch has."""
    first = _leaves(batch)[0]
    assert isinstance(first, Tensor)
    return len(first)
