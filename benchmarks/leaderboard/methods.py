"""Every method of the leaderboard: what it is called, what it is, and a sentence on it.

To add one, give it a row of `METHODS`. This module knows the library and the setting; it must not know retrainings, nor
how methods are ranked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

import wherefrom as wf
from leaderboard.subject import Subject
from wherefrom.tasks.language import Measure

BUT_POSITIONS = ("transformer.h.*", "transformer.ln_f", "lm_head")  # the head is the embedding, too
ALL = (*BUT_POSITIONS, "transformer.wpe")

# What dampings are called.
NONE, DECAY, FIXED = "none", "weight decay alone", "0.01"
MEAN, SAMPLES, NATURAL = "0.1 x mean eigenvalue", "0.01 x mean eigenvalue of the samples", "1/tau x P^-1"


@dataclass(frozen=True)
class Entry:
    """A row of the leaderboard.

    Attributes:
        method: what scores; or what makes it, where it needs to know the training.
        what: in a few words, with the source.
        damping: in words, of the row.
        layers: which are tracked; all linear ones but the head by default.
        unit: what a score says of the rise of a query's summed loss when the example is left out: as much, or as much
            for each of the N examples, so that it has to be divided by N; None where it says nothing of a size.
        half_precision: of the model's passes, with the fit and the solves.
    """

    method: wf.Method | Callable[[Subject], wf.Method]
    what: str
    damping: str = NONE
    layers: tuple[str, ...] | None = None
    measure: Measure = "loss"
    unit: Literal["1", "1/N"] | None = "1/N"
    half_precision: bool = False

    def scores(self, subject: Subject) -> wf.Scores:
        """Those of all pairs; positive where training on the example lowers the query's loss."""
        method = self.method if isinstance(self.method, wf.Method) else self.method(subject)
        study = subject.study(self.layers, self.measure)
        execution = replace(study.execution, half_precision=self.half_precision)
        return study.score(subject.setting.queries, method, execution=execution)

    def rises(self, values: Tensor) -> Tensor:
        """What scores [queries, train] say of the rise of each query's summed loss when an example is left out."""
        return values / values.shape[1] if self.unit == "1/N" else values


def without_factors(iterations: int, examples: int, half_precision: bool) -> Entry:
    """Blocks of queries solved for with Adam's preconditioner alone."""
    what = f"the Gauss-Newton matrix of {examples} examples, in blocks, with Adam's preconditioner alone"
    solver = wf.ConjugateGradients(iterations, examples=examples, block_size=32)
    return Entry(
        wf.Dot(adam=True, solver=solver), what + "; passes in bfloat16" * half_precision, NATURAL, ALL,
        half_precision=half_precision,
    )  # fmt: skip


def flow(iterations: int, examples: int) -> wf.GradientFlow:
    """In blocks, of all iterations."""
    return wf.GradientFlow(iterations, 0.0, examples=examples, block_size=32)


def finite_training(iterations: int, examples: int) -> Entry:
    """A training of finite time, of any order."""
    return Entry(
        wf.Dot(adam=True, solver=flow(iterations, examples)),
        f"(1 - exp(-tau P H)) / H with the Gauss-Newton matrix of {examples} examples, in blocks; passes in bfloat16",
        NATURAL, ALL, half_precision=True,
    )  # fmt: skip


def walked_back(iterations: int, examples: int) -> Entry:
    """This very training, in the same Krylov spaces."""
    return Entry(
        lambda subject: wf.TrajectoryFlow(training=subject.setting.training(), flow=flow(iterations, examples)),
        f"linearised AdamW with the Gauss-Newton matrix of {examples} examples, in blocks; passes in bfloat16",
        layers=ALL, unit="1", half_precision=True,
    )  # fmt: skip


