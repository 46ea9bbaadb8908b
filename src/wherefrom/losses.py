"""Cross-entropy of many classes without copies of the logits, which are the largest tensors of a language model's pass.

The positions are walked over in chunks: what a chunk needs beyond its logits stays in a CPU's cache and takes little of
a GPU's memory. This module knows logits and labels, nothing of models or batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.errors import InputError
from wherefrom.precision import widened

IGNORED = -100  # the label that cross-entropy leaves out, as in Hugging Face models

# A chunk of logits in float32: on a CPU one that stays in its caches, for each thread; elsewhere one so large
# that starting its kernels takes no time to speak of.
_CHUNK_BYTES_PER_THREAD = 2**21
_CHUNK_BYTES = 2**26


def rows_at_once(logits: Tensor) -> int:
    """How many rows of `logits` [positions, classes] make a chunk; at least one.

    No result may depend on it: whatever is computed chunk by chunk treats each row by itself.
    """
    on_cpu = logits.device.type == "cpu"
    chunk_bytes = _CHUNK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _CHUNK_BYTES
    row_bytes = logits.shape[-1] * torch.promote_types(logits.dtype, torch.float32).itemsize
    return max(1, chunk_bytes // max(1, row_bytes))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over all positions whose label is not `IGNORED`: a scalar, in float32 or wider.

    Its gradient is as exact and as often differentiable as that of `functional.cross_entropy`, and comes in the logits'
    own type.

    Args:
        logits: unnormalised log-probabilities, [..., classes].
        labels: int64 [...].

    Raises:
        InputError: the shapes do not belong together.
    """
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"Cross-entropy of logits {list(logits.shape)} and labels {list(labels.shape)}: expected one label for "
            f"each row of logits, {list(logits.shape[:-1])}. Reshape one of them."
        )
    costs: Tensor = _CrossEntropy.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))  # type: ignore[no-untyped-call]
    return costs.sum()


class _CrossEntropy(torch.autograd.Function):
    """Logits [positions, classes] and labels [positions] -> cross-entropy [positions], 0 where a label is ignored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        size = rows_at_once(logits)
        return torch.cat(
            [
                functional.cross_entropy(widened(rows), chosen, ignore_index=IGNORED, reduction="none")
                for rows, chosen in zip(logits.split(size), labels.split(size), strict=True)
            ]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        slopes = _slopes(logits, labels, grad_output)
        # Going back through each write into place copies the whole tensor, so what is differentiated again is joined.
        return (torch.cat(list(slopes)) if torch.is_grad_enabled() else _filled(slopes, logits.shape)), None


def _slopes(logits: Tensor, labels: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """The gradient by the logits, chunk by chunk: (softmax - one-hot) times `weights` [positions], in their type."""
    size = rows_at_once(logits)
    ignored = (labels == IGNORED).unsqueeze(1)
    weights = weights.unsqueeze(1).masked_fill(ignored, 0)
    chosen = labels.unsqueeze(1).masked_fill(ignored, 0)
    parts = (each.split(size) for each in (logits, weights, chosen, ignored))
    for rows, weight, index, left_out in zip(*parts, strict=True):
        slope = (widened(rows).softmax(1) * weight).masked_fill_(left_out, 0)  # also where logits are NaN
        yield slope.scatter_add_(1, index, -weight).to(logits.dtype)


def _filled(chunks: Iterator[Tensor], shape: torch.Size) -> Tensor:
    """The chunks one below the other in one tensor, without holding all of them at once."""
    first = next(chunks)
    filled = first.new_empty(shape)  # of a chunk rather than of the logits, so that vmap knows that it is batched
    filled[: len(first)] = first
    start = len(first)
    for chunk in chunks:
        filled[start : start + len(chunk)] = chunk
        start += len(chunk)
    return filled
