"""The sampled Fisher matrix of all weights together, inverted exactly in the space of its samples.

EK-FAC takes the matrix to be block-diagonal over layers, and each block to be a Kronecker product. With M sampled
gradients S [M, weights] it is `F = S^T S / M`, and the identity of Woodbury,

    g_q^T (F + damping)^-1 g_t = (q . t - (S q)^T (S S^T / M + damping)^-1 (S t) / M) / damping,

needs nothing but dot products of gradients: no approximation is left but the sampling (for optimizers: Ren & Goldfarb
2019, arXiv 1906.02353). In Adam's coordinates, every gradient is multiplied with P^(1/2). All gradients are in memory,
(samples + 1) x training examples x weights numbers, which is what keeps this to small models and training sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

import wherefrom as wf
from leaderboard.subject import Subject

SAMPLES, SHARE = 3, 0.01
_ROWS = 64  # gradients that are multiplied at a time


def sample_space(conditioned: bool) -> Callable[[Subject], Tensor]:
    """Scores with a damping of a hundredth of the mean eigenvalue in the space of the samples."""

    def scores(subject: Subject) -> Tensor:
        model, task = subject.model(), wf.CausalLM()
        train, queries = subject.setting.train, subject.setting.queries
        count = SAMPLES * len(train)
        sampled = torch.empty(count, sum(each.numel() for each in model.parameters()))
        for row in range(count):
            batch = task.collate([train[row % len(train)]])
            sampled[row] = gradient(model, task.train_loss(model, batch, wf.Sampler(0, [row])))
        known = torch.stack([gradient(model, task.train_loss(model, task.collate([each]))) for each in train])
        asked = torch.stack([gradient(model, task.measurement(model, task.collate([each]))) for each in queries])
        weights = torch.ones(len(known[0]))
        if conditioned:
            weights = torch.cat([subject.conditioning[name].flatten() for name, _ in model.named_parameters()])
        return inverse_products(asked, known, sampled, weights)

    return scores


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    """By all weights, [weights]."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


def inverse_products(asked: Tensor, known: Tensor, sampled: Tensor, weights: Tensor, share: float = SHARE) -> Tensor:
    """g_q^T (F + damping P^-1)^-1 g_t for every pair, in float64: [queries, train].

    Args:
        asked, known, sampled: gradients, [queries, weights], [train, weights], [samples, weights].
        weights: P, [weights].
        share: damping, in units of the mean eigenvalue of `S P S^T / samples`.
    """

    def products(left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([(block * weights) @ right.T for block in left.split(_ROWS)]).double()

    gram = products(sampled, sampled) / len(sampled)  # [samples, samples]
    damping = share * gram.diagonal().mean()
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
    seen = torch.linalg.solve(damped, products(sampled, known)) / len(sampled)  # [samples, train]
    found: Tensor = (products(asked, known) - products(asked, sampled) @ seen) / damping
    return found
