"""MAGIC: the exact gradient of what is measured after a training by the weights of its examples; how smooth that is.

Ilyas & Engstrom 2025 (arXiv 2504.16430), by the replay of Engstrom et al. 2025 (arXiv 2503.13751). All queries share
one walk back through the training. This module is above `training` and `replay`; it knows nothing of how a step is
taken or a state is kept.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor

from wherefrom.methods.magic.replay import KeptStates, Replay
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError, RankError
from wherefrom.runtime.memory import within_memory
from wherefrom.runtime.profile import Profile
from wherefrom.runtime.progress import progress_bar
from wherefrom.runtime.signals import held_signals
from wherefrom.scoring.options import checked_result_name
from wherefrom.scoring.results import Scores
from wherefrom.store.artifacts import Partial
from wherefrom.store.cache import Stages
from wherefrom.store.files import within
from wherefrom.store.fingerprint import Dataset, checked_length, dataset_digest, model_digest
from wherefrom.store.locks import run_lock
from wherefrom.store.names import log_others, result_name
from wherefrom.tasks.descriptions import described, described_class
from wherefrom.tasks.task import Batch, checked_settings
from wherefrom.version import VERSION

logger = logging.getLogger("wherefrom")


def magic_scores(
    path: str | Path,
    training: ReplayableTraining[Batch],
    queries: Dataset[object],
    *,
    name: str | None = None,
    branching: int | None = None,
    states_on_disk: bool = False,
    queries_at_once: int | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool | None = None,
    overwrite: bool = False,
) -> Scores:
    """Scores of every pair by the exact gradient through the training, or load them when they are there.

    `values[q, t] = - d measurement_q / d weight_t` where all weights are 1 (MAGIC's equation for the influence, with
    our sign): to first order, leaving example t out of this very training raises the query's loss by `values[q, t]`,
    not by an Nth of it. It is the loss after training with this seed that is attributed, not an average over seeds.

    The training is run once, and then walked back: each step is taken again, with its derivatives, for all queries
    together. A walk that was killed goes on where it last saved, after the training has been run again up to there.

    Args:
        path: the run directory; scores are kept in its `scores`.
        training: what made the model that is asked about.
        queries: examples of the kind that the task measures.
        name: of the scores in the run directory; by default "magic", and a digest of all that they depend on.
        branching: None keeps about 2 sqrt(steps) states of three times the parameters, and takes each step once more;
            k keeps about k log_k(steps), and takes each step log_k(steps) - 1 times more. Results are the same bits.
        states_on_disk: keep them in the run directory instead of the host's memory.
        queries_at_once: how many queries are taken back through a step together; None is all. Fewer take less memory.
        checkpoint_seconds: how often the walk back may save where it is; 0 is after every step.
        progress: show progress bars; None shows them when the standard error is a terminal.
        overwrite: compute them again and replace them, also where they have this name and were made from something
            else, which is refused otherwise. It replaces these scores alone.

    Raises:
        InputError: there are no queries, or an option is impossible.
        LossError: the training diverged.
        RankError: there are several processes.
        MemoryLimitError: the derivatives of all queries do not fit: [queries, 3, parameters], and a step's own.
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    checked_length("queries", queries)
    if queries_at_once is not None and queries_at_once < 1:
        raise InputError(f"queries_at_once={queries_at_once}: expected at least 1, or None.")
    if Ranks.current().count > 1:
        raise RankError(
            f"magic_scores in {Ranks.current().count} processes: expected one, since a training is one chain of steps. "
            "Start it without torchrun."
        )
    if name is not None:
        checked_result_name(name)
    folder = within(Path(path), "scores")
    walk = _Walk(training, queries, branching, queries_at_once, checkpoint_seconds, progress)
    device = training.start().device
    with run_lock(Path(path)), within_memory("Derivatives of all queries do", device, "Give fewer queries at once."):
        fingerprint = _fingerprint(training, queries)
        called = result_name("magic", fingerprint, name)
        stages = Stages(folder, fingerprint, Profile())
        if overwrite:
            stages.forget(called)
        log_others(folder / called, fingerprint)
        states = folder / f"{called}.partial.states" if states_on_disk else None
        stages.keep(called, lambda partial: walk.scores(partial, KeptStates(states)))
    return Scores.load(folder / called)


