"""Conditioning: the coordinates in which a preconditioned optimizer descends as gradient descent does.

With steps -eta P g, where P is a positive number for each weight (Adam's is 1 / (sqrt(v_hat) + eps)), training moves
w = P^(-1/2) theta by -eta P^(1/2) g: by gradient descent, on gradients P^(1/2) * g and the curvature of those. Whatever
is a filter of curvature is one there, and stands between P^(1/2) and P^(1/2) outside: for the inverse,
P^(1/2) (P^(1/2) H P^(1/2) + damping)^-1 P^(1/2) = (H + damping P^-1)^-1. This module lays P out as layers have it; it
knows neither optimizers nor what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from wherefrom.engine.modules.layers import TrackedLayer
from wherefrom.engine.modules.linear_map import Part
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.precision import widened
from wherefrom.store.fingerprint import tensors_digest
from wherefrom.store.weights import read_weights
from wherefrom.tasks.task import Batch

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint

Conditioning = Mapping[str, Tensor]
"""P by the names of a model's parameters, in their shapes; above 0. A tied one is there under any of its names."""


def conditioning_scaling(sweep: Sweep[Batch], conditioning: Conditioning) -> dict[str, Tensor]:
    """P^(1/2) of every layer, laid out as its gradient matrix [out, in (+1)].

    Raises:
        InputError: a parameter that a layer uses is not there, or has another shape, or numbers that are not above 0.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in sweep.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def given(layer: TrackedLayer, part: Part) -> Tensor:
        parameter, own = part.parameter, names.get(id(part.parameter), [])
        found = next((conditioning[name] for name in own if name in conditioning), None)
        if found is None or found.shape != parameter.shape:
            raise InputError(
                f"conditioning: has nothing for {' or '.join(own) or 'a computed weight'} {list(parameter.shape)}, "
                f"which layer {layer.name!r} uses. Track trained layers only, with `layers=[...]`, and give the study "
                "the model that was trained."
            )
        if not bool(((found > 0) & found.isfinite()).all()):
            raise InputError(
                f"conditioning: numbers of {own[0]} reach from {float(found.min()):.3g} to {float(found.max()):.3g}; "
                "expected finite numbers above 0, what a step multiplies gradients with."
            )
        return part.of(found).to(sweep.factors_device, sweep.dtype)

    found = {}
    for name, layer in sweep.layers.items():
        matrix = layer.to_matrices(*(given(layer, each).unsqueeze(0) for each in layer.parts)).squeeze(0)
        found[name] = matrix.sqrt().contiguous()
    return found


def conditioning_digest(scaling: Mapping[str, Tensor]) -> dict[str, str]:
    """What a fingerprint says of a conditioning; nothing without one."""
    return {"conditioning": tensors_digest(scaling)[:16]} if scaling else {}


def adam_conditioning(checkpoint: RecordedCheckpoint, inside: bool = False) -> dict[str, Tensor]:
    """P = 1 / (sqrt(v_hat) + eps) with v_hat = v / (1 - beta2^step), for each weight by the name of its parameter.

    Kingma & Ba 2015, algorithm 1: a step moves weights by -eta P times the running mean of gradients. Give it to
    `Study.fit` as its `conditioning`.

    Args:
        checkpoint: of an Adam or AdamW run, as `read_recording` returns it or as you make it, whose second moments v
            are there and whose steps are those of one optimizer from its start.
        inside: eps is inside of the root, 1 / sqrt(v_hat + eps^2), as `TrainingRecipe` has it.

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
    squares = {name: widened(each) / correction for name, each in moments.items()}
    return {name: 1 / ((each + eps**2).sqrt() if inside else each.sqrt() + eps) for name, each in squares.items()}


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
