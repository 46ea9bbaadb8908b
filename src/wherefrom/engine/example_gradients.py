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


class Sides(NamedTuple):
    """What turns gradients into other coordinates, left^T (roots * G) right; None is nothing.

    Attributes:
        left: [out, out], orthogonal.
        right: [width, width], orthogonal.
        roots: P^(1/2) [out, width] of a conditioning, element by element.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    roots: Tensor | None = None

    def on(self, device: torch.device) -> Sides:
        """All of it on a device."""
        return Sides(*(None if each is None else each.to(device, non_blocking=True) for each in self))


def weight_gradients(
    captured: Captured, sides: Sides | None = None, workspace: Workspace | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Each example's gradient of a layer's weight, left^T (roots * G) right with G = s^T a: [batch, out, width].

    The bias is a column of it, `TrackedLayer.shape[1] - 1`; columns past that are zero. Of a one-hot layer, only
    `Captured.columns` are there.

    Args:
        sides: for gradients in other coordinates; None leaves them.
        workspace: where the result is put; it is good until the next call with the same one.
        dtype: of the result; float32 or wider by default.
    """
    activations, gradients = captured.activations, captured.gradients
    left, right, roots = (sides or Sides()).on(gradients.device)
    tokens, width, outputs = activations.shape[1], activations.shape[2], gradients.shape[2]
    # Each side is rotated where it has fewer rows: token by token, or in the product. Products rounded to bfloat16
    # must not be rotated, since their rounding errors would be rotated with them. What is conditioned is the product.
    half = gradients.dtype == torch.bfloat16
    if roots is None and left is not None and (half or tokens < width):
        gradients, left = rotated(gradients, left), None
    if roots is None and right is not None and (half or tokens < outputs):
        activations, right = rotated(activations, right), None
    transposed = gradients.transpose(1, 2)
    if workspace is None or half:
        result = product(transposed, activations, dtype if half and roots is None else None)
    else:
        result = torch.bmm(transposed, activations, out=workspace.empty((len(gradients), outputs, width), gradients))
    if roots is not None:
        result *= captured.selected(roots)
    if left is not None:
        result = left.T @ result
    if right is not None:
        result = result @ right
    return result if dtype is None else result.to(dtype)


def brought_back(captured: Captured, sides: Sides, gradients: Tensor) -> Tensor:
    """roots * (left G right^T) for gradients [batch, out, width] of what was captured: to where filters are not.

    Of what was captured in bfloat16, gradients are rounded to it before each rotation, and come back in it unless there
    are roots. Where the filter is, that moves every number by a part of itself; what is rounded after a rotation, as a
    bank of them is, moves small ones by a part of the large ones that they are mixed with.
    """
    left, right, roots = sides.on(gradients.device)
    half = captured.gradients.dtype == torch.bfloat16
    if half:
        gradients = gradients.bfloat16()
    if left is not None:
        gradients = rotated(gradients.transpose(1, 2), left.T).transpose(1, 2) if half else left @ gradients
    if right is not None:
        gradients = rotated(gradients, right.T)
    return gradients if roots is None else gradients * captured.selected(roots)
