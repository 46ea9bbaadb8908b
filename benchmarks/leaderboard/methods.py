"""Every method of the leaderboard: what it is called, what it is, and a sentence on it.

To add one, give it a row of `METHODS`. This module knows the library and the setting; it must not know retrainings, nor
how methods are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import wherefrom as wf
from leaderboard.subject import Subject
from wherefrom.tasks.language import Measure

ALL = ("transformer.h.*", "transformer.ln_f", "transformer.wpe", "lm_head")  # the head is the embedding, too


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard.

    Attributes:
        method: what scores; or what makes it, where it needs to know the training.
        what: in a few words, with the source.
        layers: which are tracked; all linear ones but the head by default.
    """

    method: wf.Method | Callable[[Subject], wf.Method]
    what: str
    layers: tuple[str, ...] | None = None
    measure: Measure = "loss"

    def scores(self, subject: Subject) -> wf.Scores:
        """Those of all pairs; positive where training on the example lowers the query's loss."""
        method = self.method if isinstance(self.method, wf.Method) else self.method(subject)
        return subject.study(self.layers, self.measure).score(subject.setting.queries, method)


def source(adam: bool) -> Callable[[Subject], wf.Method]:
    """Three segments of the training, by gradient descent or by AdamW's steps."""

    def made(subject: Subject) -> wf.Method:
        tokens = [len(each) - 1 for each in subject.setting.train["input_ids"]]
        return wf.Source(adam=adam, loss_scale=len(tokens) / sum(tokens))  # training minimised a mean over tokens

    return made


def two_stages(subject: Subject) -> wf.Method:
    """EK-FAC's scores of the tenth of the training set that BM25 puts on top of a query; 0 elsewhere."""
    return wf.TwoStage(candidates=len(subject.setting.train) // 10)


def last_checkpoints(subject: Subject) -> wf.Method:
    """A mean of scores with factors of their own."""
    last = subject.checkpoints[-3:]
    return wf.TracIn(scored=wf.EKFAC(), checkpoints=last, weights=[1 / len(last)] * len(last))


def magic(subject: Subject) -> wf.Method:
    """Back through the training."""
    return wf.Magic(training=subject.setting.training())


def trajectory(subject: Subject) -> wf.Method:
    """Back through the training at its checkpoints."""
    return wf.TrajectoryFisher(training=subject.setting.training(), draws=6, rank=64)


METHODS: dict[str, Entry] = {
    "random": Entry(wf.Random(), "chance"),
    "bm25": Entry(wf.BM25(), "shared words"),
    "dot": Entry(wf.Dot(), "gradient dot product"),
    "cosine": Entry(wf.Cosine(), "gradient cosine"),
    "tracin": Entry(wf.TracIn(), "TracInCP over six checkpoints (Pruthi et al. 2020)"),
    "adam dot": Entry(wf.Dot(adam=True), "gradient dot product, times Adam's preconditioner"),
    "trak": Entry(wf.Trak(), "TRAK (Park et al. 2023), one model, rank 8 a layer", measure="margin"),
    "logra": Entry(wf.LoGra(), "LoGra (Choe et al. 2024), random projection, rank 16"),
    "trackstar": Entry(wf.TrackStar(adam=True), "TrackStar (Chang et al. 2024), rank 16"),
    "diagonal": Entry(wf.Diagonal(), "diagonal Fisher information"),
    "kfac": Entry(wf.KFAC(), "Kronecker factors"),
    "shampoo": Entry(wf.Shampoo(), "eigenvalue-corrected Shampoo"),
    "ekfac": Entry(wf.EKFAC(), "EK-FAC (Grosse et al. 2023), damping 0.1 x mean eigenvalue"),
    "ekfac, damping 1e-8": Entry(wf.EKFAC(damping=1e-8), "EK-FAC, the published damping"),
    "ekfac, all weights": Entry(wf.EKFAC(), "EK-FAC of embeddings, head and normalisations too", ALL),
    "ekfac, all weights, damping 0.01": Entry(wf.EKFAC(damping=0.01), "EK-FAC, an absolute damping", ALL),
    "ekfac, three checkpoints": Entry(last_checkpoints, "EK-FAC's scores averaged over the last three checkpoints"),
    "shampoo, adam": Entry(wf.Shampoo(adam=True), "Shampoo in Adam's coordinates"),
    "shampoo, adam, all weights": Entry(wf.Shampoo(adam=True), "Shampoo in Adam's coordinates", ALL),
    "fisher, all weights": Entry(wf.Fisher(), "the sampled Fisher matrix itself, three samples an example", ALL),
    "fisher, adam, all weights": Entry(wf.Fisher(adam=True), "the sampled Fisher matrix in Adam's coordinates", ALL),
    "bm25, then ekfac": Entry(two_stages, "EK-FAC for the tenth that BM25 names, 0 elsewhere"),
    "source": Entry(source(adam=False), "SOURCE (Bae et al. 2024), three segments, six checkpoints"),
    "source, adam": Entry(source(adam=True), "SOURCE with AdamW's steps"),
    "ekfac + cg": Entry(
        wf.EKFAC(solver=wf.ConjugateGradients(20, 1e-2)),
        "Gauss-Newton matrix, 20 iterations at most",
    ),
    "ekfac + astra": Entry(
        wf.EKFAC(solver=wf.Astra(60, batch_size=32, learning_rate=0.005)),
        "ASTRA (Wang et al. 2025) with 60 batches of 32 and a rate of 0.005",
    ),
    "trajectory, all weights": Entry(
        trajectory, "linearised AdamW with the sampled Fisher matrix, six draws a visit, in 64 x 64 directions", ALL
    ),
    "magic": Entry(magic, "the exact gradient through training (Ilyas & Engstrom 2025)"),
}