def naturally_damped_fisher(subject: Subject) -> wf.Method:
    """The sampled Fisher matrix with the damping of the solvers."""
    return wf.Fisher(adam=True, damping=1 / (subject.setting.loss_scale * subject.time))


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
    "random": Entry(wf.Random(), "chance", unit=None),
    "bm25": Entry(wf.BM25(), "shared words", unit=None),
    "dot": Entry(wf.Dot(), "gradient dot product", unit=None),
    "cosine": Entry(wf.Cosine(), "gradient cosine", unit=None),
    "tracin": Entry(wf.TracIn(), "TracInCP over six checkpoints (Pruthi et al. 2020)", unit=None),
    "adam dot": Entry(wf.Dot(adam=True), "gradient dot product, times Adam's preconditioner", unit=None),
    "trak": Entry(wf.Trak(), "TRAK (Park et al. 2023), one model, rank 8 a layer", MEAN, measure="margin", unit=None),
    "logra": Entry(wf.LoGra(), "LoGra (Choe et al. 2024), random projection, rank 16", MEAN),
    "trackstar": Entry(wf.TrackStar(adam=True), "TrackStar (Chang et al. 2024), rank 16", MEAN, unit=None),
    "diagonal": Entry(wf.Diagonal(), "diagonal Fisher information", MEAN),
    "kfac": Entry(wf.KFAC(), "Kronecker factors", MEAN, unit=None),
    "shampoo": Entry(wf.Shampoo(), "eigenvalue-corrected Shampoo", MEAN),
    "ekfac": Entry(wf.EKFAC(), "EK-FAC (Grosse et al. 2023)", MEAN),
    "ekfac, damping 1e-8": Entry(wf.EKFAC(damping=1e-8), "EK-FAC, the published damping", "1e-8"),
    "ekfac, all weights": Entry(wf.EKFAC(), "EK-FAC of embeddings, head and normalisations too", MEAN, ALL),
    "ekfac, all weights, damping 0.01": Entry(wf.EKFAC(damping=0.01), "EK-FAC, an absolute damping", FIXED, ALL),
    "ekfac, three checkpoints": Entry(
        last_checkpoints, "EK-FAC's scores averaged over the last three checkpoints", MEAN
    ),
    "shampoo, adam": Entry(wf.Shampoo(adam=True), "Shampoo in Adam's coordinates", MEAN),
    "shampoo, adam, all weights": Entry(wf.Shampoo(adam=True), "Shampoo in Adam's coordinates", MEAN, ALL),
    "fisher, all weights": Entry(
        wf.Fisher(), "the sampled Fisher matrix itself, three samples an example", SAMPLES, ALL
    ),
    "fisher, adam, all weights": Entry(
        wf.Fisher(adam=True), "the sampled Fisher matrix in Adam's coordinates", SAMPLES, ALL
    ),
    "fisher, adam, all weights, 1/tau": Entry(
        naturally_damped_fisher, "the same with the damping of the solvers", NATURAL, ALL
    ),
    "bm25, then ekfac": Entry(two_stages, "EK-FAC for the tenth that BM25 names, 0 elsewhere", MEAN),
    "source": Entry(wf.Source(), "SOURCE (Bae et al. 2024), three segments, six checkpoints", DECAY),
    "source, adam": Entry(wf.Source(adam=True), "SOURCE with AdamW's steps", DECAY),
    "cg, all weights, 7 iterations, 100 examples": Entry(
        wf.Shampoo(adam=True, solver=wf.ConjugateGradients(7, examples=100)),
        "the Gauss-Newton matrix of a third of the examples, by conjugate gradients; no embeddings of positions",
        NATURAL,
        BUT_POSITIONS,
    ),
    "block cg, all weights, 5 iterations, 100 examples": Entry(
        wf.Shampoo(adam=True, solver=wf.ConjugateGradients(5, examples=100, block_size=32)),
        "the matrix of `cg`, by conjugate gradients whose directions all queries share (O'Leary 1980)",
        NATURAL,
        BUT_POSITIONS,
    ),
    "block cg, no factors, 5 iterations, 25 examples": without_factors(5, 25, half_precision=False),
    "block cg, no factors, 6 iterations, 32 examples, half precision": without_factors(6, 32, half_precision=True),
    "block cg, no factors, 6 iterations, 50 examples, half precision": without_factors(6, 50, half_precision=True),
    "block cg, no factors, 8 iterations, 100 examples, half precision": without_factors(8, 100, half_precision=True),
    "block cg, no factors, 16 iterations, 100 examples, half precision": without_factors(16, 100, half_precision=True),
    "flow, 5 iterations, 40 examples, half precision": finite_training(5, 40),
    "flow, 8 iterations, 100 examples, half precision": finite_training(8, 100),
    "trajectory flow, 5 iterations, 40 examples, half precision": walked_back(5, 40),
    "trajectory flow, 8 iterations, 100 examples, half precision": walked_back(8, 100),
    "astra, all weights, 40 batches": Entry(
        wf.Shampoo(adam=True, solver=wf.Astra(40, batch_size=32, decay=0.5, decay_every=10)),
        "the Gauss-Newton matrix, by ASTRA (Wang et al. 2025): batches of 32, half the rate every 10; the same weights",
        NATURAL,
        BUT_POSITIONS,
    ),
    "trajectory, all weights": Entry(
        trajectory,
        "linearised AdamW with the sampled Fisher matrix, six draws a visit, in 64 x 64 directions of each layer",
        layers=ALL,
        unit="1",
    ),
    "magic": Entry(magic, "the exact gradient through training (Ilyas & Engstrom 2025)", unit="1"),
}
