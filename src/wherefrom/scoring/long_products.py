"""Products of few rows and columns over very long sums, such as those of resident with training gradients.

A GPU computes a product tile by tile, and one of 481 x 64 numbers has four tiles for more than a hundred units, however
many millions of products each number sums. Cut along the sum, it is a batch of products that fill the device. This
module is tensor algebra; it does not know what is multiplied.
"""

from __future__ import annotations

from torch import Tensor

from wherefrom.runtime.precision import product

# Rows and columns of a tile; tiles that fill a GPU, which has 108 (A100) to 132 (H100, H200) units; and a sum that is
# worth a tile of its own.
_TILE, _TILES, _SHORTEST = 128, 128, 4096
# Matrix units read 16 bytes at a time.
_ALIGNMENT = 8


def long_product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, k] times right^T, of right [m, k], summed in float32 or wider: [n, m]."""
    parts = parts_of_sum(len(left), len(right), left.shape[1]) if left.is_cuda else 1
    return split_product(left, right, parts)


def split_product(left: Tensor, right: Tensor, parts: int) -> Tensor:
    """The same as so many products over equal parts of the sum, which are then added up."""
    if parts == 1:
        return product(left, right.T)
    some = product(left.unflatten(1, (parts, -1)).transpose(0, 1), right.unflatten(1, (parts, -1)).permute(1, 2, 0))
    return some.sum(0)


def parts_of_sum(rows: int, columns: int, length: int) -> int:
    """Into how many equal, aligned parts a sum is cut so that the device is filled; 1 where it is anyway."""
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    most = min(_TILES // tiles, length // _SHORTEST)
    return next((parts for parts in range(most, 1, -1) if length % (parts * _ALIGNMENT) == 0), 1)
