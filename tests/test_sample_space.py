"""The Fisher matrix inverted in sample space, against the dense matrix."""

from __future__ import annotations

import torch
from leaderboard.sample_space import inverse_products


def test_products_with_the_inverse_are_those_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    asked, known, sampled = (torch.randn(rows, 9, generator=generator).double() for rows in (3, 5, 7))
    for weights in (torch.ones(9).double(), torch.rand(9, generator=generator).double() + 0.1):
        damping = 0.3 * ((sampled * weights) @ sampled.T / 7).diagonal().mean()
        dense = sampled.T @ sampled / 7 + (damping / weights).diag()
        expected = asked @ torch.linalg.solve(dense, known.T)
        torch.testing.assert_close(inverse_products(asked, known, sampled, weights, share=0.3), expected)
