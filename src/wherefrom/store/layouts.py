"""What a stored result must hold: names, types and shapes of its tensors.

A digest tells that a file is what was written; this tells that it is what will be read. This module knows tensors and
their files' names; it does not know what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.runtime.errors import DamagedError
from wherefrom.runtime.precision import type_name

Layout = Mapping[str, tuple[torch.dtype | None, tuple[int | str, ...]]]
"""By name: the type, None for float32 or float64, and the shape; equal words in shapes stand for equal sizes."""

_FLOATS = (torch.float32, torch.float64)


def check_layout(path: Path, tensors: Mapping[str, Tensor], required: Layout, optional: Layout | None = None) -> None:
    """Refuse tensors that are not those of a result.

    Raises:
        DamagedError: one is missing, unknown, or of another type or shape; it is named.
    """
    known = {**required, **(optional or {})}
    sizes: dict[str, int] = {}
    for name in sorted({*required, *tensors}):
        if name not in tensors or name not in known:
            problem = "is missing" if name not in tensors else "is not expected"
            raise DamagedError(f"{path} cannot be used: {name!r} {problem}. Delete it, and compute it again.")
        tensor, (dtype, shape) = tensors[name], known[name]
        pairs = zip(shape, tensor.shape, strict=False)  # their number is compared below
        expected = [sizes.setdefault(size, found) if isinstance(size, str) else size for size, found in pairs]
        right_type = tensor.dtype in _FLOATS if dtype is None else tensor.dtype == dtype
        if not right_type or len(shape) != tensor.dim() or expected != list(tensor.shape):
            wanted = "float" if dtype is None else type_name(dtype)
            raise DamagedError(
                f"{path} cannot be used: {name!r} is {type_name(tensor.dtype)} {list(tensor.shape)}, "
                f"expected {wanted} [{', '.join(map(str, shape))}]. Delete it, and compute it again."
            )
