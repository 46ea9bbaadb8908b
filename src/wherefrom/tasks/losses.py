"""Cross-entropy of many classes without copies of the logits, which are the largest tensors of a language model's pass.

The logits are read once for the loss and for targets drawn from them: both need, of each position, no more than its
maximum, its sum of exponentials and the probabilities of some hundred blocks of classes. They are read once more for
the gradient. Positions are walked over in chunks: on a CPU, what a chunk needs beyond its logits stays in a cache; on a
GPU, each chunk is one compiled kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.runtime.compiling import CompiledOnGPU
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.precision import widened, widened_dtype

IGNORED = -100  # the label that cross-entropy leaves out, as in Hugging Face models

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
        parts = [_block_sums(chunk, size) for chunk in logits.split(_positions_at_once(logits))]
        maxima, sums = (torch.cat(each) for each in zip(*parts, strict=True))
        maximum = maxima.amax(1, keepdim=True)
        sums = sums * (maxima - maximum).exp()
        total = sums.sum(1, keepdim=True)
        return SoftmaxStatistics(maximum, total, sums / total, size)


def tree_depth(classes: int) -> int:
    """The levels of a binary tree with so many leaves; at least one."""
    return max(1, (classes - 1).bit_length())


def _positions_at_once(logits: Tensor) -> int:
    """How many positions of `logits` [positions, classes] make a chunk, on which no result may depend; at least one."""
    on_cpu = logits.device.type == "cpu"
    chunk_bytes = _CHUNK_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else _CHUNK_BYTES
    count = chunk_bytes // max(1, logits.shape[-1] * widened_dtype(logits.dtype).itemsize)
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


def summed_cross_entropy(logits: Tensor, labels: Tensor, statistics: SoftmaxStatistics | None = None) -> Tensor:
    """`cross_entropy`, summed: a scalar."""
    return cross_entropy(logits, labels, statistics).sum()


def cross_entropy(logits: Tensor, labels: Tensor, statistics: SoftmaxStatistics | None = None) -> Tensor:
    """Cross-entropy of logits [..., classes] and labels [...], 0 where a label is `IGNORED`: [...].

    It is in float32 or wider. Its gradient is as exact and as often differentiable as that of
    `functional.cross_entropy`, and comes in the logits' own type.

    Args:
        statistics: of these logits, flattened to [positions, classes], if they are at hand. None reads the logits.
    """
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"Cross-entropy of logits {list(logits.shape)} and labels {list(labels.shape)}: expected one label for "
            f"each row of logits, {list(logits.shape[:-1])}. Reshape one of them."
        )
    flat = logits.reshape(-1, logits.shape[-1])
    known = statistics or softmax_statistics(flat.detach())
    costs: Tensor = _CrossEntropy.apply(flat, labels.reshape(-1), known.maximum, known.total)  # type: ignore[no-untyped-call]
    return costs.view(labels.shape)


def summed_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of logits and labels from 0 to 1, of one shape, summed: a scalar in float32 or wider."""
    logits = widened(logits)
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")


def half_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed: the negative log-likelihood of normal distributions of unit variance."""
    return 0.5 * (widened(predictions) - targets).square().sum()


def summed_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over labels that are not `IGNORED` of their logit less the log-sum-exp of all other logits: a scalar."""
    counted = labels != IGNORED
    logits, chosen = widened(logits[counted]), labels[counted].unsqueeze(-1)  # [counted, classes], [counted, 1]
    others = logits.scatter(-1, chosen, -torch.inf).logsumexp(-1)
    return (logits.gather(-1, chosen).squeeze(-1) - others).sum()


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
    parts = (each.split(_positions_at_once(logits)) for each in (slopes, logits, maximum, scale, ignored))
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
    size = _positions_at_once(logits)
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
