"""Every method of the leaderboard: what it is called, and how it scores all pairs of queries and training examples.

To add one, write a function of a `Subject` in a file of its own, or here if a line or two will do, and give it a row of
`METHODS`. This module knows the library and the setting; it must not know retrainings, nor how methods are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack
from wherefrom.scoring.options import PairwiseOptions

import wherefrom as wf
from leaderboard.subject import Subject
from wherefrom.methods.baselines import bm25_scores, random_scores

ALL = ("transformer.h.*", "transformer.ln_f", "transformer.wpe", "lm_head")  # the head is the embedding, too


Scoring = Callable[[Subject], Tensor | wf.Scores]
"""Scores [queries, train]; positive where training on the example lowers the query's loss."""


@dataclass(frozen=True)
class Method:
    """A row of the leaderboard.

    Attributes:
        scores: makes them.
        what: in a few words, with the source.
    """

    scores: Scoring
    what: str


def influence(
    strategy: str,
    layers: tuple[str, ...] | None = None,
    *,
    conditioned: bool = False,
    **options: Unpack[PairwiseOptions],
) -> Scoring:
    """Factors of a strategy, in Adam's coordinates or not, and scores with them."""

    def scores(subject: Subject) -> wf.Scores:
        study = subject.study(layers)
        factors = study.fit(factored(strategy, conditioning=subject.conditioning if conditioned else None))
        return study.score(subject.setting.queries, factors, **options)

    return scores


def fisher(conditioned: bool) -> Scoring:
    """The sampled Fisher matrix of all weights."""

    def scores(subject: Subject) -> Tensor:
        conditioning = subject.conditioning if conditioned else None
        return subject.study(ALL).score(subject.setting.queries, wf.Fisher(conditioning=conditioning)).values

    return scores


def source(adam: bool, layers: tuple[str, ...] | None = None) -> Scoring:
    """Three segments of the training, by gradient descent or by AdamW's steps."""

    def scores(subject: Subject) -> Tensor:
        tokens = [len(each) - 1 for each in subject.setting.train["input_ids"]]
        scale = len(tokens) / sum(tokens)  # training minimised a mean over tokens
        queries = subject.setting.queries
        found = subject.study(layers).score(
            queries, wf.Source(checkpoints=subject.checkpoints, adam=adam, loss_scale=scale)
        )
        return found.values

    return scores


def logra(subject: Subject) -> Tensor:
    """On random directions."""
    return subject.study().score(subject.setting.queries, wf.LoGra()).values


def trak(subject: Subject) -> Tensor:
    """Of one model, with the log-odds of the labels."""
    return subject.study(measure="margin").score(subject.setting.queries, wf.Trak()).values


def trackstar(subject: Subject) -> Tensor:
    """With Adam's second moments."""
    return subject.study().score(subject.setting.queries, wf.TrackStar(conditioning=subject.conditioning)).values


