"""Random targets that depend on the seed and the example alone, never on how examples are batched or padded.

The Fisher information needs targets drawn from the model's own predictions. Each example owns a stream of uniform
numbers, derived from `(seed, position in the dataset)` on the CPU, so that batch size, padding, order, resuming and
device leave the draw as it is. This module knows nothing of models or datasets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.precision import widened


@dataclass(frozen=True)
class Sampler:
    """Draws targets for one batch.

    Attributes:
        seed: the seed of the whole fit.
        examples: the dataset position of each row of the batch.
    """

    seed: int
    examples: Sequence[int]

    def categorical(self, logits: Tensor, where: Tensor | None = None) -> Tensor:
        """Draw one class for every position.

        Args:
            logits: unnormalised log-probabilities, [batch, ..., classes].
            where: boolean [batch, ...]; only these positions use up random numbers, so padding elsewhere in the
                row changes nothing. None means everywhere.

        Returns:
            Class indices, int64 [batch, ...]; 0 where `where` is false.
        """
        classes = logits.shape[-1]
        shape = logits.shape[:-1]
        if where is None:
            where = torch.ones(shape, dtype=torch.bool, device=logits.device)
        depth = max(1, (classes - 1).bit_length())
        uniform = self._uniform(where.reshape(len(where), -1), depth)  # [drawn, depth]
        drawn = _descend(logits[where].softmax(-1), uniform)
        targets = torch.zeros(shape, dtype=torch.int64, device=logits.device)
        targets[where] = drawn
        return targets

    def normal(self, mean: Tensor) -> Tensor:
        """Draw from a normal distribution of unit variance around `mean`, [batch, ...]."""
        everywhere = torch.ones(len(mean), mean[0].numel(), dtype=torch.bool, device=mean.device)
        uniform = self._uniform(everywhere, 1).view(mean.shape)
        # The inverse of the normal distribution function; 0 itself would give minus infinity.
        noise: Tensor = torch.special.ndtri(uniform.clamp_min(2.0**-54))
        # Not in half precision, where the noise would drown in the rounding of a large mean.
        wide = widened(mean)
        return wide + noise.to(wide.dtype)

    def _uniform(self, where: Tensor, depth: int) -> Tensor:
        """Uniform numbers for the true entries of `where` [batch, positions], in row order: [drawn, depth]."""
        counts = where.sum(1).tolist()
        rows = [
            torch.rand(count, depth, generator=self._stream(example), dtype=torch.float64)
            for example, count in zip(self.examples, counts, strict=True)
        ]
        return torch.cat(rows).to(where.device)

    def _stream(self, example: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{example}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _descend(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw a class from each row by walking down a binary tree of summed probabilities.

    Every step compares a fresh uniform number with the conditional probability of the left half. Rounding differences
    between batch sizes move that conditional by a relative 1e-6 or so whatever the class, which makes a changed draw
    about as rare. Searching one cumulative sum instead would swap neighbours in the tail of a large vocabulary often.

    Args:
        probabilities: [n, classes]; uniform: [n, depth] with 2**depth >= classes.

    Returns:
        Class indices, int64 [n].
    """
    levels = [probabilities]
    while levels[-1].shape[-1] > 1:
        level = levels[-1]
        if level.shape[-1] % 2:
            level = levels[-1] = torch.nn.functional.pad(level, (0, 1))
        levels.append(level[:, 0::2] + level[:, 1::2])
    node = torch.zeros(len(probabilities), 1, dtype=torch.int64, device=probabilities.device)
    for depth, level in enumerate(reversed(levels[:-1])):
        left, right = level.gather(1, 2 * node), level.gather(1, 2 * node + 1)
        node = 2 * node + (uniform[:, depth : depth + 1] * (left + right) >= left).long()
    return node.squeeze(1)
