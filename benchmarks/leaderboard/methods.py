"""Every method of the leaderboard: what it is called, and how it scores all pairs of queries and training examples.

To add one, write a function of a `Subject` in a file of its own, or here if a line or two will do, and give it a row of
`METHODS`. This module knows the library and the setting; it must not know retrainings, nor how methods are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from typing_extensions import Unpack

import wherefrom as wf
from leaderboard.setting import Setting
from wherefrom.checkpoints import load_weights
from wherefrom.evaluate.baselines import bm25_scores, random_scores
from wherefrom.options import PairwiseOptions
from wherefrom.recording import RecordedCheckpoint

ALL = ("transformer.h.*", "transformer.ln_f", "transformer.wpe", "lm_head")  # the head is the embedding, too


@dataclass(frozen=True)
class Subject:
    """What a method is asked about.

    Attributes:
        setting: the model before training, the data, the training.
        checkpoints: of the training; the last is the trained model.
        folder: the method's own, empty at first.
    """

    setting: Setting
    checkpoints: list[RecordedCheckpoint]
    folder: Path

    def study(self, layers: tuple[str, ...] | None = None) -> wf.Study[dict[str, Tensor]]:
        """The trained model's study; all linear layers but the head by default."""
        model = self.setting.start
        load_weights(model, self.checkpoints[-1].path)
        return wf.Study(self.folder, model, wf.CausalLM(layers=layers), train=self.setting.train)


Scoring = Callable[[Subject], Tensor]
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


def influence(strategy: str, layers: tuple[str, ...] | None = None, **options: Unpack[PairwiseOptions]) -> Scoring:
    """Factors of a strategy, and scores with them."""

    def scores(subject: Subject) -> Tensor:
        study = subject.study(layers)
        return study.score(subject.setting.queries, study.fit(strategy), **options).values

    return scores


def cosine(subject: Subject) -> Tensor:
    """Dot products of gradients of unit length."""
    study = subject.study()
    scores = study.score(subject.setting.queries, study.fit("identity"), self_influence=True)
    return scores.normalized("cosine").values


def tracin(subject: Subject) -> Tensor:
    """Dot products at every checkpoint, times the learning rate."""
    return wf.score_checkpoints(subject.study(), subject.checkpoints, subject.setting.queries).values


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
    "diagonal": Method(influence("diagonal"), "diagonal Fisher information"),
    "kfac": Method(influence("kfac"), "Kronecker factors"),
    "ekfac": Method(influence("ekfac"), "EK-FAC (Grosse et al. 2023), damping 0.1 x mean eigenvalue"),
    "ekfac, damping 1e-8": Method(influence("ekfac", damping=1e-8), "EK-FAC, the published damping"),
    "ekfac, all weights": Method(influence("ekfac", ALL), "EK-FAC of embeddings, head and normalisations too"),
    "ekfac + cg": Method(
        influence("ekfac", solver=wf.ConjugateGradients(20, 1e-2)), "Gauss-Newton solve, 20 iterations at most"
    ),
    "ekfac + astra": Method(
        influence("ekfac", solver=wf.Astra(learning_rate=0.001, batch_size=128)), "ASTRA (Wang et al. 2025)"
    ),
    "magic": Method(magic, "the exact gradient through training (Ilyas & Engstrom 2025)"),
}