def two_stages(subject: Subject) -> Tensor:
    """EK-FAC's scores of the tenth of the training set that BM25 puts on top of a query; 0 elsewhere."""
    found = bm25(subject)
    candidates = found.topk(len(subject.setting.train) // 10).indices
    study = subject.study()
    exact = study.score(subject.setting.queries, wf.TwoStage(first=candidates, then=wf.EKFAC()), keep=wf.Top(10000))
    return torch.zeros_like(found).scatter(1, exact.train, exact.values)


def cosine(subject: Subject) -> Tensor:
    """Dot products of gradients of unit length."""
    study = subject.study()
    scores = study.score(subject.setting.queries, wf.Dot(), keep=wf.Pairs(self_influence=True))
    return scores.normalized("cosine").values


def tracin(subject: Subject) -> Tensor:
    """Dot products at every checkpoint, times the learning rate."""
    return subject.study().score(subject.setting.queries, wf.TracIn(checkpoints=subject.checkpoints)).values


def last_checkpoints(subject: Subject) -> Tensor:
    """A mean of scores with factors of their own."""
    study, last = subject.study(), subject.checkpoints[-3:]
    weights = [1 / len(last)] * len(last)
    return study.score(subject.setting.queries, wf.TracIn(checkpoints=last, scored=wf.EKFAC(), weights=weights)).values


def bm25(subject: Subject) -> Tensor:
    """Shared words."""
    return bm25_scores(subject.setting.queries["text"], subject.setting.train["text"])


def chance(subject: Subject) -> Tensor:
    """Random numbers."""
    return random_scores(len(subject.setting.queries), len(subject.setting.train), seed=0)


def magic(subject: Subject) -> Tensor:
    """Back through the training."""
    return wf.magic_scores(
        subject.folder, subject.setting.training(), subject.setting.queries, queries_at_once=8
    ).values


METHODS: dict[str, Method] = {
    "random": Method(chance, "chance"),
    "bm25": Method(bm25, "shared words"),
    "dot": Method(influence("identity"), "gradient dot product (`identity`)"),
    "cosine": Method(cosine, "gradient cosine"),
    "tracin": Method(tracin, "TracInCP over six checkpoints (Pruthi et al. 2020)"),
    "adam dot": Method(influence("identity", conditioned=True), "gradient dot product, times Adam's preconditioner"),
    "trak": Method(trak, "TRAK (Park et al. 2023), one model, rank 8 a layer"),
    "logra": Method(logra, "LoGra (Choe et al. 2024), random projection, rank 16"),
    "trackstar": Method(trackstar, "TrackStar (Chang et al. 2024), rank 16"),
    "diagonal": Method(influence("diagonal"), "diagonal Fisher information"),
    "kfac": Method(influence("kfac"), "Kronecker factors"),
    "shampoo": Method(influence("shampoo"), "eigenvalue-corrected Shampoo"),
    "ekfac": Method(influence("ekfac"), "EK-FAC (Grosse et al. 2023), damping 0.1 x mean eigenvalue"),
    "ekfac, damping 1e-8": Method(influence("ekfac", damping=1e-8), "EK-FAC, the published damping"),
    "ekfac, all weights": Method(influence("ekfac", ALL), "EK-FAC of embeddings, head and normalisations too"),
    "ekfac, all weights, damping 0.01": Method(influence("ekfac", ALL, damping=0.01), "EK-FAC, an absolute damping"),
    "ekfac, three checkpoints": Method(last_checkpoints, "EK-FAC's scores averaged over the last three checkpoints"),
    "shampoo, adam": Method(influence("shampoo", conditioned=True), "Shampoo in Adam's coordinates"),
    "shampoo, adam, all weights": Method(influence("shampoo", ALL, conditioned=True), "Shampoo in Adam's coordinates"),
    "fisher, all weights": Method(
        fisher(conditioned=False),
        "the sampled Fisher matrix itself, three samples an example",
    ),
    "fisher, adam, all weights": Method(fisher(conditioned=True), "the sampled Fisher matrix in Adam's coordinates"),
    "bm25, then ekfac": Method(two_stages, "EK-FAC for the tenth that BM25 names, 0 elsewhere"),
    "source": Method(source(adam=False), "SOURCE (Bae et al. 2024), three segments, six checkpoints"),
    "source, adam": Method(source(adam=True), "SOURCE with AdamW's steps"),
    "ekfac + cg": Method(
        influence("ekfac", solver=wf.ConjugateGradients(20, 1e-2)),
        "Gauss-Newton matrix, 20 iterations at most",
    ),
    "ekfac + astra": Method(
        influence("ekfac", solver=wf.Astra(60, batch_size=32, learning_rate=0.005)),
        "ASTRA (Wang et al. 2025) with 60 batches of 32 and a rate of 0.005",
    ),
    "magic": Method(magic, "the exact gradient through training (Ilyas & Engstrom 2025)"),
}
