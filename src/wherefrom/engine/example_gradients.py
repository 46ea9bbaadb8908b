"""Each example's gradient of a layer's weight, as it is or in other coordinates: conditioned, and in a basis.

This module is tensor algebra on captured tensors; it does not know where bases and conditioning come from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wherefrom.engine.capture import Captured
from wherefrom.runtime.memory import Workspace
from wherefrom.runtime.precision import product, rotated


class GradientTransform(NamedTuple):
    """What turns gradients into other coordinates, Q_S^T (scaling * G) Q_A; None is nothing.

    Attributes:
        gradient_basis: Q_S [out, out], orthogonal.
        activation_basis: Q_A [width, width], orthogonal.
        scaling: P^(1/2) [out, width] of a conditioning, element by element.
    """

    gradient_basis: Tensor | None = None
    activation_basis: Tensor | None = None
    scaling: Tensor | None = None

    def on(self, device: torch.device) -> GradientTransform:
        """All of it on a device."""
        return GradientTransform(*(None if each is None else each.to(device, non_blocking=True) for each in self))


def weight_gradients(
    captured: Captured,
    transform: GradientTransform | None = None,
    workspace: Workspace | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each example's gradient of a layer's weight, Q_S^T (scaling * G) Q_A with G = s^T a: [batch, out, width].

    The bias is a column of it, `TrackedLayer.shape[1] - 1`; columns past that are zero. Of a one-hot layer, only
    `Captured.columns` are there.

    Args:
        transform: for gradients in other coordinates; None leaves them.
        workspace: where the result is put; it is good until the next call with the same one.
        dtype: of the result; float32 or wider by default.
    """
    activations, gradients = captured.activations, captured.gradients
    gradient_basis, activation_basis, scaling = (transform or GradientTransform()).on(gradients.device)
    tokens, width, outputs = activations.shape[1], activations.shape[2], gradients.shape[2]
    # Rotated are the tokens' vectors or their product, whichever are fewer vectors. Products rounded to bfloat16 must
    # not be rotated, since their rounding errors would be rotated with them. What is conditioned is the product.
    half = gradients.dtype == torch.bfloat16
    if scaling is None and gradient_basis is not None and (half or tokens < width):
        gradients, gradient_basis = rotated(gradients, gradient_basis), None
    if scaling is None and activation_basis is not None and (half or tokens < outputs):
        activations, activation_basis = rotated(activations, activation_basis), None
    transposed = gradients.transpose(1, 2)
    if workspace is None or half:
        result = product(transposed, activations, dtype if half and scaling is None else None)
    else:
        result = torch.bmm(transposed, activations, out=workspace.empty((len(gradients), outputs, width), gradients))
    if scaling is not None:
        result *= captured.selected(scaling)
    if gradient_basis is not None:
        result = gradient_basis.T @ result
    if activation_basis is not None:
        result = result @ activation_basis
    return result if dtype is None else result.to(dtype)


def transformed_back(captured: Captured, transform: GradientTransform, gradients: Tensor) -> Tensor:
    """scaling * (Q_S G Q_A^T) for gradients [batch, out, width] of what was captured: out of the filter's coordinates.

    Of what was captured in bfloat16, gradients are rounded to it before each rotation, and come back in it unless there
    is a scaling. In the filter's coordinates, that moves every number by a part of itself; what is rounded after a
    rotation, as a bank of them is, moves small ones by a part of the large ones that they are mixed with.
    """
    gradient_basis, activation_basis, scaling = transform.on(gradients.device)
    half = captured.gradients.dtype == torch.bfloat16
    if half:
        gradients = gradients.bfloat16()
    if gradient_basis is not None:
        gradients = rotated(gradients.mT, gradient_basis.T).mT if half else gradient_basis @ gradients
    if activation_basis is not None:
        gradients = rotated(gradients, activation_basis.T)
    return gradients if scaling is None else gradients * captured.selected(scaling)
