"""Scores from projected gradients alone: LoGra, TRAK and TrackStar, the cheap methods of this field.

All three keep `P_S^T G P_A` of each training example (`GradientRows`), take the curvature from these rows instead of
from factors, and multiply small dense matrices. They differ in what the gradients are of, in what is inverted and how
far, and in what is normalised. This module is above `study`; it does not know how gradients are projected or kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypedDict

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Unpack

from wherefrom.curvature.conditioning import Conditioning, conditioning_digest, conditioning_roots
from wherefrom.curvature.damping import added_damping
from wherefrom.curvature.factors import Factors
from wherefrom.engine.sweep import Objective, Sweep
from wherefrom.methods.gradient_store import GradientRows
from wherefrom.methods.projections import Compression, Projection, damped_power, preconditioned
from wherefrom.methods.tracin import named_paths
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.memory import within_memory
from wherefrom.scoring.kept_scores import keep_scores
from wherefrom.scoring.options import check_names, checked_result_name
from wherefrom.scoring.results import Scores
from wherefrom.scoring.scoring import measurement, training_loss
from wherefrom.store.artifacts import check_layout
from wherefrom.store.cache import Stages
from wherefrom.store.files import scratch_matrix
from wherefrom.store.fingerprint import Dataset, checked_length, dataset_digest, model_digest
from wherefrom.store.names import result_name
from wherefrom.store.weights import load_weights, restored
from wherefrom.study import Study
from wherefrom.tasks.task import Batch, checked_settings

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


class ProjectionOptions(TypedDict, total=False):
    """Keyword arguments of `logra_scores`, `trak_scores` and `trackstar_scores`.

    Attributes:
        rank: how many directions on either side of a layer's gradient, which becomes rank x rank numbers: 16, and of
            `trak_scores` 8, unless given.
        seed: of random directions.
        damping: added to every eigenvalue of the curvature of projected gradients, a mean over examples; None adds
            0.1 x the mean eigenvalue.
        batch_size: None finds one; results depend on it only by rounding.
        name: of the scores in the run directory; by default the method, and a digest of all that they depend on.
        overwrite: compute them again and replace them, also where they have this name and were made from something
            else, which is refused otherwise. It replaces these scores alone.
    """

    rank: int
    seed: int
    damping: float | None
    batch_size: int | None
    name: str | None
    overwrite: bool


def logra_scores(
    study: Study[Batch], queries: Dataset[object], factors: Factors | None = None, **options: Unpack[ProjectionOptions]
) -> Scores:
    """LoGra (Choe et al. 2024, arXiv 2405.13954): influence on projected gradients, layer by layer.

    `sum_l q_l^T (F_l + damping)^-1 g_l`, with the projected gradients q_l of a query's measurement and g_l of a
    training example's loss, and the empirical Fisher matrix F_l, the mean of `g_l g_l^T` over the training examples.

    Args:
        study: the model, its task and training examples; scores are kept in its run directory.
        queries: as in `Study.score`.
        factors: `kfac` or `ekfac` ones, to project on the leading eigenvectors of each layer's covariances (LoGra-PCA),
            without a conditioning; None projects on random directions (LoGra-random).
        options: those of `ProjectionOptions`.

    Raises:
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    if factors is not None and factors.roots:
        raise InputError("factors are conditioned, and LoGra's gradients are not: fit factors without a conditioning.")
    method = _Method.of(study, queries, "logra", 16, factors, **options)

    def compute(blocks: Stages) -> dict[str, Tensor]:
        rows = method.rows(blocks, "losses", training_loss(method.sweep.task))
        asked = method.asked(rows)
        inverse = method.powers(_covariances(rows), -1)
        values = method.matrix(blocks)
        return _filled(values, preconditioned(asked, inverse, rows.parts), rows)

    return method.scores(compute)


