"""What language models are trained on preferences with: functions of how probable completions are.

A loss makes a *margin* of an example, which grows with the preference that the example states, and a cost of the
margin. Drawn targets, for the Fisher information, are such that the expected outer product of an example's drawn
gradient is (d^2 cost / d margin^2) times the margin's gradient with itself: the curvature that a Gauss-Newton matrix
has in the margin. This module is tensor algebra; it knows nothing of models, batches or reference models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.tasks.losses import IGNORED, cross_entropy
from wherefrom.tasks.sampling import Sampler


class Completion(NamedTuple):
    """What the model makes of one completion of each example.

    Attributes:
        logits: [batch, tokens, classes] of what follows each token.
        labels: [batch, tokens], -100 where nothing is counted.
        score: [batch]: its log-probability, less that of the reference model, divided by the number of its tokens, as
            far as the loss says so.
    """

    logits: Tensor
    labels: Tensor
    score: Tensor


Completions = Mapping[str, Completion]
Numbers = Mapping[str, Tensor]


def bradley_terry(margins: Tensor, sampler: Sampler | None) -> Tensor:
    """-log sigmoid(margin) of each margin; of minus the margin, where a sampler draws the other preference: [batch].

    The other one has the probability sigmoid(-margin) (Bradley & Terry 1952).
    """
    signs = 1 if sampler is None else 2 * sampler.binary(margins.detach()) - 1
    return functional.softplus(-signs * margins)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of preferences, by its margin and its cost.

    Attributes:
        beta: what margins are multiplied with, unless the loss says something else.
    """

    beta: float = 0.1

    completions: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    referenced: ClassVar[bool] = True
    averaged: ClassVar[bool] = False
    numbers: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            fine = value is None or (isinstance(value, int | float) and math.isfinite(value))
            check_argument(fine, f"{type(self).__name__}: {field.name}", value, "a finite number")
        check_argument(self.beta > 0, f"{type(self).__name__}: beta", self.beta, "a number above 0")

    def margins(self, completions: Completions, numbers: Numbers) -> Tensor:
        """[batch]."""
        return self.beta * (completions["chosen"].score - completions["rejected"].score)

    def costs(self, completions: Completions, numbers: Numbers) -> Tensor:
        """[batch]."""
        return bradley_terry(self.margins(completions, numbers), None)

    def drawn(self, completions: Completions, numbers: Numbers, sampler: Sampler) -> Tensor:
        """The costs of targets that are drawn from the model: [batch].

        Preferences, with the probability of Bradley and Terry, unless the loss says something else.
        """
        return bradley_terry(self.margins(completions, numbers), sampler)


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct preference optimization (Rafailov et al. 2023, equation 7): -log sigmoid of the reward margin.

    The margin is beta times the difference of the two completions' log-ratios to the reference model. Preferences are
    drawn with the probability sigmoid(margin).

    Args:
        beta: of the margin.
        label_smoothing: the part of preferences that is taken to be the wrong way round (Mitchell 2023, "cDPO").
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = 0 <= self.label_smoothing < 0.5
        check_argument(fine, "DPO: label_smoothing", self.label_smoothing, "a number from 0 to below 0.5")

    def costs(self, completions: Completions, numbers: Numbers) -> Tensor:
        margins, part = self.margins(completions, numbers), self.label_smoothing
        return (1 - part) * functional.softplus(-margins) + part * functional.softplus(margins)


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimization (Azar et al. 2024, equation 17): (margin - 1 / (2 beta))^2.

    The margin is the difference of the two completions' log-ratios to the reference model, each a mean over its tokens,
    as TRL has it. Targets are drawn from a normal distribution around it, of variance 1/2, whose negative
    log-likelihood the loss is.

    Args:
        beta: the paper's tau.
    """

    averaged: ClassVar[bool] = True

    def margins(self, completions: Completions, numbers: Numbers) -> Tensor:
        return completions["chosen"].score - completions["rejected"].score

    def costs(self, completions: Completions, numbers: Numbers) -> Tensor:
        return (self.margins(completions, numbers) - 1 / (2 * self.beta)).square()

    def drawn(self, completions: Completions, numbers: Numbers, sampler: Sampler) -> Tensor:
        margins = self.margins(completions, numbers)
        noise = sampler.normal(torch.zeros_like(margins)) / math.sqrt(2)
        return (margins - (margins.detach() + noise)).square()


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Simple preference optimization (Meng et al. 2024, equation 6): DPO without a reference model, of means over
    tokens.

    The margin is beta times the difference of the two completions' mean log-probabilities, less gamma. Preferences are
    drawn with the probability sigmoid(margin).

    Args:
        beta: of the margin.
        gamma: how much more the chosen one is to have.
    """

    gamma: float = 0.5

    referenced: ClassVar[bool] = False
    averaged: ClassVar[bool] = True

    def margins(self, completions: Completions, numbers: Numbers) -> Tensor:
        return super().margins(completions, numbers) - self.gamma


