"""Scores from projected gradients alone: LoGra, TRAK and TrackStar, the cheap methods of this field.

All three store `P_S^T G P_A` of each training example (`StoredGradients`), take the curvature from these instead of
from factors, and multiply small dense matrices. They differ in what the gradients are of, in what is inverted and how
far, and in what is normalised. This module does not know how gradients are projected or stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from wherefrom.curvature.conditioning import conditioning_digest
from wherefrom.curvature.damping import added_damping
from wherefrom.curvature.factors import Factors
from wherefrom.engine.loading import Examples
from wherefrom.methods.checkpoints import named_paths
from wherefrom.methods.factored import KFAC, Coordinates
from wherefrom.methods.method import Context, Job, Method
from wherefrom.methods.projected.gradient_store import StoredGradients
from wherefrom.methods.projected.projections import Compression, Projection, damped_power, preconditioned
from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.scoring.keep import Keep
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import MODEL

if TYPE_CHECKING:
    from wherefrom.methods.method import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Projected(Method):
    """What methods on projected gradients have in common.

    Attributes:
        rank: how many directions of a layer's outputs and of its inputs: its gradient becomes rank x rank numbers.
        seed: of random directions.
        damping: added to every eigenvalue of the curvature of projected gradients, a mean over examples; None adds
            0.1 x the mean eigenvalue.

    Raises:
        InputError: a field is impossible.
    """

    rank: int = 16
    seed: int = 0
    damping: float | None = None

    full_precision: ClassVar[str] = "gradients are projected in full precision"

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise InputError(f"damping={self.damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        check_argument(self.rank >= 1, "rank", self.rank, "at least 1")

    def projection(self, context: Context[Any], scales: Mapping[str, Tensor] | None = None) -> Projecting:
        """How gradients are projected on random directions."""
        compression = Compression(rank=self.rank, seed=self.seed)
        return Projecting(context, compression, compression.projections(context.sweep.layers, None), scales)

    def powers(self, curvature: Mapping[str, Tensor], exponent: float) -> dict[str, Tensor]:
        """(C + damping)^exponent of each; 0 where there is no curvature at all."""
        found = {}
        for name, each in curvature.items():
            added = added_damping(each.diagonal(), self.damping)
            found[name] = damped_power(name, each, added, exponent) if bool(each.any()) else torch.zeros_like(each)
        return found

    def _settings(self, projecting: Projecting) -> dict[str, str]:
        return {
            "damping": "0.1 x mean eigenvalue" if self.damping is None else repr(self.damping),
            "precision": str(projecting.context.sweep.precision),
            **projecting.compression.fingerprint(projecting.projections),
        }


@dataclass(frozen=True)
class Projecting:
    """How gradients are projected.

    Attributes:
        scales: what they are multiplied with before, element by element, [out, in] of each layer; None is nothing.
    """

    context: Context[Any]
    compression: Compression
    projections: Mapping[str, Projection]
    scales: Mapping[str, Tensor] | None = None

    def stored(self, result: Unfinished, name: str, examples: Examples[Any]) -> StoredGradients[Any]:
        """Projected gradients of examples, stored while scores are computed."""
        cache = result.parts.parts(name)
        return StoredGradients.made(self.context.sweep, examples, self.projections, cache, self.scales)


@dataclass(frozen=True, kw_only=True)
class LoGra(Projected):
    """LoGra (Choe et al. 2024, arXiv 2405.13954): influence on projected gradients, layer by layer.

    `sum_l q_l^T (F_l + damping)^-1 g_l`, with the projected gradients q_l of a query's measurement and g_l of a
    training example's loss, and the empirical Fisher matrix F_l, the mean of `g_l g_l^T` over the training examples.

    Attributes:
        directions: "random" ones (LoGra-random), or the leading "eigenvectors" of each layer's covariances (LoGra-PCA).
        factors: `KFAC` or `EKFAC` ones that have the eigenvectors; None fits them.
    """

    directions: Literal["random", "eigenvectors"] = "random"
    factors: Factors | None = field(default=None, repr=False)

    name: ClassVar[str] = "logra"

    def rise(self, train: int) -> float | None:
        return 1 / train

    def projection(self, context: Context[Any], scales: Mapping[str, Tensor] | None = None) -> Projecting:
        if self.directions == "random":
            return super().projection(context, scales)
        factors = KFAC(seed=self.seed).fit(context) if self.factors is None else self.factors
        factors.check_model(context.fingerprint)
        if factors.scaling:
            raise InputError(
                "factors are conditioned, and LoGra's gradients are not: fit factors without a conditioning."
            )
        compression = Compression(directions="eigenvectors", rank=self.rank)
        return Projecting(context, compression, compression.projections(context.sweep.layers, factors), scales)

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        projecting = self.projection(context)

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            train = projecting.stored(result, "losses", context.train)
            projected = train.of("query gradients", queries)
            inverse = self.powers(_covariances(train), -1)
            return _products(result, preconditioned(projected, inverse, train.parts), train)

        return Job("logra", self._settings(projecting), compute)


@dataclass(frozen=True, kw_only=True)
class Trak(Projected):
    """TRAK (Park et al. 2023, arXiv 2303.14186): kernel regression on projected gradients of the model's output.

    `(mean_m Q_t) (mean_m phi_t^T (Phi^T Phi + N damping)^-1 phi_q)`, with means over models m (their section 3). The
    output function is minus what the task measures, on training examples too: `measure="margin"` of the language tasks
    is the log-odds of the paper, summed over tokens. phi is its projected gradient over all layers together, Phi those
    of the N training examples, and Q_t = 1 - p_t the derivative of the loss by minus the output. It is taken from the
    projected gradients of both, by least squares: exact where an example is one prediction, and one number for all
    where it is many. The paper's projection is dense; this one is a Kronecker product in each layer.

    The matrix that is inverted has (rank^2 x layers)^2 numbers. The paper adds no damping: `damping=0` does as it does,
    and needs more training examples than projected numbers.

    Attributes:
        checkpoints: of several models, directories or files of weights; none is the study's own model alone.
    """

    rank: int = 8
    checkpoints: Sequence[Checkpoint] = ()

    name: ClassVar[str] = "trak"

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        models: dict[str, Path | None] = {**named_paths(self.checkpoints)} if self.checkpoints else {"model": None}
        projecting, settings = self.projection(context), {}
        if self.checkpoints:
            settings["models"] = "; ".join(f"{name}: {context.states.digest(path)}" for name, path in models.items())

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            models_gradients: list[tuple[Tensor, StoredGradients[Any]]] = []
            weights = torch.zeros(len(context.train))
            for name, path in models.items():
                with context.states.entered(path):
                    outputs = projecting.stored(result, f"{name}-outputs", replace(context.train, loss="measurement"))
                    losses = projecting.stored(result, f"{name}-losses", context.train)
                    projected = outputs.of("query gradients", queries)
                whole = {"all layers": slice(0, outputs.size)}
                inverse = self.powers(_mean_products((block for _, block in outputs.blocks()), whole), -1)
                models_gradients.append((preconditioned(projected, inverse, whole) / len(outputs), outputs))
                weights = weights + _remaining(outputs, losses)
            scale = weights / len(models) ** 2

            def block(examples: range) -> Tensor:
                chosen = slice(examples.start, examples.stop)
                products = [each @ outputs.block(examples).T for each, outputs in models_gradients]
                return torch.stack(products).sum(0).cpu() * scale[chosen]

            return _put(result, len(queries), models_gradients[0][1], block)

        without = [MODEL] if self.checkpoints else []  # the study's own has nothing to do with them
        return Job("trak", self._settings(projecting) | settings, compute, without)


@dataclass(frozen=True, kw_only=True)
class TrackStar(Projected, Coordinates):
    """TrackStar (Chang et al. 2024, arXiv 2410.17413): cosines of projected, preconditioned gradients, -1 to 1.

    A gradient G of a layer becomes `g = R^-1/2 p`, p the projection of `C * G` with the conditioning C, and all layers
    together are divided by their norm. `R = mixing R_queries + (1 - mixing) R_train + damping` in each layer, with the
    means of `p p^T` over the queries and over the training examples. The damping is not in the paper, where examples
    are many; its conditioning is 1 / sqrt(V), V the optimizer's second moments, which `adam` gives.

    Attributes:
        mixing: 0 to 1; the paper takes 0.9 where queries are of one kind, and 0.99 where training examples are many
            more.
    """

    mixing: float = 0.9

    name: ClassVar[str] = "trackstar"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mixing <= 1:
            raise InputError(
                f"mixing={self.mixing}: expected a number from 0 (training examples alone) to 1 (queries alone)."
            )

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        scaling = self.scaling(context)
        projecting = self.projection(context, {name: each.square() for name, each in scaling.items()} or None)

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            train = projecting.stored(result, "losses", context.train)
            projected = train.of("query gradients", queries)
            of_queries, of_train = _mean_products([projected], train.parts), _covariances(train)
            mixed = {name: self.mixing * of_queries[name] + (1 - self.mixing) * each for name, each in of_train.items()}
            inverse_root = self.powers(mixed, -0.5)

            def normalised(gradients: Tensor) -> Tensor:
                return functional.normalize(preconditioned(gradients, inverse_root, train.parts), dim=1)

            return _products(result, normalised(projected), train, normalised)

        settings = {"mixing": repr(self.mixing), **conditioning_digest(scaling)}
        return Job("trackstar" + "-conditioned" * bool(scaling), self._settings(projecting) | settings, compute)


def _remaining(outputs: StoredGradients[Any], losses: StoredGradients[Any]) -> Tensor:
    """1 - p of each training example, [train]: the derivative of its loss by minus its output."""
    weights = torch.zeros(len(outputs), dtype=outputs.sweep.dtype)
    for (examples, output), (_, loss) in zip(outputs.blocks(), losses.blocks(), strict=True):
        squares = output.square().sum(1)
        weights[examples.start : examples.stop] = torch.where(squares > 0, (output * loss).sum(1) / squares, 0.0).cpu()
    return weights


def _covariances(gradients: StoredGradients[Any]) -> dict[str, Tensor]:
    """The empirical Fisher matrix of each layer's projected gradients, [numbers, numbers] in float64."""
    return _mean_products((block for _, block in gradients.blocks()), gradients.parts)


