"""Cross-entropy of many classes without copies of the logits, which are the largest tensors of a language model's pass.

The logits are read once for the loss and for targets drawn from them, and once for the gradient. This module knows
logits and labels, nothing of models or batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.runtime.compiling import CompiledOnGPU
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.precision import widened
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.softmax import SoftmaxStatistics, positions_at_once, softmax_statistics

IGNORED = -100  # the label that cross-entropy leaves out, as in Hugging Face models


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
    flat = logits.reshape(-1, logits.shape[-1])
    return _summed(flat, labels.reshape(-1), softmax_statistics(flat.detach()))


def drawn_cross_entropy(logits: Tensor, counted: Tensor, sampler: Sampler) -> Tensor:
    """`summed_cross_entropy` of labels that `sampler` draws from the logits themselves, by one read of them for both.

    Args:
        logits: unnormalised log-probabilities, [batch, ..., classes].
        counted: boolean [batch, ...]; other positions are left out, and use up no random numbers.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    statistics = softmax_statistics(flat.detach())
    drawn = sampler.categorical(logits.detach(), counted, statistics)
    return _summed(flat, drawn.masked_fill(~counted, IGNORED).reshape(-1), statistics)


def _summed(logits: Tensor, labels: Tensor, statistics: SoftmaxStatistics) -> Tensor:
    costs: Tensor = _CrossEntropy.apply(logits, labels, statistics.maximum, statistics.total)  # type: ignore[no-untyped-call]
    return costs.sum()


class _CrossEntropy(torch.autograd.Function):
    """Logits [positions, classes] and labels [positions] -> cross-entropy [positions], 0 where a label is ignored.

    What the logits' statistics, their `maximum` and `total`, would pass on is part of the gradient by the logits.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
        minus_chosen = widened(functional.nll_loss(logits, labels, ignore_index=IGNORED, reduction="none"))
        costs = (total.log() + (maximum + minus_chosen.unsqueeze(1))).squeeze(1)
        return costs.masked_fill(labels == IGNORED, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maximum, total = ctx.saved_tensors
        # Not by the statistics where it is differentiated again, since they would be taken for constants.
        if torch.is_grad_enabled():
            return _differentiable_slopes(logits, labels, grad_output), None, None, None
        return _slopes(logits, labels, grad_output, maximum, total), None, None, None


def _slopes(logits: Tensor, labels: Tensor, weights: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """The gradient by the logits: (softmax - one-hot) times `weights` [positions], rounded once to the logits' type."""
    ignored, weights, chosen = _columns(labels, weights)
    scale = weights / total
    slopes = scale.new_empty(logits.shape, dtype=logits.dtype)  # not of the logits: under vmap, they may have no batch
    parts = (each.split(positions_at_once(logits)) for each in (slopes, logits, maximum, scale, ignored))
    for chunk in zip(*parts, strict=True):
        _write_softmax(*chunk)
    at_chosen = (widened(logits.gather(1, chosen)) - maximum).exp() * scale - weights
    position = torch.arange(len(logits), device=logits.device).unsqueeze(1)
    slopes[position, chosen] = at_chosen.masked_fill(ignored, 0).to(logits.dtype)
    return slopes


@CompiledOnGPU
def _write_softmax(out: Tensor, logits: Tensor, maximum: Tensor, scale: Tensor, ignored: Tensor) -> None:
    """exp(logits - maximum) * scale into `out`, all [positions, classes or 1]; 0 where ignored, even if that is NaN."""
    wide = out if out.dtype == maximum.dtype else torch.empty_like(out, dtype=maximum.dtype)
    wide.copy_(logits).sub_(maximum).exp_().mul_(scale).masked_fill_(ignored, 0)
    if wide is not out:
        out.copy_(wide)


def _differentiable_slopes(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The same by PyTorch's softmax, joined from chunks: going back through writes into place would copy them all."""
    size = positions_at_once(logits)
    parts = (each.split(size) for each in (logits, *_columns(labels, weights)))
    slopes = []
    for chunk, ignored, weight, chosen in zip(*parts, strict=True):
        slope = (widened(chunk).softmax(1) * weight).masked_fill_(ignored, 0)
        slopes.append(slope.scatter_add_(1, chosen, -weight).to(logits.dtype))
    return torch.cat(slopes)


def _columns(labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels are ignored, the weights without theirs, and class 0 in their place: each [positions, 1]."""
    ignored = (labels == IGNORED).unsqueeze(1)
    return ignored, weights.unsqueeze(1).masked_fill(ignored, 0), labels.unsqueeze(1).masked_fill(ignored, 0)
