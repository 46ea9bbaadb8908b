"""The retrainings that methods are held against, as training functions of `wherefrom.evaluate.retrain`.

Protocol A (Bae et al. 2024): fine-tuned on a half of the training set, with several seeds. Protocol B (Ilyas & Engstrom
2025): the very training of the model, same seed and batches, with the losses of some examples left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import wherefrom as wf
from leaderboard.setting import Setting
from wherefrom.evaluate.removal import removal_masks
from wherefrom.evaluate.retrain import Retraining, half_subsets, permutation, retrain, retrain_pairs
from wherefrom.evaluate.retrainings import GroundTruth


@dataclass(frozen=True)
class OnHalves:
    """Each query's summed loss after training on the kept examples alone."""

    setting: Setting

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        """[retrainings, queries]."""
        trained = (self.setting.training(each.subset, each.seed) for each in retrainings)
        return torch.stack([_measured(training, training.parameters(), self.setting) for training in trained])


@dataclass(frozen=True)
class WithoutSome:
    """Each query's summed loss after the same training, in which the examples that are not kept have the weight 0."""

    setting: Setting

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        """[retrainings, queries]."""
        found = []
        for each in retrainings:
            training = self.setting.training(seed=each.seed)
            weights = torch.zeros(len(training.train))
            weights[list(each.subset)] = 1
            found.append(_measured(training, training.parameters(weights), self.setting))
        return torch.stack(found)


@torch.no_grad()
def _measured(training: wf.ReplayableTraining[dict[str, Tensor]], parameters: Tensor, setting: Setting) -> Tensor:
    return training.measurements(parameters, setting.queries)


def removals(train: int, count: int, share: float) -> Tensor:
    """Random subsets that leave out `share` of the examples, rounded: bool [count, train], true where one is kept."""
    masks = torch.ones(count, train, dtype=torch.bool)
    for subset in range(count):
        masks[subset, permutation(train, f"removal/{subset}")[: round(share * train)]] = False
    return masks


def protocol_a(setting: Setting, run_dir: Path, masks: int, repeats: int, workers: int) -> GroundTruth:
    """Random halves with several seeds; goes on where it was."""
    return retrain(
        run_dir / "halves", OnHalves(setting), half_subsets(len(setting.train), masks),
        range(setting.seed + 1, setting.seed + repeats + 1), fingerprint=setting.fingerprint(), workers=workers,
    )  # fmt: skip


def protocol_b(setting: Setting, run_dir: Path, masks: int, share: float, workers: int) -> tuple[GroundTruth, Tensor]:
    """The model's own training without a random `share` of the examples; goes on where it was.

    Returns:
        That, and each query's summed loss after the training with all of them, [queries].
    """
    train = len(setting.train)
    subsets = torch.cat([removals(train, masks, share), torch.ones(1, train, dtype=torch.bool)])
    found = retrain(
        run_dir / "removals", WithoutSome(setting), subsets, [setting.seed], fingerprint=setting.fingerprint(),
        workers=workers,
    )  # fmt: skip
    return GroundTruth(found.masks[:-1], found.losses[:-1]), found.losses[-1, 0]


def without_top(
    setting: Setting, run_dir: Path, scores: Mapping[str, Tensor], share: float, queries: int, workers: int
) -> dict[str, Tensor]:
    """By how much each of the first queries' losses rises per token without the `share` that a method puts on top.

    Returns:
        By method, [queries], in nats a token.
    """
    count = round(share * len(setting.train))
    whole = torch.ones(1, len(setting.train), dtype=torch.bool)
    masks = [removal_masks(values, [count], [query]) for values in scores.values() for query in range(queries)]
    losses = retrain_pairs(
        run_dir / "removals", WithoutSome(setting), torch.cat([whole, *masks]),
        [(row, setting.seed) for row in range(1 + len(masks))], fingerprint=setting.fingerprint(), workers=workers,
    )  # fmt: skip
    rises = (losses[1:] - losses[0]).view(len(scores), queries, -1) / setting.query_tokens
    return {name: found.diagonal() for name, found in zip(scores, rises, strict=True)}
