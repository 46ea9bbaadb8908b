"""SOURCE: what training did with an example, by gradient descent unrolled segment by segment.

Bae et al. 2024 (arXiv 2405.12186). A training is cut into segments in which curvature H_l and gradients g_l are taken
to be constant, the means over the segment's checkpoints. With the learning rate eta and K steps of a segment,

    S_l = exp(-eta K H_l)    r_l = (1 - exp(-eta K H_l)) H_l^-1 g_l    score = g_query^T sum_l S_L ... S_{l+1} r_l

(their equations for the Jacobian, the response and the estimator). The curvature is that of averaged covariances and,
in their eigenvectors, averaged eigenvalues; so S and r are filters. Steps -eta P g of Adam, with P the mean of a
segment's checkpoints, are these in coordinates P^(-1/2) theta (see `conditioning`): with H'_l = P^(1/2) H_l P^(1/2),

    S_l = P^(1/2) exp(-eta K H'_l) P^(-1/2)    r_l = P^(1/2) (1 - exp(-eta K H'_l)) H'_l^-1 P^(1/2) g_l

Decoupled weight decay multiplies weights by 1 - eta omega in each step, in any coordinates, so it is omega added to the
curvature in both exponentials and in the inverse: a damping. This module is above `checkpoints` and `adam`; it knows
nothing of how checkpoints came about but learning rates, steps, weight decay and second moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Generic

import torch
from torch import Tensor

from wherefrom.curvature.conditioning import adam_conditioning, conditioning_digest, conditioning_roots
from wherefrom.curvature.factors import STRATEGIES, checked_strategy
from wherefrom.curvature.fitting import Fitting
from wherefrom.curvature.operators import Basis, Preconditioner
from wherefrom.methods.segments import SegmentScoring
from wherefrom.methods.tracin import kept_sum, named_paths, study_of
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.kept_scores import KeptScores
from wherefrom.scoring.options import Options, checked_result_name
from wherefrom.scoring.results import Scores
from wherefrom.store.cache import Stages
from wherefrom.store.files import within
from wherefrom.store.fingerprint import Dataset, checked_length, dataset_digest, model_digest
from wherefrom.store.names import result_name
from wherefrom.store.weights import load_weights, restored
from wherefrom.study import Study
from wherefrom.tasks.task import Batch, checked_settings

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


@dataclass(frozen=True)
class _Segment:
    """Checkpoints that follow each other.

    Attributes:
        paths: where they are, by name.
        time: the sum over its steps of learning rate x loss scale: eta K.
        models: what tells their weights apart.
        roots: P^(1/2) [out, in] of every layer, of the mean P; empty without one.
    """

    paths: Mapping[str, Path]
    time: float
    models: Sequence[str]
    roots: Mapping[str, Tensor]

    def __str__(self) -> str:
        conditioned = "".join(f", conditioned by {digest}" for digest in conditioning_digest(self.roots).values())
        return f"{' + '.join(self.paths)} ({', '.join(self.models)}) for {self.time!r}{conditioned}"


def score_source(
    study: Study[Batch],
    checkpoints: Sequence[str | Path | RecordedCheckpoint],
    queries: Dataset[object],
    segments: int = 3,
    *,
    adam: bool = False,
    strategy: str | None = None,
    times: Sequence[float] | None = None,
    weight_decay: float | None = None,
    loss_scale: float = 1.0,
    empirical: bool = False,
    seed: int = 0,
    query_batch_size: int | None = None,
    train_batch_size: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Scores:
    """Score every pair by SOURCE, approximate unrolled differentiation over segments of a training.

    Removing training example t of N from all of training raises the query's loss by about `values[q, t] / N`: values
    are N times the paper's, with its sign. The query's gradient is that at the last checkpoint; training gradients are
    those at every checkpoint, averaged in each segment. There is no damping but weight decay's: where an eigenvalue is
    small against 1 / (eta K), training has not used it.

    Steps are taken to be those of gradient descent, or with `adam` of AdamW. SGD's momentum makes steps larger: give
    `times` divided by 1 - momentum. Adam's does not, since it is a running mean.

    Args:
        study, queries: as in `score_checkpoints`.
        checkpoints: as in `score_checkpoints`, in the order of training; the last is the trained model.
        segments: into how many runs of checkpoints training is cut, of equal length or one longer.
        adam: steps are -eta P g with Adam's P (`adam_conditioning`), averaged over a segment's checkpoints, which have
            to be recorded ones. P is that of the checkpoints: what an example has done to second moments is left out.
        strategy: whose curvature: "shampoo", "diagonal" or, without `adam`, "ekfac"; by default "shampoo" with `adam`,
            "ekfac" without.
        times: for each checkpoint, learning rate x optimizer steps since the one before of these; by default as
            recorded, with the checkpoint's learning rate for all steps since the one before.
        weight_decay: omega. A step multiplies weights by 1 - eta omega, as AdamW's does; for gradient descent, omega
            may as well stand in the loss, as SGD has it. By default as recorded, the largest of the groups'
            (a Trainer leaves out biases and normalisations; what is left out counts as the rest); 0 for paths. Adam's
            own, which P divides, is not in here: give 0.
        loss_scale: what training minimised, in units of the mean over examples of the task's loss, which is a sum over
            tokens: 1 / tokens of a sequence for a Trainer that averages over tokens.
        empirical, seed: as in `Study.fit`.
        query_batch_size, train_batch_size: None finds them.
        name: of the sum in `RUN/scores`; by default "source", and a digest of all that it depends on.
        overwrite: compute again and replace the sum, also where it has this name and was made from something else,
            which is refused otherwise, and its parts; no curvature.

    Returns:
        The sum, stored as any scores; each part is in `RUN/checkpoints/CHECKPOINT/scores`, and the curvature of
        segments in `factors` there and in the run directory, which serves other queries too.

    Raises:
        InputError: checkpoints, segments and times do not belong together, a checkpoint is not of this model, or lacks
            the second moments that `adam` needs.
        WherefromError: as `Study.fit` and `Study.score`; what was finished before stays valid.
    """
    checked_length("queries", queries)
    if name is not None:
        checked_result_name(name)
    options = Options(query_batch_size=query_batch_size, train_batch_size=train_batch_size, overwrite=overwrite)
    paths = named_paths(checkpoints)
    if not 0 < loss_scale < math.inf:
        raise InputError(f"loss_scale={loss_scale}: expected a number above 0.")
    strategy = _checked_strategy(strategy or ("shampoo" if adam else "ekfac"), adam)
    scaled = [time * loss_scale for time in _times(checkpoints, times)]
    advice = "Give what read_recording returns, or a RecordedCheckpoint."
    recorded = _recorded(checkpoints, "adam=True", "Adam's second moments", advice) if adam else None
    decay = _weight_decay(checkpoints, weight_decay)
    if not 1 <= segments <= len(paths):
        raise InputError(f"segments={segments}: expected 1 to {len(paths)}, as many as there are checkpoints.")
    settings = _Settings(
        strategy=strategy,
        seed=None if empirical else seed,
        damping=decay / loss_scale,
        last=list(paths.values())[-1],
    )
    with study.alone(), restored(study._sweep.model):
        source = _Source(study, queries, settings, options)
        cut = source.segments(paths, scaled, segments, recorded)
        parts: dict[str, Scores] = {}
        later: list[Preconditioner] = []  # S of later segments, the last one first
        for number, segment in reversed(list(enumerate(cut))):
            bases, eigenvalues = source.curvature(segment, number + 1)
            response = {layer: response_filter(each, segment.time) for layer, each in eigenvalues.items()}
            decays = {layer: (-segment.time * each).exp() for layer, each in eigenvalues.items()}
            here = Preconditioner(bases, response, roots=segment.roots)
            parts |= source.scores(segment, list(later), here, " | ".join(map(str, cut[number:])))
            later.append(replace(here, filters=decays))
        weights = [1 / len(segment.paths) for segment in cut for _ in segment.paths]
        return kept_sum(study, "source", name, {each: parts[each] for each in paths}, weights, overwrite)


def _checked_strategy(name: str, adam: bool) -> str:
    strategy = checked_strategy(name)
    if strategy.eigenvalues != "fitted" or (adam and strategy.basis == "covariances"):
        expected = "'shampoo' or 'diagonal'" if adam else "'ekfac', 'shampoo' or 'diagonal'"
        raise InputError(f"strategy={name!r} with adam={adam}: expected {expected}.")
    return name


def _recorded(
    checkpoints: Sequence[str | Path | RecordedCheckpoint], option: str, needed: str, advice: str
) -> list[RecordedCheckpoint]:
    """Checkpoints that have a record of what an option needs; paths are refused."""
    for each in checkpoints:
        if isinstance(each, str | Path):
            raise InputError(f"{option} with the checkpoint {str(each)!r}: a path says nothing of {needed}. {advice}")
    return _with_record(checkpoints)


def _with_record(checkpoints: Sequence[str | Path | RecordedCheckpoint]) -> list[RecordedCheckpoint]:
    return [each for each in checkpoints if not isinstance(each, str | Path)]


def _weight_decay(checkpoints: Sequence[str | Path | RecordedCheckpoint], given: float | None) -> float:
    if given is not None:
        if not 0 <= given < math.inf:
            raise InputError(f"weight_decay={given}: expected a number >= 0, or None for what was recorded.")
        return given
    found = {max(group.weight_decay or 0.0 for group in each.groups) for each in _with_record(checkpoints)}
    if len(found) > 1:
        raise InputError(f"weight_decay=None, and {sorted(found)} were recorded. Give one number for all of training.")
    return found.pop() if found else 0.0


def _times(checkpoints: Sequence[str | Path | RecordedCheckpoint], times: Sequence[float] | None) -> list[float]:
    if times is None:
        advice = (
            "Give for each checkpoint its learning rate x the steps since the one before, or what read_recording "
            "returns."
        )
        return _recorded_times(_recorded(checkpoints, "times=None", "learning rates", advice))
    if len(times) != len(checkpoints) or not all(0 <= each < math.inf for each in times):
        raise InputError(f"times={list(times)}: expected {len(checkpoints)} numbers >= 0, one for each checkpoint.")
    return [float(each) for each in times]


def _recorded_times(checkpoints: Sequence[RecordedCheckpoint]) -> list[float]:
    """By their own steps, since `RecordedCheckpoint.steps` counts from checkpoints that may not be among these."""
    steps = [0, *(each.step for each in checkpoints)]
    if any(after <= before for before, after in pairwise(steps)):
        raise InputError(f"checkpoints: of the steps {steps[1:]}; expected them in the order of one training.")
    since = [after - before for before, after in pairwise(steps)]
    return [each.learning_rate * count for each, count in zip(checkpoints, since, strict=True)]


def _mean(parts: Iterable[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Of tensors by name, made one after another."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, each in part.items():
            total[name] = each / count + total.get(name, 0.0)
    return total


def response_filter(eigenvalues: Tensor, time: float) -> Tensor:
    """(1 - exp(-time Lambda)) / Lambda, and its limit `time` where Lambda is 0."""
    scaled = time * eigenvalues  # 0 also where the product of two small numbers vanishes
    safe = torch.where(scaled > 0, scaled, 1.0)
    return time * torch.where(scaled > 0, -torch.expm1(-safe) / safe, 1.0)


@dataclass(frozen=True)
class _Settings:
    """What scores depend on, beside checkpoints and queries.

    Attributes:
        strategy: whose curvature.
        seed: of targets drawn from the model; None takes the dataset's own.
        damping: weight decay in the unit of the curvature, whose loss is `loss_scale` times too large.
        last: the checkpoint of which query gradients are.
    """

    strategy: str
    seed: int | None
    damping: float
    last: Path


@dataclass(frozen=True)
class _Source(Generic[Batch]):
    """What all segments have in common."""

    study: Study[Batch]
    queries: Dataset[object]
    settings: _Settings
    options: Options

    def segments(
        self,
        paths: Mapping[str, Path],
        times: Sequence[float],
        count: int,
        recorded: Sequence[RecordedCheckpoint] | None,
    ) -> list[_Segment]:
        """Runs of checkpoints, the first ones longer where they cannot be equal.

        Args:
            recorded: the same checkpoints, where Adam's steps are taken.
        """
        models = {}
        for name, path in paths.items():
            load_weights(self.study._sweep.model, path)
            models[name] = model_digest(self.study._sweep.model)
        found, names, start = [], list(paths), 0
        for number in range(count):
            stop = start + len(names) // count + (number < len(names) % count)
            chosen = {name: paths[name] for name in names[start:stop]}
            roots = {} if recorded is None else self._roots(recorded[start:stop])
            found.append(_Segment(chosen, sum(times[start:stop]), [models[name] for name in chosen], roots))
            start = stop
        return found

    def _roots(self, checkpoints: Sequence[RecordedCheckpoint]) -> dict[str, Tensor]:
        return conditioning_roots(self.study._sweep, _mean(map(adam_conditioning, checkpoints), len(checkpoints)))

    def curvature(self, segment: _Segment, number: int) -> tuple[dict[str, Basis], dict[str, Tensor]]:
        """Of a segment: bases of averaged covariances, and eigenvalues there, averaged, with weight decay's part.

        Args:
            number: of the segment; parts are kept in `factors/source-NUMBER-DIGEST8` of the run and of each
                checkpoint's.
        """
        strategy = STRATEGIES[self.settings.strategy]

        def mean(part: Callable[[Fitting[Batch]], dict[str, Tensor]]) -> dict[str, Tensor]:
            def of(name: str) -> dict[str, Tensor]:
                load_weights(self.study._sweep.model, segment.paths[name])
                return part(self._fitting(study_of(self.study, name), segment, number))

            return _mean(map(of, segment.paths), len(segment.paths))

        def covariances(fitting: Fitting[Batch]) -> dict[str, Tensor]:
            fitting.stages.forget(strategy.stage("eigenvalues"))  # of a basis that is gone
            return fitting.covariances(strategy)

        whole = self._fitting(self.study, segment, number, model=" + ".join(segment.models))
        bases = whole.bases(strategy, lambda: mean(covariances)) if strategy.basis else {}
        eigenvalues = mean(lambda fitting: fitting.mean_squares(strategy, bases))
        return bases, {layer: each + self.settings.damping for layer, each in eigenvalues.items()}

    def _fitting(self, study: Study[Batch], segment: _Segment, number: int, model: str | None = None) -> Fitting[Batch]:
        fingerprint = self._fingerprint(study) | {"segment": " + ".join(segment.models)}
        fingerprint |= conditioning_digest(segment.roots)
        if model is not None:
            fingerprint["model"] = model
        folder = within(study.path, "factors", result_name(f"source-{number}", fingerprint))
        stages = Stages(folder, fingerprint, study.profile)
        batch_size = self.options.train_batch_size
        return Fitting(study._sweep, study.train, stages, self.settings.seed, batch_size, roots=segment.roots)

    def _fingerprint(self, study: Study[Batch]) -> dict[str, str]:
        seed = self.settings.seed
        targets = "dataset" if seed is None else f"sampled, seed {seed}"
        return study._fingerprint() | {"targets": targets, "precision": str(study._sweep.precision)}

    def scores(
        self, segment: _Segment, later: Sequence[Preconditioner], response: Preconditioner, described: str
    ) -> dict[str, Scores]:
        """What each checkpoint of a segment adds, before averaging.

        Args:
            later: S of later segments, the last one first.
            response: what makes r of gradients.
            described: this segment and the later ones, on which both depend.
        """
        found = {}
        measured = checked_settings(self.study._sweep.task).get("measure", "measurement")
        for name, path in segment.paths.items():
            load_weights(self.study._sweep.model, path)
            there = study_of(self.study, name)
            fingerprint = self._fingerprint(there) | {"strategy": "source", "segments": described}
            fingerprint |= {"curvature": self.settings.strategy, "damping": repr(self.settings.damping)}
            fingerprint |= {"queries": dataset_digest(self.queries), "measured": measured}
            scoring = SegmentScoring(
                there._sweep,
                STRATEGIES["identity"],
                Preconditioner({}, {}),
                self.queries,
                there.train,
                self.options,
                later=later,
                response=response,
                last=self.settings.last,
                here=path,
            )
            found[name] = KeptScores(there.path, scoring, "source", fingerprint, there.profile).scores()
        return found
