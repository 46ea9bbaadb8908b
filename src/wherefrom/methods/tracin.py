"""Scores summed over several checkpoints of a training, and weights of checkpoints put into a model.

Each checkpoint's factors and scores are an ordinary run directory, `RUN/checkpoints/NAME`, so that what is finished is
reused and what was interrupted goes on. This module is above `study`; it knows checkpoint files, not how they came
about.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import Unpack

from wherefrom.runtime.errors import InputError
from wherefrom.scoring.kept_scores import keep_scores
from wherefrom.scoring.options import RescoredOptions, checked_result_name
from wherefrom.scoring.results import Scores
from wherefrom.store.cache import Stages
from wherefrom.store.files import checked_name, scratch_matrix, within
from wherefrom.store.fingerprint import Dataset, Fingerprint
from wherefrom.store.names import result_name
from wherefrom.store.weights import load_weights, restored
from wherefrom.study import Study
from wherefrom.tasks.task import Batch

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint


def score_checkpoints(
    study: Study[Batch],
    checkpoints: Sequence[str | Path | RecordedCheckpoint],
    queries: Dataset[object],
    strategy: str = "identity",
    weights: Sequence[float] | None = None,
    *,
    empirical: bool = False,
    seed: int = 0,
    **options: Unpack[RescoredOptions],
) -> Scores:
    """Score every pair at each of several checkpoints, and add up: `sum_k weight_k scores_k`.

    With "identity" and learning rates as weights this is TracInCP (Pruthi et al. 2020):
    `sum_k eta_k g(theta_k, query) . g(theta_k, example)`, with losses summed over tokens. Other strategies precondition
    with factors that are fitted at each checkpoint.

    Args:
        study: its model has the checkpoints' structure; while this runs, it holds the weights of one after another,
            and in the end, also after an error, its own again.
        checkpoints: directories that `save_pretrained` or a Trainer wrote (of a whole model, or of the study's
            adapter), single files of weights (safetensors or torch), or what `read_recording` returned.
        queries: as in `Study.score`.
        strategy: as in `Study.fit`.
        weights: one for each checkpoint; by default the learning rates that were recorded, and for paths 1.
        empirical, seed: as in `Study.fit`, for strategies that fit factors.
        options: those of `RescoredOptions`; half precision also of the fit. `name` is that of the sum in `RUN/scores`,
            by default "STRATEGY-checkpoints" and a digest of all that it depends on. `overwrite` replaces the sum and
            its parts, no factors.

    Returns:
        The sum, stored as any scores; each part is in `RUN/checkpoints/CHECKPOINT/scores`, and serves other sums too.

    Raises:
        InputError: checkpoints and weights do not belong together, or a checkpoint is not of this model.
        WherefromError: as `Study.fit` and `Study.score`; what was finished before stays valid.
    """
    paths, weights = named_paths(checkpoints), _weights(checkpoints, weights)
    name = options.pop("name", None)
    if name is not None:
        checked_result_name(name)
    precision = options.get("half_precision", False)
    overwrite = options.get("overwrite", False)
    parts: dict[str, Scores] = {}
    with study.alone(), restored(study._sweep.model) as model:
        for checkpoint, path in paths.items():
            load_weights(model, path)
            there = study_of(study, checkpoint)
            factors = there.fit(strategy, empirical=empirical, seed=seed, half_precision=precision)
            parts[checkpoint] = there.score(queries, factors, **options)
        return kept_sum(study, f"{strategy}-checkpoints", name, parts, weights, overwrite)


def study_of(study: Study[Batch], checkpoint: str) -> Study[Batch]:
    """The same model, task and options, in the run directory of a checkpoint."""
    there = copy.copy(study)
    there.path = within(study.path, "checkpoints", checkpoint)
    return there


def kept_sum(
    study: Study[Batch],
    label: str,
    name: str | None,
    parts: Mapping[str, Scores],
    weights: Sequence[float],
    overwrite: bool,
) -> Scores:
    """The weighted sum of the scores of checkpoints, loaded or computed and kept.

    Args:
        label: what the sum is called, with a digest, where it has no name.
    """
    fingerprint = _fingerprint(parts, weights)

    def compute(blocks: Stages) -> dict[str, Tensor]:
        values = [part.values for part in parts.values()]
        return {"values": _weighted_sum(values, weights, blocks.folder / "values")} if blocks.ranks.is_main else {}

    called = result_name(label, fingerprint, name)
    return Scores.load(keep_scores(study.path, called, fingerprint, study.profile, overwrite, compute))


def named_paths(checkpoints: Sequence[str | Path | RecordedCheckpoint]) -> dict[str, Path]:
    """Where checkpoints are, by the names of their run directories."""
    if isinstance(checkpoints, str | Path) or not checkpoints:
        raise InputError(f"checkpoints={checkpoints!r}: expected a list of at least one checkpoint.")
    paths = [Path(each) if isinstance(each, str | Path) else each.path for each in checkpoints]
    named = {checked_name(path.resolve().name): path for path in paths}
    if len(named) < len(paths):
        raise InputError(
            f"checkpoints: {len(paths)} of them have {len(named)} names ({', '.join(named)}), by which their results "
            "are kept. Give each a name of its own."
        )
    return named


def _weights(checkpoints: Sequence[str | Path | RecordedCheckpoint], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1.0 if isinstance(each, str | Path) else each.learning_rate for each in checkpoints]
    if len(weights) != len(checkpoints):
        raise InputError(f"weights: {len(weights)} for {len(checkpoints)} checkpoints; expected one for each.")
    return [float(each) for each in weights]


def _fingerprint(parts: Mapping[str, Scores], weights: Sequence[float]) -> Fingerprint:
    """What all checkpoints have in common as it is, the rest checkpoint by checkpoint."""
    names = {name for part in parts.values() for name in part.fingerprint}
    joined: dict[str, str] = {}
    for name in sorted(names):
        values = {checkpoint: part.fingerprint.get(name, "nothing") for checkpoint, part in parts.items()}
        alike = len(set(values.values())) == 1
        joined[name] = next(iter(values.values())) if alike else "; ".join(f"{k}: {v}" for k, v in values.items())
    joined["models"] = joined.pop("model")  # which are not the study's own
    joined["checkpoints"] = " + ".join(f"{weight!r} x {name}" for name, weight in zip(parts, weights, strict=True))
    return joined


def _weighted_sum(parts: Sequence[Tensor], weights: Sequence[float], file: Path) -> Tensor:
    """Row by row in a file: the matrices lie on disk and may be larger than the memory."""
    rows, columns = parts[0].shape
    total = scratch_matrix(file, rows, columns, parts[0].dtype)
    for row in range(rows):
        total[row] = sum(weight * part[row] for weight, part in zip(weights, parts, strict=True))
    return total
