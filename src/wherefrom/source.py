"""SOURCE: what training did with an example, by gradient descent unrolled segment by segment.

Bae et al. 2024 (arXiv 2405.12186). A training is cut into segments in which curvature H_l and gradients g_l are taken
to be constant, the means over the segment's checkpoints. With the learning rate eta and K steps of a segment,

    S_l = exp(-eta K H_l)    r_l = (1 - exp(-eta K H_l)) H_l^-1 g_l    score = g_query^T sum_l S_L ... S_{l+1} r_l

(their equations for the Jacobian, the response and the estimator). The curvature is EK-FAC's, of averaged covariances
and, in their eigenvectors, averaged eigenvalues; so S and r are filters. This module is above `checkpoints`; it knows
nothing of how checkpoints came about but learning rates and steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor

from wherefrom.checkpoints import kept_sum, load_weights, named_paths, restored, study_of
from wherefrom.curvature import STRATEGIES, Basis, Preconditioner
from wherefrom.errors import InputError
from wherefrom.files import within
from wherefrom.fingerprint import Dataset, checked_length, dataset_digest, model_digest
from wherefrom.fitting import Fitting
from wherefrom.gradients import GradientBank
from wherefrom.kept_scores import KeptScores
from wherefrom.options import Options, checked_result_name
from wherefrom.scores import Scores
from wherefrom.scoring import Scoring
from wherefrom.stages import Stages
from wherefrom.study import Study
from wherefrom.task import Batch, checked_settings

if TYPE_CHECKING:
    from wherefrom.recording import RecordedCheckpoint

_EKFAC = STRATEGIES["ekfac"]
# Query gradients that are filtered at a time.
_QUERIES = 16


@dataclass(frozen=True)
class _Segment:
    """Checkpoints that follow each other.

    Attributes:
        paths: where they are, by name.
        time: the sum over its steps of learning rate x loss scale: eta K.
        models: what tells their weights apart.
    """

    paths: Mapping[str, Path]
    time: float
    models: Sequence[str]

    def __str__(self) -> str:
        return f"{' + '.join(self.paths)} ({', '.join(self.models)}) for {self.time!r}"


def score_source(
    study: Study[Batch],
    checkpoints: Sequence[str | Path | RecordedCheckpoint],
    queries: Dataset[object],
    segments: int = 3,
    *,
    times: Sequence[float] | None = None,
    loss_scale: float = 1.0,
    empirical: bool = False,
    seed: int = 0,
    query_batch_size: int | None = None,
    train_batch_size: int | None = None,
    name: str = "source",
    overwrite: bool = False,
) -> Scores:
    """Score every pair by SOURCE, approximate unrolled differentiation over segments of a training.

    Removing training example t of N from all of training raises the query's loss by about `values[q, t] / N`: values
    are N times the paper's, with its sign. The query's gradient is that at the last checkpoint; training gradients are
    those at every checkpoint, averaged in each segment. There is no damping: where an eigenvalue is small against
    1 / (eta K), training has not used it.

    Steps are taken to be those of gradient descent. With momentum, give `times` divided by 1 - momentum. The paper's
    variant for Adam, with its diagonal preconditioner in both filters, is not in here: a diagonal has no eigenvectors
    in common with a Kronecker product.

    Args:
        study, queries: as in `score_checkpoints`.
        checkpoints: as in `score_checkpoints`, in the order of training; the last is the trained model.
        segments: into how many runs of checkpoints training is cut, of equal length or one longer.
        times: for each checkpoint, learning rate x optimizer steps since the one before; by default as recorded.
        loss_scale: what training minimised, in units of the mean over examples of the task's loss, which is a sum over
            tokens: 1 / tokens of a sequence for a Trainer that averages over tokens.
        empirical, seed: as in `Study.fit`.
        query_batch_size, train_batch_size: None finds them.
        name: of the result in `RUN/scores`, and of the parts in `RUN/checkpoints/NAME`.
        overwrite: replace what has this name, instead of refusing when it was made from something else.

    Returns:
        The sum, stored as any scores; each part is in `RUN/checkpoints/NAME/scores`.

    Raises:
        InputError: checkpoints, segments and times do not belong together, or a checkpoint is not of this model.
        WherefromError: as `Study.fit` and `Study.score`; what was finished before stays valid.
    """
    checked_length("queries", queries)
    checked_result_name(name)
    options = Options(query_batch_size=query_batch_size, train_batch_size=train_batch_size, overwrite=overwrite)
    paths = named_paths(checkpoints)
    if not 0 < loss_scale < math.inf:
        raise InputError(f"loss_scale={loss_scale}: expected a number above 0.")
    scaled = [time * loss_scale for time in _times(checkpoints, times)]
    if not 1 <= segments <= len(paths):
        raise InputError(f"segments={segments}: expected 1 to {len(paths)}, as many as there are checkpoints.")
    with study.alone(), restored(study._sweep.model):
        source = _Source(study, queries, None if empirical else seed, name, options, list(paths.values())[-1])
        cut = source.segments(paths, scaled, segments)
        parts: dict[str, Scores] = {}
        if overwrite:
            source.forget(cut)
        later: list[Preconditioner] = []  # S of later segments, the last one first
        for number, segment in reversed(list(enumerate(cut))):
            bases, eigenvalues = source.curvature(segment, number + 1)
            response = {layer: response_filter(each, segment.time) for layer, each in eigenvalues.items()}
            chain = [*later, Preconditioner(bases, response)]
            parts |= source.scores(segment, chain, " | ".join(map(str, cut[number:])))
            decay = {layer: (-segment.time * each).exp() for layer, each in eigenvalues.items()}
            later.append(Preconditioner(bases, decay))
        weights = [1 / len(segment.paths) for segment in cut for _ in segment.paths]
        return kept_sum(study, name, {each: parts[each] for each in paths}, weights, overwrite)


def _times(checkpoints: Sequence[str | Path | RecordedCheckpoint], times: Sequence[float] | None) -> list[float]:
    if times is None:
        plain = [each for each in checkpoints if isinstance(each, str | Path)]
        if plain:
            raise InputError(
                f"times=None with the checkpoint {str(plain[0])!r}: a path says nothing of learning rates. Give for "
                "each checkpoint its learning rate x the steps since the one before, or what read_recording returns."
            )
        return [each.learning_rate * each.steps for each in checkpoints if not isinstance(each, str | Path)]
    if len(times) != len(checkpoints) or not all(0 <= each < math.inf for each in times):
        raise InputError(f"times={list(times)}: expected {len(checkpoints)} numbers >= 0, one for each checkpoint.")
    return [float(each) for each in times]


def response_filter(eigenvalues: Tensor, time: float) -> Tensor:
    """(1 - exp(-time Lambda)) / Lambda, and its limit `time` where Lambda is 0."""
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    return torch.where(eigenvalues > 0, -torch.expm1(-time * safe) / safe, time)


@dataclass(frozen=True)
class _Source(Generic[Batch]):
    """What all segments have in common.

    Attributes:
        seed: of targets drawn from the model; None takes the dataset's own.
        last: the checkpoint of which query gradients are.
    """

    study: Study[Batch]
    queries: Dataset[object]
    seed: int | None
    name: str
    options: Options
    last: Path

    def segments(self, paths: Mapping[str, Path], times: Sequence[float], count: int) -> list[_Segment]:
        """Runs of checkpoints, the first ones longer where they cannot be equal."""
        models = {}
        for name, path in paths.items():
            load_weights(self.study._sweep.model, path)
            models[name] = model_digest(self.study._sweep.model)
        found, names, start = [], list(paths), 0
        for number in range(count):
            stop = start + len(names) // count + (number < len(names) % count)
            chosen = {name: paths[name] for name in names[start:stop]}
            found.append(_Segment(chosen, sum(times[start:stop]), [models[name] for name in chosen]))
            start = stop
        return found

    def forget(self, segments: Sequence[_Segment]) -> None:
        """Delete the factors of all segments, whatever they were made from."""
        for number, segment in enumerate(segments, start=1):
            for study in (self.study, *(study_of(self.study, name) for name in segment.paths)):
                self._fitting(study, segment, number).stages.clear()

    def curvature(self, segment: _Segment, number: int) -> tuple[dict[str, Basis], dict[str, Tensor]]:
        """EK-FAC of a segment: bases of averaged covariances, and eigenvalues there, averaged.

        Args:
            number: of the segment; parts are kept in `factors/NAME-NUMBER` of the run and of each checkpoint's.
        """

        def mean(part: Callable[[Fitting[Batch]], dict[str, Tensor]]) -> dict[str, Tensor]:
            total: dict[str, Tensor] = {}
            for name, path in segment.paths.items():
                load_weights(self.study._sweep.model, path)
                fitting = self._fitting(study_of(self.study, name), segment, number)
                for key, each in part(fitting).items():
                    total[key] = each / len(segment.paths) + total.get(key, 0.0)
            return total

        whole = self._fitting(self.study, segment, number, model=" + ".join(segment.models))
        bases = whole.bases(_EKFAC, lambda: mean(lambda fitting: fitting.covariances(_EKFAC)))
        return bases, mean(lambda fitting: fitting.mean_squares(_EKFAC, bases))

    def _fitting(self, study: Study[Batch], segment: _Segment, number: int, model: str | None = None) -> Fitting[Batch]:
        fingerprint = self._fingerprint(study) | {"segment": " + ".join(segment.models)}
        if model is not None:
            fingerprint["model"] = model
        stages = Stages(within(study.path, "factors", f"{self.name}-{number}"), fingerprint, study.profile)
        return Fitting(study._sweep, study.train, stages, self.seed, self.options.train_batch_size)

    def _fingerprint(self, study: Study[Batch]) -> dict[str, str]:
        targets = "dataset" if self.seed is None else f"sampled, seed {self.seed}"
        return study._fingerprint() | {"targets": targets, "precision": str(study._sweep.precision)}

    def scores(self, segment: _Segment, chain: Sequence[Preconditioner], described: str) -> dict[str, Scores]:
        """What each checkpoint of a segment adds, before averaging.

        Args:
            chain: what query gradients are multiplied with, one after another.
            described: this segment and the later ones, on which the chain depends.
        """
        found = {}
        measured = checked_settings(self.study._sweep.task).get("measure", "measurement")
        for name, path in segment.paths.items():
            load_weights(self.study._sweep.model, path)
            there = study_of(self.study, name)
            fingerprint = self._fingerprint(there) | {"strategy": "source", "segments": described}
            fingerprint |= {"queries": dataset_digest(self.queries), "measured": measured}
            scoring = _SegmentScoring(
                there._sweep,
                STRATEGIES["identity"],
                Preconditioner({}, {}),
                self.queries,
                there.train,
                self.options,
                chain=chain,
                last=self.last,
                here=path,
            )
            found[name] = KeptScores(there.path, scoring, self.name, fingerprint, there.profile).scores()
        return found


@dataclass(frozen=True, kw_only=True)
class _SegmentScoring(Scoring[Batch]):
    """Scores of query gradients at one checkpoint with training gradients at another.

    Attributes:
        chain: what query gradients are multiplied with, one after another.
        last: the checkpoint of which query gradients are.
        here: that of training gradients, whose weights the model has but for those.
    """

    chain: Sequence[Preconditioner]
    last: Path
    here: Path

    def bank(self, rows: range) -> GradientBank:
        load_weights(self.sweep.model, self.last)
        bank = super().bank(rows)
        for each in self.chain:
            self._multiply(bank, each)
        load_weights(self.sweep.model, self.here)
        return bank

    def _multiply(self, bank: GradientBank, preconditioner: Preconditioner) -> None:
        """Multiply gradients [queries, out, width] with Q_S [ f(Lambda) * (Q_S^T G Q_A) ] Q_A^T where they lie."""
        layers, device = self.sweep.layers, self.sweep.device
        sides, filters = preconditioner.sides(layers), preconditioner.aligned_filters(layers)
        for name in layers:
            kept, columns = bank.sums[name], bank.sums.get(f"{name}.columns")
            left, right = sides[name].on(device)
            chosen = filters[name].to(device)  # [out, width]
            for start in range(0, len(kept), _QUERIES):
                rows = slice(start, start + _QUERIES)
                gradients = kept[rows].to(device)
                gradients = gradients if left is None else left.T @ gradients
                gradients = gradients if right is None else gradients @ right
                own = chosen if columns is None else chosen[:, columns[rows].to(device)].transpose(0, 1)
                gradients = gradients * own
                gradients = gradients if left is None else left @ gradients
                kept[rows] = (gradients if right is None else gradients @ right.T).to(kept.device)