@dataclass(frozen=True)
class ORPO(PreferenceLoss):
    """Odds ratio preference optimization (Hong et al. 2024, equations 6 and 7), without a reference model.

    The mean cross-entropy of the chosen completion's tokens, and beta times -log sigmoid(margin), where the margin is
    the logarithm of the ratio of the two completions' odds, p / (1 - p) of the mean log-probability of its tokens. Both
    targets are drawn, tokens and preferences, independently; a term with a weight w has the square root of w instead,
    so that its expected outer product is w times its curvature.

    TRL averages the first term over the tokens of a batch, prompts included, and not over each completion's as here.

    Args:
        beta: the paper's lambda.
    """

    referenced: ClassVar[bool] = False
    averaged: ClassVar[bool] = True

    def margins(self, completions: Completions, numbers: Numbers) -> Tensor:
        chosen, rejected = (completions[name].score for name in self.completions)
        return (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))

    def costs(self, completions: Completions, numbers: Numbers) -> Tensor:
        return self.beta * super().costs(completions, numbers) - completions["chosen"].score

    def drawn(self, completions: Completions, numbers: Numbers, sampler: Sampler) -> Tensor:
        logits, labels, _ = completions["chosen"]
        counted = labels != IGNORED
        tokens = sampler.categorical(logits.detach(), counted).masked_fill(~counted, IGNORED)
        of_tokens = cross_entropy(logits, tokens).sum(1) / counted.sum(1).clamp_min(1).sqrt()
        other = replace(sampler, seed=-1 - sampler.seed)  # another stream, so that the two draws are independent
        return math.sqrt(self.beta) * super().drawn(completions, numbers, other) + of_tokens


@dataclass(frozen=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, equation 8), of completions that are good or not.

    1 - sigmoid(margin), times a weight. The margin is beta times the completion's log-ratio to the reference model less
    `kl`, or minus that where `label` is 0. Trainers take for `kl` the mean of a batch's log-ratios, of completions to
    other prompts, through which no gradient flows; so an example's loss would depend on what stands beside it in its
    batch, and its scores on the batch size. Here it is a number that is known: TRL logs it as `kl`.

    The loss is no logarithm of a probability, so there is nothing to draw targets from: fit with `empirical=True`.

    Args:
        beta: of the margin.
        kl: the reference point in nats, 0 or more; None where examples have a column `kl`.
        desirable_weight, undesirable_weight: of the loss of examples whose `label` is 1, and 0.
    """

    kl: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    completions: ClassVar[tuple[str, ...]] = ("completion",)
    numbers: ClassVar[tuple[str, ...]] = ("label", "kl")

    def margins(self, completions: Completions, numbers: Numbers) -> Tensor:
        score = completions["completion"].score
        if (self.kl is None) == ("kl" not in numbers):
            given = "no column 'kl'" if self.kl is None else "a column 'kl' too"
            raise InputError(
                f"KTO: kl={self.kl}, and the examples have {given}: expected exactly one of both. Give the reference "
                "point of the training, which TRL logs as 'kl' and which a batch alone does not tell."
            )
        if "label" not in numbers:
            raise InputError("KTO needs examples with a 'label': 1 or true for a good completion, and 0 for a bad one.")
        point = numbers["kl"].to(score) if self.kl is None else self.kl
        return (2 * numbers["label"].to(score) - 1) * self.beta * (score - point)

    def costs(self, completions: Completions, numbers: Numbers) -> Tensor:
        costs, good = (-self.margins(completions, numbers)).sigmoid(), numbers["label"]
        return (good * self.desirable_weight + (1 - good) * self.undesirable_weight).to(costs) * costs

    def drawn(self, completions: Completions, numbers: Numbers, sampler: Sampler) -> Tensor:
        raise InputError(
            "KTO's loss is no logarithm of a probability, so that no targets can be drawn from the model for the "
            "Fisher information. Fit with the dataset's own, such as wf.EKFAC(empirical=True)."
        )


def _log_of_rest(logarithms: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact for small and for large x (Maechler 2012, equation 7); finite for 0."""
    near = logarithms > -math.log(2)
    safe = logarithms.clamp_max(-torch.finfo(logarithms.dtype).tiny)
    # Of both branches, the one that is not taken must have a finite gradient too.
    one = torch.where(near, safe, -1.0)
    other = torch.where(near, -1.0, safe)
    return torch.where(near, (-torch.expm1(one)).log(), torch.log1p(-other.exp()))