def _mean_products(blocks: Iterable[Tensor], columns: Mapping[str, slice]) -> dict[str, Tensor]:
    """The mean of g g^T over the examples of all blocks, for each part of their columns, in float64."""
    totals: dict[str, Tensor] = {}
    count = 0
    for block in blocks:
        count += len(block)
        for name, part in columns.items():
            wide = block[:, part].double()
            product = wide.T @ wide
            totals[name] = totals[name] + product if name in totals else product
    return {name: total / count for name, total in totals.items()}


def _products(
    result: Unfinished,
    queries: Tensor,
    train: StoredGradients[Any],
    prepared: Callable[[Tensor], Tensor] = lambda block: block,
) -> dict[str, Tensor]:
    """Products of queries [queries, numbers] with prepared training gradients."""
    return _put(result, len(queries), train, lambda examples: (queries @ prepared(train.block(examples)).T).cpu())


def _put(
    result: Unfinished, queries: int, train: StoredGradients[Any], block: Callable[[range], Tensor]
) -> dict[str, Tensor]:
    """Put scores [queries, examples] of some training examples after others into a result's matrix."""
    blocks = result.blocks(queries, len(train))
    for examples in train.ranges:

        def compute(_: Unfinished, examples: range = examples) -> dict[str, Tensor]:
            return {"values": block(examples)}

        blocks.get_or_compute(range(queries), examples, compute)
    return {}
