"""From eigenvalues to the filter that preconditions: damped inverses, pseudo-inverses, and what cannot be inverted.

This module knows eigenvalues and covariances of layers; it knows nothing of gradients, bases or strategies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wherefrom.runtime.errors import LossError
from wherefrom.runtime.precision import type_name

logger = logging.getLogger("wherefrom")

# Grosse et al. 2023, section 3.2: the damping is this part of a layer's mean eigenvalue.
DAMPING_SHARE = 0.1


class Spectrum(NamedTuple):
    """Of one Kronecker factor of a layer.

    Attributes:
        eigenvalues: of its covariance, [size].
        computed: whether its eigenvectors were, and have rounding errors; otherwise they are the axes.
    """

    eigenvalues: Tensor
    computed: bool


def damped_inverse(eigenvalues: Tensor, damping: float | None, spectra: Sequence[Spectrum]) -> Tensor:
    """f(Lambda) [out, in]: 1 / (Lambda + damping), or for a damping of 0 the Moore-Penrose pseudo-inverse.

    Args:
        eigenvalues: Lambda [out, in].
        damping: None for `DAMPING_SHARE` of their mean.
        spectra: of the gradient and of the activation factor; none where there is no basis.
    """
    if damping == 0:
        return _pseudo_inverse(eigenvalues, spectra)
    damped = eigenvalues + added_damping(eigenvalues, damping)
    return torch.where(damped > 0, damped.reciprocal(), 0.0)  # not above 0: the layer has no curvature at all


def added_damping(eigenvalues: Tensor, damping: float | None) -> float:
    """What is added to a layer's eigenvalues: the damping, or for None `DAMPING_SHARE` of their mean."""
    return DAMPING_SHARE * float(eigenvalues.mean(dtype=torch.float64)) if damping is None else damping


def _pseudo_inverse(eigenvalues: Tensor, spectra: Sequence[Spectrum]) -> Tensor:
    """1 / Lambda, and 0 in directions whose eigenvalue is 0 but for rounding.

    The cut-off is that of `torch.linalg.pinv`, epsilon x size: of a covariance that was decomposed, relative to its
    largest eigenvalue. A Lambda is a mean of squares, so there it is relative to the largest root mean square.
    Axes are exact: theirs is 0 only when it is.
    """
    limits = torch.finfo(eigenvalues.dtype)
    relative, counted = limits.eps**2, torch.ones_like(eigenvalues, dtype=torch.bool)
    for axis, (values, computed) in enumerate(spectra):
        size = len(values) if computed else 0
        counted &= (values > limits.eps * size * values.max()).unsqueeze(1 - axis)
        relative *= max(size, 1)
    counted &= eigenvalues > max(relative * float(eigenvalues.max()), limits.tiny)
    return torch.where(counted, eigenvalues.reciprocal(), 0.0)


def check_eigenvalues(layer: str, eigenvalues: Tensor, spectra: Sequence[Spectrum], product: bool) -> None:
    """Refuse eigenvalues that have overflowed, or vanished although gradients are there.

    Args:
        product: whether they are the factors' multiplied.

    Raises:
        LossError: names the layer.
    """
    largest = float(eigenvalues.max())
    reach = [float(values.max()) for values, _ in spectra]
    if product:
        largest = math.prod(reach)  # in float64, where it does not vanish
    elif largest > 0 and 0 in reach:
        largest = 0.1 * torch.finfo(eigenvalues.dtype).tiny  # of the factor whose squares have vanished
    _check_range(layer, "eigenvalues", largest, eigenvalues.dtype)


def check_covariances(covariances: Mapping[str, Tensor]) -> None:
    """Refuse covariances `LAYER.FACTOR`, or diagonals of them, that have vanished or overflowed.

    Raises:
        LossError: names the layer and the factor.
    """
    for name, each in covariances.items():
        layer, _, factor = name.rpartition(".")
        diagonal = each if each.dim() == 1 else each.diagonal()
        _check_range(layer, f"mean squared {factor}", float(diagonal.max()), each.dtype)


def check_mean_squares(eigenvalues: Mapping[str, Tensor]) -> None:
    """Refuse mean squared gradients that have vanished or overflowed, and log the layers that have none.

    Raises:
        LossError: names the layer.
    """
    largest = {name: float(values.max()) for name, values in eigenvalues.items()}
    for name, value in largest.items():
        _check_range(name, "mean squared gradients", value, eigenvalues[name].dtype)
    flat = [name for name, value in largest.items() if value == 0]
    if flat:
        logger.warning(
            f"{len(flat)} layer(s) have no gradient in any training example, and no part in scores: "
            f"{', '.join(flat[:5])}. If that is not so, gradients or their squares are too small for the model's "
            "type: load it in float64 (a float16 model in bfloat16), or scale the loss up."
        )


def _check_range(layer: str, what: str, largest: float, dtype: torch.dtype) -> None:
    """Refuse squares whose largest a type cannot hold with all of its digits; exact 0 is a layer without gradients.

    Raises:
        LossError: names the layer.
    """
    limits = torch.finfo(dtype)
    if largest == 0 or limits.tiny / limits.eps <= largest <= limits.max:
        return
    small = largest < 1
    raise LossError(
        f"Layer {layer!r}: its {what} reach {largest:.3g}, which is too {'small' if small else 'large'} for "
        f"{type_name(dtype)} to hold with all digits. Scale the loss {'up' if small else 'down'}, or "
        "load the model in float64 (model.double())."
    )
