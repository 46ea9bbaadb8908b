"""What Adam multiplies gradients with, from a recorded checkpoint.

This module knows what a recording holds, and nothing of how it came about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from wherefrom.methods.tracin import read_weights
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.precision import widened

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


def adam_conditioning(checkpoint: RecordedCheckpoint) -> dict[str, Tensor]:
    """P = 1 / (sqrt(v_hat) + eps) with v_hat = v / (1 - beta2^step), for each weight by the name of its parameter.

    Kingma & Ba 2015, algorithm 1: a step moves weights by -eta P times the running mean of gradients. Give it to
    `Study.fit` as its `conditioning`.

    Args:
        checkpoint: of an Adam or AdamW run, as `read_recording` returns it or as you make it, whose second moments v
            are there and whose steps are those of one optimizer from its start.

    Raises:
        InputError: the moments or settings that this needs were not recorded, or groups of parameters differ in them.
        DamagedError: the moments cannot be read.
    """
    beta, eps = _settings(checkpoint)
    if checkpoint.second_moments is None:
        raise InputError(
            f"{checkpoint.path}: no second moments were recorded there, by {checkpoint.optimizer}. Expected a training "
            "with Adam or AdamW, unsharded or sharded by FSDP2."
        )
    correction = 1 - beta**checkpoint.step
    moments = read_weights(checkpoint.second_moments)
    return {name: 1 / ((widened(each) / correction).sqrt() + eps) for name, each in moments.items()}


def _settings(checkpoint: RecordedCheckpoint) -> tuple[float, float]:
    """beta2 and eps, which all groups of parameters have in common: the recording does not say which group is whose."""
    found = {(group.betas and group.betas[1], group.eps) for group in checkpoint.groups}
    beta, eps = next(iter(found)) if len(found) == 1 else (None, None)
    if beta is None or eps is None:
        raise InputError(
            f"{checkpoint.path}: its groups of parameters have the (beta2, eps) {sorted(found, key=repr)}; expected "
            "numbers, the same for all groups, as AdamW has them."
        )
    return beta, eps
