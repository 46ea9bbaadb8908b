"""The steps of a recorded training: which examples each has followed, how far, and where its checkpoints are.

This module knows trainings and recordings; it does not know how they are walked back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wherefrom.methods.checkpoints import chosen_checkpoints, recorded_only
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.method import Context
from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import dataset_digest, tensors_digest

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


@dataclass(frozen=True)
class Step:
    """A step of a training.

    Attributes:
        rate: the learning rate.
        followed: whose gradients it has followed, int64 [batch]: positions of training examples, or of what else
            gradients are numbered by.
        shares: what each was multiplied with, float64 [batch].
    """

    rate: float
    followed: Tensor
    shares: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it."""
        return {"rate": torch.tensor(self.rate, dtype=torch.float64), "visits": self.followed, "shares": self.shares}


def steps_of(training: ReplayableTraining[Any]) -> list[Step]:
    """All steps, in order."""
    rates, divisors = training.recipe.learning_rates, map(training.divisor, range(len(training.batches)))
    return [
        Step(rate, batch, torch.full(batch.shape, 1 / divisor, dtype=torch.float64))
        for rate, batch, divisor in zip(rates, training.batches, divisors, strict=True)
    ]


def step_settings(training: ReplayableTraining[Any], steps: Sequence[Step]) -> dict[str, str]:
    """What a fingerprint says of them."""
    described = {f"{number} {key}": each for number, step in enumerate(steps) for key, each in step.tensors().items()}
    recipe = training.recipe
    return {
        "steps": tensors_digest(described)[:16],
        "beta1": repr(recipe.betas[0]),
        "weight decay": repr(recipe.weight_decay),
    }


def check_unclipped(training: ReplayableTraining[Any]) -> None:
    """Refuse a training whose steps are no linear function of its gradients.

    Raises:
        InputError: they were clipped.
    """
    if training.recipe.max_norm is not None:
        raise InputError(
            f"training: its gradients were clipped to max_norm={training.recipe.max_norm}, which this method cannot "
            "follow. Use Magic(training=...)."
        )


def recorded_checkpoints(
    context: Context[Any], training: ReplayableTraining[Any], method: str
) -> list[RecordedCheckpoint]:
    """The study's history, which is the training's own.

    Raises:
        InputError: it is not, or has no second moments, or the study has other training examples.
    """
    if training.train is not context.train.dataset and dataset_digest(training.train) != context.train.digest:
        raise InputError(
            "training: its examples are not the study's. Make the Study with the training set that the model was "
            "trained on."
        )
    advice = "Give Study(history=training.record(folder))."
    # The training says which model this is about, whatever the study's own is.
    given = chosen_checkpoints(context, context.history)
    found = recorded_only(given, method, "Adam's second moments", advice)
    recipe, last = training.recipe, found[-1]
    expected = (len(training.batches), {(recipe.betas, recipe.epsilon, recipe.weight_decay)})
    recorded = (last.step, {(group.betas, group.eps, group.weight_decay) for group in last.groups})
    if recorded != expected:
        raise InputError(
            "history: its last checkpoint was recorded with (step, {(betas, epsilon, weight decay)}) "
            f"{recorded}, and the training ends with {expected}. {advice}"
        )
    return found
