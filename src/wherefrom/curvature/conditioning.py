"""Conditioning: the coordinates in which a preconditioned optimizer descends as gradient descent does.

With steps -eta P g, where P is a positive number for each weight (Adam's is 1 / (sqrt(v_hat) + eps)), training moves
w = P^(-1/2) theta by -eta P^(1/2) g: by gradient descent, on gradients P^(1/2) * g and the curvature of those. Whatever
is a filter of curvature is one there, and stands between P^(1/2) and P^(1/2) outside: for the inverse,
P^(1/2) (P^(1/2) H P^(1/2) + damping)^-1 P^(1/2) = (H + damping P^-1)^-1. This module lays P out as layers have it; it
knows neither optimizers nor what is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import tensors_digest
from wherefrom.engine.layers import TrackedLayer
from wherefrom.engine.sweep import Sweep
from wherefrom.tasks.task import Batch

Conditioning = Mapping[str, Tensor]
"""P by the names of a model's parameters, in their shapes; above 0. A tied one is there under any of its names."""


def conditioning_roots(sweep: Sweep[Batch], conditioning: Conditioning) -> dict[str, Tensor]:
    """P^(1/2) of every layer, laid out as its gradient matrix [out, in (+1)].

    Raises:
        InputError: a parameter that a layer uses is not there, or has another shape, or numbers that are not above 0.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in sweep.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def given(layer: TrackedLayer, parameter: Tensor) -> Tensor:
        own = names.get(id(parameter), [])
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
        return found.to(sweep.factors_device, sweep.dtype)

    found = {}
    for name, layer in sweep.layers.items():
        weight, bias = layer.parameters
        matrix = layer.matrix(given(layer, weight), None if bias is None else given(layer, bias))
        found[name] = matrix.sqrt().contiguous()
    return found


def conditioning_digest(roots: Mapping[str, Tensor]) -> dict[str, str]:
    """What a fingerprint says of a conditioning; nothing without one."""
    return {"conditioning": tensors_digest(roots)[:16]} if roots else {}
