"""Random targets that depend on the seed and the example alone, never on how examples are batched or padded.

The Fisher information needs targets drawn from the model's own predictions. Each example owns a stream of uniform
numbers, derived from `(seed, position in the dataset)` on the CPU, so that batch size, padding, order, resuming and
device leave the draw as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.runtime.precision import widened
from wherefrom.tasks.losses import IGNORED, SoftmaxStatistics, softmax_statistics, summed_cross_entropy, tree_depth


@dataclass(frozen=True)
class Sampler:
    """Draws targets for one batch.

    Attributes:
        seed: the seed of the whole fit.
        examples: the dataset position of each example of the batch.
    """

    seed: int
    examples: Sequence[int]

    def categorical(
        self, logits: Tensor, where: Tensor | None = None, statistics: SoftmaxStatistics | None = None
    ) -> Tensor:
        """Draw one class for every position.

        Args:
            logits: unnormalised log-probabilities, [batch, ..., classes].
            where: boolean [batch, ...]; only these positions use up random numbers, so padding elsewhere in the
                example changes nothing. None means everywhere.
            statistics: of these logits, flattened to [positions, classes], if they are at hand. None reads the logits.

        Returns:
            Class indices, int64 [batch, ...]; 0 where `where` is false.
        """
        shape = logits.shape[:-1]
        if where is None:
            where = torch.ones(shape, dtype=torch.bool, device=logits.device)
        counted = where.reshape(len(where), -1)
        depth = tree_depth(logits.shape[-1])
        uniform = self._uniform(counted.shape[1], depth, logits.device)
        # Drawn for all positions, so that nobody waits for the device to count them: the k-th counted position of an
        # example takes its k-th group.
        group = (counted.cumsum(1) - 1).clamp_min(0)
        chosen = uniform.gather(1, group.unsqueeze(2).expand(-1, -1, depth))
        flat = logits.reshape(-1, logits.shape[-1])
        drawn = _drawn(flat, statistics or softmax_statistics(flat), chosen.flatten(0, 1))
        return torch.where(where, drawn.view(shape), 0)

    def binary(self, logits: Tensor) -> Tensor:
        """Draw 0 or 1 for each of `logits` [batch, ...], 1 with probability sigmoid(logit); in float32 or wider."""
        uniform = self._uniform(logits[0].numel(), 1, logits.device).view(logits.shape)
        wide = widened(logits)
        return (uniform < wide.sigmoid()).to(wide.dtype)

    def normal(self, mean: Tensor) -> Tensor:
        """Draw from a normal distribution of unit variance around `mean`, [batch, ...]."""
        uniform = self._uniform(mean[0].numel(), 1, mean.device).view(mean.shape)
        # The inverse of the normal distribution function; 0 itself would give minus infinity.
        noise: Tensor = torch.special.ndtri(uniform.clamp_min(2.0**-54))
        # Not in half precision, where the noise would drown in the rounding of a large mean.
        wide = widened(mean)
        return wide + noise.to(wide.dtype)

    def _uniform(self, groups: int, depth: int, device: torch.device) -> Tensor:
        """The first `groups` x `depth` numbers of each example's stream, float64 [batch, groups, depth]."""
        # A GPU copies from pinned memory while the host goes on.
        uniform = torch.empty(len(self.examples), groups, depth, dtype=torch.float64, pin_memory=device.type == "cuda")
        for numbers, example in zip(uniform, self.examples, strict=True):
            digest = hashlib.sha256(f"{self.seed}/{example}".encode()).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
            numbers.uniform_(generator=stream)
        return uniform.to(device, non_blocking=True)


def drawn_cross_entropy(logits: Tensor, counted: Tensor, sampler: Sampler) -> Tensor:
    """`summed_cross_entropy` of labels that `sampler` draws from the logits themselves, by one read of them for both.

    Args:
        logits: unnormalised log-probabilities, [batch, ..., classes].
        counted: boolean [batch, ...]; other positions are left out, and use up no random numbers.
    """
    statistics = softmax_statistics(logits.detach().reshape(-1, logits.shape[-1]))
    drawn = sampler.categorical(logits.detach(), counted, statistics)
    return summed_cross_entropy(logits, drawn.masked_fill(~counted, IGNORED), statistics)


def _drawn(logits: Tensor, statistics: SoftmaxStatistics, uniform: Tensor) -> Tensor:
    """Draw a class for each position, int64 [positions], by walking down a binary tree of summed probabilities.

    Every step compares a fresh uniform number with the conditional probability of the left half. Rounding differences
    between batch sizes move that conditional by a relative 1e-6 or so whatever the class, which makes a changed draw
    about as rare. Searching one cumulative sum instead would swap neighbours in the tail of a large vocabulary often.

    The tree's upper half has the blocks of the statistics as leaves. Its lower half is built only for the block that
    the walk down the upper half ends in.

    Args:
        logits: [positions, classes]; uniform: [positions, depth] with 2**depth >= classes.
    """
    classes, size = logits.shape[1], statistics.block_size
    levels = size.bit_length() - 1  # below a block
    upper, lower = uniform.tensor_split([uniform.shape[1] - levels], 1)
    block = _descend(statistics.blocks, upper)
    members = block.unsqueeze(1) * size + torch.arange(size, device=logits.device)  # [positions, size]
    candidates = widened(logits.gather(1, members.clamp_max(classes - 1)))
    within = candidates.masked_fill(members >= classes, -torch.inf).softmax(1)
    return block * size + _descend(within, lower)


def _descend(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Walk down trees whose leaves are the columns of [n, leaves], by uniform numbers [n, depth]: leaves, int64 [n]."""
    levels = [probabilities]
    while levels[-1].shape[1] > 1:
        level = levels[-1]
        if level.shape[1] % 2:
            level = levels[-1] = functional.pad(level, (0, 1))
        levels.append(level[:, 0::2] + level[:, 1::2])
    node = torch.zeros(len(probabilities), 1, dtype=torch.int64, device=probabilities.device)
    for depth, level in enumerate(reversed(levels[:-1])):
        left, right = level.gather(1, 2 * node), level.gather(1, 2 * node + 1)
        node = 2 * node + (uniform[:, depth : depth + 1] * (left + right) >= left).long()
    return node.squeeze(1)
