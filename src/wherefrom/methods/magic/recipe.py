"""How a model is trained: the steps of AdamW, each a smooth function of the state before it and of the gradient.

This module knows vectors and numbers; it must not know models, tasks or datasets.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.runtime.errors import InputError, check_argument


@dataclass(frozen=True)
class TrainingRecipe:
    """AdamW (Loshchilov & Hutter 2019) on batches in an order that the seed decides.

    `p <- p - learning_rate (weight_decay p + mean / sqrt(square + epsilon^2))`, with both moments corrected for their
    start at zero. Epsilon stands inside the root, since `sqrt(square) + epsilon` has no derivative at 0: in optax's
    terms `eps=0, eps_root=epsilon**2`. The larger it is, the smoother the training: see `metasmoothness`.

    Attributes:
        batch_size: examples in a step; the last step of an epoch has what is left.
        learning_rates: one for each step; there are as many steps.
        weight_decay: decoupled, of all trained parameters.
        betas: decay of the running means of gradients and of their squares.
        epsilon: as above.
        max_norm: gradients with a larger norm are scaled down to it, as `torch.nn.utils.clip_grad_norm_` does; None
            does not clip. The gradient through clipping is exact, but for a norm of `max_norm` to the last digit.
        seed: of the order, a new permutation from `torch.Generator().manual_seed(seed)` each epoch, and of dropout.

    Raises:
        InputError: a number is out of its range.
    """

    batch_size: int
    learning_rates: Sequence[float]
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rates", tuple(map(float, self.learning_rates)))  # a tensor's too
        if self.batch_size < 1 or not self.learning_rates:
            raise InputError(
                f"batch_size={self.batch_size}, learning_rates of {len(self.learning_rates)} steps: expected at least "
                "1 of each. Give one learning rate for each step of the training."
            )
        if not self.epsilon > 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"epsilon={self.epsilon}, betas={self.betas}: expected an epsilon above 0, without which the root has "
                "no derivative at 0, and betas from 0 to below 1."
            )
        check_argument(self.max_norm is None or self.max_norm > 0, "max_norm", self.max_norm, "a norm above 0, or None")

    def batches(self, examples: int) -> list[Tensor]:
        """The positions in a training set of every step's batch: int64 [batch] each."""
        generator, batches = torch.Generator().manual_seed(self.seed), list[Tensor]()
        while len(batches) < len(self.learning_rates):
            batches += torch.randperm(examples, generator=generator).split(self.batch_size)
        return batches[: len(self.learning_rates)]

    def dropout_seed(self, step: int) -> int:
        """What all random numbers of a step begin with: it depends on the seed and the step alone."""
        return random.Random(f"dropout/{self.seed}/{step}").getrandbits(63)

    def update(self, state: Tensor, gradient: Tensor, step: int) -> Tensor:
        """The state after a step (counted from 0), differentiable by both.

        Args:
            state: parameters, running mean of gradients, and of their squares, [3, parameters].
            gradient: [parameters].
        """
        parameters, mean, square = state
        if self.max_norm is not None:
            gradient = gradient * (self.max_norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1)
        rate, (first, second) = self.learning_rates[step], self.betas
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient.square()
        root = (square / (1 - second ** (step + 1)) + self.epsilon**2).sqrt()
        direction = mean / (1 - first ** (step + 1)) / root
        return torch.stack([parameters * (1 - rate * self.weight_decay) - rate * direction, mean, square])
