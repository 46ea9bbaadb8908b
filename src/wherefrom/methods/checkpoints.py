"""Methods over several checkpoints of a training have these in common: which, and the sum of their scores.

Each checkpoint's factors and scores are an ordinary run directory, `RUN/checkpoints/NAME`, so that what is finished is
reused and what was interrupted goes on. This module knows checkpoint files, not how they came about.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wherefrom.engine.loading import token_counts
from wherefrom.methods.method import Context, dense
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import Scores
from wherefrom.store.cache import Unfinished
from wherefrom.store.files import checked_name

if TYPE_CHECKING:
    from wherefrom.methods.method import Checkpoint
    from wherefrom.store.recording import RecordedCheckpoint

logger = logging.getLogger("wherefrom")


def chosen_checkpoints(context: Context[Any], given: Sequence[Checkpoint] | None) -> Sequence[Checkpoint]:
    """Checkpoints that a method was given, or those of the study's history.

    Raises:
        InputError: there are none.
    """
    found = context.history if given is None else given
    if isinstance(found, str | Path) or not found:
        raise InputError(
            f"checkpoints={given!r}: expected a list of at least one checkpoint, or None for the study's history, "
            "Study(history=read_recording(folder))."
        )
    if given is None:
        warn_of_other_weights(context)
    return found


def warn_of_other_weights(context: Context[Any]) -> None:
    """Say that a study's history ends with other weights than its model has: it is another training's, or longer."""
    last = context.history[-1]
    path = Path(last) if isinstance(last, str | Path) else last.path
    differing = context.states.differing(path)
    if differing is not None and context.ranks.is_main:
        logger.warning(
            f"The study's history ends with {path}, whose weights are not those of the model ({differing} for one). "
            "What is taken from it is about that training, up to there: give the history of the training that ended "
            "with this model, or the model that this training ended with."
        )


def named_paths(checkpoints: Sequence[Checkpoint]) -> dict[str, Path]:
    """Where checkpoints are, by the names of their run directories."""
    paths = [Path(each) if isinstance(each, str | Path) else each.path for each in checkpoints]
    named = {checked_name(path.resolve().name): path for path in paths}
    if len(named) < len(paths):
        raise InputError(
            f"checkpoints: {len(paths)} of them have {len(named)} names ({', '.join(named)}), by which their results "
            "are stored. Give each a name of its own."
        )
    return named


def with_record(checkpoints: Sequence[Checkpoint]) -> list[RecordedCheckpoint]:
    """Those of which more than weights is known."""
    return [each for each in checkpoints if not isinstance(each, str | Path)]


def recorded_only(checkpoints: Sequence[Checkpoint], option: str, needed: str, advice: str) -> list[RecordedCheckpoint]:
    """Checkpoints that have a record of what an option needs.

    Raises:
        InputError: one is a path.
    """
    for each in checkpoints:
        if isinstance(each, str | Path):
            raise InputError(f"{option} with the checkpoint {str(each)!r}: a path says nothing of {needed}. {advice}")
    return with_record(checkpoints)


def recorded_times(checkpoints: Sequence[RecordedCheckpoint]) -> list[float]:
    """Learning rate x optimizer steps since the checkpoint before, or the start, for each checkpoint.

    By their own steps, since `RecordedCheckpoint.steps` counts from checkpoints that may not be among these.

    Raises:
        InputError: they are not in the order of one training.
    """
    steps = [0, *(each.step for each in checkpoints)]
    if any(after <= before for before, after in pairwise(steps)):
        raise InputError(f"checkpoints: of the steps {steps[1:]}; expected them in the order of one training.")
    since = [after - before for before, after in pairwise(steps)]
    return [each.learning_rate * count for each, count in zip(checkpoints, since, strict=True)]


def trained_scale(context: Context[Any], given: float | None) -> float:
    """What training minimised, in units of the mean over examples of the task's loss.

    Args:
        given: as it is; None is 1 / the mean number of tokens whose losses an example's is the sum of, which training
            is taken to have averaged over.

    Raises:
        InputError: no training example has such a token.
    """
    if given is not None:
        return given
    counts = token_counts(context.train, context.sweep.model)
    examples, tokens = len(counts), sum(counts)
    if not tokens:
        raise InputError("loss_scale=None: no training example has a token with a loss. Give a number.")
    scale = examples / tokens
    if context.ranks.is_main and tokens != examples:
        logger.info(
            f"loss_scale={scale:.4g}: training is taken to have averaged its loss over tokens, of which an example has "
            f"{tokens / examples:.1f}. Give another if it was summed over them, or weighted."
        )
    return scale


def sum_settings(parts: Mapping[str, Mapping[str, str]], weights: Sequence[float]) -> dict[str, str]:
    """What a sum of scores depends on: what all parts have in common as it is, the rest checkpoint by checkpoint.

    Args:
        parts: what the scores of each checkpoint depend on.
    """
    found: dict[str, str] = {}
    for name in sorted({name for part in parts.values() for name in part}):
        values = {checkpoint: part.get(name, "nothing") for checkpoint, part in parts.items()}
        alike = len(set(values.values())) == 1
        found[name] = next(iter(values.values())) if alike else "; ".join(f"{k}: {v}" for k, v in values.items())
    found["checkpoints"] = " + ".join(f"{weight!r} x {name}" for name, weight in zip(parts, weights, strict=True))
    return found


def weighted_sum(parts: Sequence[Scores], weights: Sequence[float], result: Unfinished) -> dict[str, Tensor]:
    """The sum of matrices that lie on disk and may be larger than the memory."""
    (queries, train), itemsize = parts[0].values.shape, parts[0].values.element_size()

    def some(chosen: range) -> Tensor:
        total = torch.zeros(len(chosen), train, dtype=parts[0].values.dtype)
        for weight, part in zip(weights, parts, strict=True):
            total += weight * part.values[chosen.start : chosen.stop]
        return total

    return dense(result, queries, train, itemsize, some)
