"""The softmax of many classes from one read of the logits, which are the largest tensors of a language model's pass.

Losses and random draws need, of each position, no more than its maximum, its sum of exponentials and the probabilities
of some hundred blocks of classes. The positions are walked over in chunks: on a CPU, what a chunk needs beyond its
logits stays in a cache; on a GPU, each chunk is one compiled kernel. This module knows nothing of labels or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.runtime.compiling import CompiledOnGPU
from wherefrom.runtime.precision import widened

# A chunk of logits in float32: on a CPU one that stays with its exponentials in its caches, for each thread; elsewhere
# one so large that starting its kernels takes no time to speak of, and far below the 2**31 numbers that kernels count
# with 32 bits.
_CHUNK_BYTES_PER_THREAD = 2**20
_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class SoftmaxStatistics:
    """What a pass over logits [positions, classes] leaves, in float32 or wider.

    Attributes:
        maximum: the highest logit of each position, [positions, 1].
        total: the sum of exp(logits - maximum), [positions, 1]. That it is kept apart from the maximum, rather than
            as one logarithm, keeps probabilities exact where logits are large.
        blocks: the probability of each run of `block_size` classes, [positions, blocks]; the last may be shorter.
        block_size: a power of two, about the square root of the number of classes.
    """

    maximum: Tensor
    total: Tensor
    blocks: Tensor
    block_size: int


def softmax_statistics(logits: Tensor) -> SoftmaxStatistics:
    """Read the logits [positions, classes] once; no gradient flows through the result."""
    size = 1 << tree_depth(logits.shape[1]) // 2
    with torch.no_grad():
        parts = [_block_sums(chunk, size) for chunk in logits.split(positions_at_once(logits))]
        maxima, sums = (torch.cat(each) for each in zip(*parts, strict=True))
        maximum = maxima.amax(1, keepdim=True)
        sums = sums * (maxima - maximum).exp()
        total = sums.sum(1, keepdim=True)
        return SoftmaxStatistics(maximum, total, sums / total, size)


def tree_depth(classes: int) -> int:
    """The levels of a binary tree with so many leaves; at least one."""
    return max(1, (classes - 1).bit_length())


def positions_at_once(logits: Tensor) -> int:
    """How many positions of `logits` [positions, classes] make a chunk; at least one.

    No result may depend on it: whatever is computed chunk by chunk treats each position by itself.
    """
    on_cpu = logits.device.type == "cpu"
    chunk_bytes = _CHUNK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _CHUNK_BYTES
    count = chunk_bytes // max(1, logits.shape[-1] * torch.promote_types(logits.dtype, torch.float32).itemsize)
    # In groups of 16, so that each chunk starts at an address that compiled kernels can read from without a copy.
    return max(1, count if on_cpu else count // 16 * 16)


@CompiledOnGPU
def _block_sums(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The maximum of each run of `size` classes, and the sum of exp(logits - maximum): twice [positions, blocks].

    A run is so short that a kernel needs to read it from memory once for both.
    """
    wide, whole = widened(logits), logits.shape[1] // size * size
    views = (wide[:, :whole].unflatten(1, (-1, size)), wide[:, whole:].unsqueeze(1))  # whole runs, and the rest
    runs = [view for view in views if view.shape[1:].numel()]
    # Exponentials of logits that are all minus infinity are 0, and would not be less an infinite maximum.
    maxima = [run.amax(2).clamp_min(torch.finfo(wide.dtype).min) for run in runs]
    sums = [(run - maximum.unsqueeze(2)).exp_().sum(2) for run, maximum in zip(runs, maxima, strict=True)]
    return torch.cat(maxima, 1), torch.cat(sums, 1)