def metasmoothness(training: ReplayableTraining[Batch], step: float = 0.01, seed: int = 0) -> float:
    """How nearly linear the trained parameters are in the weights of examples: at most 1; near 0 it is chance.

    The empirical metasmoothness of Engstrom et al. 2025 (arXiv 2503.13751, definition 2): parameters are trained with
    weights 1, 1 + step v and 1 + 2 step v for a random direction v, and the signs of their two finite differences are
    compared, each parameter counting by how far it went in all. Where it is low, a gradient by the weights is exact and
    still says little about what leaving examples out will do. It costs three trainings.

    Args:
        step: how far apart the weights are.
        seed: of the direction, standard normal in each training example.

    Raises:
        InputError: `step` is not above 0.
    """
    if not step > 0:
        raise InputError(f"step={step}: expected a change of weights above 0, such as 0.01.")
    direction = torch.randn(len(training.train), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second, third = (training.parameters(1 + number * step * direction) for number in range(3))
    movement = (third - first).abs()
    if not bool(movement.any()):
        return 1.0
    agreement = (second - first).sign() * (third - second).sign()
    return float((agreement * movement).sum() / movement.sum())


@dataclass
class _Walk(Generic[Batch]):
    """A training and the walk back through it, with the derivatives of all queries."""

    training: ReplayableTraining[Batch]
    queries: Dataset[object]
    branching: int | None
    queries_at_once: int | None
    checkpoint_seconds: float
    progress: bool | None

    def scores(self, partial: Partial, kept: KeptStates) -> dict[str, Tensor]:
        """`values` [queries, train]; goes on from what a killed walk has saved, and saves itself."""
        training, steps = self.training, len(self.training.batches)
        start, queries = training.start(), len(self.queries)
        sums = {
            "cotangents": start.new_zeros(queries, *start.shape),
            "values": start.new_zeros(queries, len(training.train)),
        }
        saved = partial.load(sums)
        left = steps if saved is None else steps - saved[0]
        with progress_bar("training", left, self.progress) as show:

            def advance(state: Tensor, step: int) -> Tensor:
                show(step + 1)
                return training.advance(state, step)

            replay = Replay(start, advance, left, self.branching, kept)
            end = replay.forwards()
        if saved is None:
            sums["cotangents"][:, 0] = training.measured_gradients(end[0], self.queries)
        self._walk_back(replay, sums, partial)
        return {"values": sums["values"]}

    def _walk_back(self, replay: Replay, sums: dict[str, Tensor], partial: Partial) -> None:
        """Take the derivatives back to the first step, and add up those by the weights."""
        steps, next_save = len(self.training.batches), time.monotonic() + self.checkpoint_seconds
        with progress_bar("replay", steps, self.progress) as show, held_signals() as held:
            for step, state in replay.backwards():
                by_weight = self.training.pull_back(state, step, sums["cotangents"], self.queries_at_once)
                sums["values"][:, self.training.batches[step].to(by_weight.device)] -= by_weight
                show(steps - step)
                if step and (held.received or time.monotonic() >= next_save):
                    partial.save(sums, steps - step, self.training.recipe.batch_size)
                    next_save = time.monotonic() + self.checkpoint_seconds
                if held.received:
                    logger.warning(f"replay: {held.received.name}; saved before step {step}. The same call goes on.")
                    held.deliver()


def _fingerprint(training: ReplayableTraining[Batch], queries: Dataset[object]) -> dict[str, str]:
    """What the scores depend on."""
    task = checked_settings(training.task)
    count = training.count
    return {
        "library": VERSION,
        "strategy": "magic",
        "model before training": model_digest(training.model),  # what is attributed is what came of it
        "mode": "training" if any(module.training for module in training.model.modules()) else "evaluation",
        "task": json.dumps(task, sort_keys=True),
        "measured": task.get("measure", "measurement"),
        "recipe": f"{described_class(type(training.recipe))} {json.dumps(asdict(training.recipe))}",
        "count": "examples" if count is None else described("count", count),
        "training data": dataset_digest(training.train),
        "queries": dataset_digest(queries),
    }