def trak_scores(
    study: Study[Batch],
    queries: Dataset[object],
    checkpoints: Sequence[str | Path | RecordedCheckpoint] = (),
    **options: Unpack[ProjectionOptions],
) -> Scores:
    """TRAK (Park et al. 2023, arXiv 2303.14186): kernel regression on projected gradients of the model's output.

    `(mean_m Q_t) (mean_m phi_t^T (Phi^T Phi + N damping)^-1 phi_q)`, with means over models m (their section 3). The
    output function is minus what the task measures, on training examples too: `measure="margin"` of the language tasks
    is the log-odds of the paper, summed over tokens. phi is its projected gradient over all layers together, the rows
    of Phi those of the N training examples, and Q_t = 1 - p_t the derivative of the loss by minus the output. It is
    taken from the projected gradients of both, by least squares: exact where an example is one prediction, and one
    number for all where it is many. The paper's projection is dense; this one is a Kronecker product in each layer.

    The matrix that is inverted has (rank^2 x layers)^2 numbers. The paper adds no damping: `damping=0` does as it does,
    and needs more training examples than projected numbers.

    Args:
        study: the model, its task and training examples; while this runs with checkpoints, it holds the weights of one
            after another, and in the end, also after an error, its own again.
        queries: as in `Study.score`.
        checkpoints: of several models, as in `score_checkpoints`; none is the study's own model alone.
        options: those of `ProjectionOptions`.

    Raises:
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    paths: dict[str, Path | None] = {**named_paths(checkpoints)} if checkpoints else {"model": None}
    with study.alone(), restored(study._sweep.model) if checkpoints else nullcontext():
        digests = []
        for name, path in paths.items():
            _load(study, path)
            digests.append(f"{name}: {model_digest(study._sweep.model)}")
        several = {"models": "; ".join(digests)} if checkpoints else {}
        method = _Method.of(study, queries, "trak", 8, **options).told_by(several)

        def compute(blocks: Stages) -> dict[str, Tensor]:
            values, weights = method.matrix(blocks), torch.zeros(len(study.train))
            for name, path in paths.items():
                _load(study, path)
                weights = weights + _trak_model(method, replace(blocks, folder=blocks.folder / name), values)
            return {} if values is None else {"values": values.mul_(weights / len(paths) ** 2)}

        return method.scores(compute)


def trackstar_scores(
    study: Study[Batch],
    queries: Dataset[object],
    conditioning: Conditioning | None = None,
    mixing: float = 0.9,
    **options: Unpack[ProjectionOptions],
) -> Scores:
    """TrackStar (Chang et al. 2024, arXiv 2410.17413): cosines of projected, preconditioned gradients, -1 to 1.

    A gradient G of a layer becomes `g = R^-1/2 p`, p the projection of `C * G` with the conditioning C, and all layers
    together are divided by their norm. `R = mixing R_queries + (1 - mixing) R_train + damping` in each layer, with the
    means of `p p^T` over the queries and over the training examples. The damping is not in the paper, where examples
    are many.

    Args:
        study: the model, its task and training examples; scores are kept in its run directory.
        queries: as in `Study.score`.
        conditioning: as in `Study.fit`; the paper's is 1 / sqrt(V), V the optimizer's second moments, which
            `adam_conditioning` gives. None is 1.
        mixing: 0 to 1; the paper takes 0.9 where queries are of one kind, and 0.99 where training examples are many
            more.
        options: those of `ProjectionOptions`.

    Raises:
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    if not 0 <= mixing <= 1:
        raise InputError(f"mixing={mixing}: expected a number from 0 (training examples alone) to 1 (queries alone).")
    roots = {} if conditioning is None else conditioning_roots(study._sweep, conditioning)
    method = _Method.of(study, queries, "trackstar", 16, **options)
    method = replace(method, scales={name: each.square() for name, each in roots.items()} or None)
    method = method.told_by({"mixing": repr(mixing), **conditioning_digest(roots)})

    def compute(blocks: Stages) -> dict[str, Tensor]:
        rows = method.rows(blocks, "losses", training_loss(method.sweep.task))
        asked = method.asked(rows)
        of_queries, of_train = _mean_products([asked], rows.parts), _covariances(rows)
        mixed = {name: mixing * of_queries[name] + (1 - mixing) * each for name, each in of_train.items()}
        root = method.powers(mixed, -0.5)

        def normalised(gradients: Tensor) -> Tensor:
            return functional.normalize(preconditioned(gradients, root, rows.parts), dim=1)

        return _filled(method.matrix(blocks), normalised(asked), rows, normalised)

    return method.scores(compute)


