"""Adam's own preconditioner as factors: made from a recorded checkpoint, without a sweep.

This module is above `study`; it knows what a recording holds, and nothing of how it came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from wherefrom.checkpoints import read_weights
from wherefrom.curvature import Factors
from wherefrom.errors import InputError
from wherefrom.fingerprint import tensors_digest
from wherefrom.layers import TrackedLayer
from wherefrom.study import Study
from wherefrom.task import Batch

if TYPE_CHECKING:
    from wherefrom.recording import RecordedCheckpoint


def adam_factors(study: Study[Batch], checkpoint: RecordedCheckpoint) -> Factors:
    """Factors of the strategy "adam", whose preconditioner is what Adam multiplies a step's mean gradient with.

    `f = 1 / (sqrt(v_hat) + eps)` for each weight, with `v_hat = v / (1 - beta2^step)` (Kingma & Ba 2015, algorithm 1),
    so that a score is the product of two gradients in Adam's geometry. Unlike others, these factors are used without
    further damping unless one is given. Lambda is a root of mean squares of batches' mean gradients: its scale is
    another than that of fitted strategies.

    Args:
        study: of a model whose parameters have the names that they had in training.
        checkpoint: of an Adam or AdamW run, as `read_recording` returns it, whose second moments were recorded and
            whose steps are those of one optimizer from its start.

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
    moments = read_weights(checkpoint.second_moments)
    sweep, correction = study._sweep, 1 - beta**checkpoint.step
    names = _names(sweep.model)
    eigenvalues = {}
    for name, layer in study.layers.items():
        matrix = _matrix(layer, moments, names, checkpoint).to(sweep.factors_device, sweep.dtype)
        eigenvalues[name] = (matrix / correction).sqrt() + eps
    fingerprint = study._fingerprint()
    fingerprint["targets"] = f"none: {checkpoint.optimizer}'s second moments, {tensors_digest(moments)[:16]}"
    fingerprint["targets"] += f", at step {checkpoint.step} with beta2 {beta!r} and eps {eps!r}"
    fingerprint["precision"] = "as recorded"
    return Factors("adam", fingerprint, {}, eigenvalues)


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


def _names(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its identity: a tied one has several, and was recorded under one of them."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _matrix(
    layer: TrackedLayer, moments: Mapping[str, Tensor], names: Mapping[int, list[str]], checkpoint: RecordedCheckpoint
) -> Tensor:
    """The moments of a layer's weights, laid out as its gradient matrix [out, in (+ 1)]."""

    def recorded(parameter: Tensor) -> Tensor:
        candidates = names.get(id(parameter), [])
        found = next((moments[name] for name in candidates if name in moments), None)
        if found is None or found.shape != parameter.shape:
            raise InputError(
                f"{checkpoint.second_moments}: has no moments of {' or '.join(candidates) or 'a computed weight'} "
                f"{list(parameter.shape)}, which layer {layer.name!r} uses. Track trained layers only, with "
                "`layers=[...]`, and give the study the model that was trained."
            )
        return found

    weight, bias = layer.parameters
    return layer.matrix(recorded(weight), None if bias is None else recorded(bias))