@dataclass(frozen=True)
class _Method(Generic[Batch]):
    """What the methods have in common: options, projections, and where scores are kept.

    Attributes:
        settings: what scores depend on, beside the study and the queries.
        scales: as in `CompressedGradients`.
    """

    study: Study[Batch]
    queries: Dataset[object]
    label: str
    compression: Compression
    factors: Factors | None
    damping: float | None
    settings: Mapping[str, str]
    scales: Mapping[str, Tensor] | None = None

    @classmethod
    def of(
        cls,
        study: Study[Batch],
        queries: Dataset[object],
        label: str,
        usual_rank: int,
        factors: Factors | None = None,
        **options: Unpack[ProjectionOptions],
    ) -> _Method[Batch]:
        """The method of a call, checked."""
        checked_length("queries", queries)
        check_names(options, ProjectionOptions.__optional_keys__)
        name = options.get("name")
        if name is not None:
            checked_result_name(name)
        damping = options.get("damping")
        if damping is not None and not 0 <= damping < math.inf:
            raise InputError(f"damping={damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        compression = Compression(
            directions="random" if factors is None else "eigenvectors",
            rank=options.get("rank", usual_rank),
            numbers="float32",
            seed=options.get("seed", 0),
            batch_size=options.get("batch_size"),
            name=name,
            overwrite=options.get("overwrite", False),
        )
        settings = {"damping": "0.1 x mean eigenvalue" if damping is None else repr(damping)}
        return cls(study, queries, label, compression, factors, damping, settings)

    def told_by(self, settings: Mapping[str, str]) -> _Method[Batch]:
        """The same with more that its scores depend on."""
        return replace(self, settings={**self.settings, **settings})

    @property
    def sweep(self) -> Sweep[Batch]:
        return self.study._sweep

    def scores(self, compute: Callable[[Stages], dict[str, Tensor]]) -> Scores:
        """Those of a run directory, computed unless they are there."""
        study, fingerprint = self.study, self._fingerprint()
        name = result_name(self.label, fingerprint, self.compression.name)
        advice = "Give a smaller rank, or fewer queries at once."
        with study.alone(), within_memory("Curvature and rows of projected gradients do", self.sweep.device, advice):
            path = keep_scores(study.path, name, fingerprint, study.profile, self.compression.overwrite, compute)
        found = Scores.load(path)
        shape = (len(self.queries), len(study.train))
        check_layout(path, {"values": found.values}, {"values": (self.sweep.dtype, shape)})
        return found

    def _fingerprint(self) -> dict[str, str]:
        """What scores depend on."""
        study = self.study._fingerprint()
        if self.factors is not None:
            self.factors.check_model(study)
        if "models" in self.settings:  # the study's own has nothing to do with them
            del study["model"]
        return {
            **study,
            "strategy": self.label,
            "precision": str(self.sweep.precision),
            "queries": dataset_digest(self.queries),
            "measured": checked_settings(self.sweep.task).get("measure", "measurement"),
            **self.compression.fingerprint(self._projections),
            **self.settings,
        }

    @cached_property
    def _projections(self) -> dict[str, Projection]:
        return self.compression.projections(self.sweep.layers, self.factors)

    def rows(self, blocks: Stages, name: str, objective: Objective[Batch]) -> GradientRows[Batch]:
        """Projected gradients of the training examples, kept while scores are computed."""
        stages = replace(blocks, folder=blocks.folder / name)
        train, compression = self.study.train, replace(self.compression, overwrite=False)
        return GradientRows.kept(self.sweep, train, objective, compression, self._projections, stages, self.scales)

    def asked(self, rows: GradientRows[Batch]) -> Tensor:
        """Projected gradients of the queries, [queries, numbers]."""
        return rows.of("query gradients", self.queries, measurement(self.sweep.task))

    def powers(self, curvature: Mapping[str, Tensor], exponent: float) -> dict[str, Tensor]:
        """(C + damping)^exponent of each; 0 where there is no curvature at all."""
        found = {}
        for name, each in curvature.items():
            added = added_damping(each.diagonal(), self.damping)
            found[name] = damped_power(name, each, added, exponent) if bool(each.any()) else torch.zeros_like(each)
        return found

    def matrix(self, blocks: Stages) -> Tensor | None:
        """Zeros [queries, train] in a file; None in a process that does not write."""
        if not blocks.ranks.is_main:
            return None
        return scratch_matrix(blocks.folder / "values", len(self.queries), len(self.study.train), self.sweep.dtype)


def _trak_model(method: _Method[Batch], blocks: Stages, values: Tensor | None) -> Tensor:
    """Add one model's products to `values` [queries, train]; its 1 - p of each training example, [train]."""
    objective = measurement(method.sweep.task)
    outputs = method.rows(blocks, "outputs", objective)
    losses = method.rows(blocks, "losses", training_loss(method.sweep.task))
    whole = {"all layers": slice(0, outputs.size)}
    inverse = method.powers(_mean_products((block for _, block in outputs.blocks()), whole), -1)
    _filled(values, preconditioned(method.asked(outputs), inverse, whole) / len(outputs), outputs)
    weights = torch.zeros(len(outputs), dtype=method.sweep.dtype)
    for (rows, output), (_, loss) in zip(outputs.blocks(), losses.blocks(), strict=True):
        squares = output.square().sum(1)
        weights[rows.start : rows.stop] = torch.where(squares > 0, (output * loss).sum(1) / squares, 0.0).cpu()
    return weights


def _covariances(rows: GradientRows[Batch]) -> dict[str, Tensor]:
    """The empirical Fisher matrix of each layer's projected gradients, [numbers, numbers] in float64."""
    return _mean_products((block for _, block in rows.blocks()), rows.parts)


def _mean_products(blocks: Iterable[Tensor], columns: Mapping[str, slice]) -> dict[str, Tensor]:
    """The mean of g g^T over the rows of all blocks, for each part of their columns, in float64."""
    totals: dict[str, Tensor] = {}
    count = 0
    for block in blocks:
        count += len(block)
        for name, part in columns.items():
            wide = block[:, part].double()
            product = wide.T @ wide
            totals[name] = totals[name] + product if name in totals else product
    return {name: total / count for name, total in totals.items()}


def _filled(
    values: Tensor | None,
    asked: Tensor,
    rows: GradientRows[Batch],
    prepared: Callable[[Tensor], Tensor] = lambda block: block,
) -> dict[str, Tensor]:
    """Add the products of queries [queries, numbers] and prepared rows to `values`, block by block."""
    if values is None:
        return {}
    for part, block in rows.blocks():
        values[:, part.start : part.stop] += (asked @ prepared(block).T).cpu()
    return {"values": values}


def _load(study: Study[Batch], path: Path | None) -> None:
    if path is not None:
        load_weights(study._sweep.model, path)
