"""MAGIC: the exact gradient of what is measured after a training by the weights of its examples; how smooth that is.

Ilyas & Engstrom 2025 (arXiv 2504.16430), by the replay of Engstrom et al. 2025 (arXiv 2503.13751). All queries share
one walk back through the training. This module knows nothing of how a step is taken or where a state is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.methods.magic.replay import Replay, StoredStates
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError, RankError, check_argument
from wherefrom.runtime.memory import within_memory
from wherefrom.runtime.progress import progress_bar
from wherefrom.runtime.signals import held_signals
from wherefrom.scoring.keep import Keep
from wherefrom.store.artifacts import Partial
from wherefrom.store.cache import Unfinished
from wherefrom.store.files import within
from wherefrom.store.fingerprint import LEFT_OUT, MODEL, Dataset, dataset_digest, model_digest
from wherefrom.tasks.descriptions import described, described_class
from wherefrom.tasks.task import Batch, checked_settings

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True, kw_only=True)
class Magic(Method):
    """MAGIC (Ilyas & Engstrom 2025, arXiv 2504.16430): the exact gradient through a training, with one seed.

    `values[q, t] = - d measurement_q / d weight_t` where all weights are 1 (MAGIC's equation for the influence, with
    our sign): to first order, leaving example t out of this very training raises the query's loss by `values[q, t]`,
    not by an Nth of it. It is the loss after training with this seed that is attributed, not an average over seeds.

    The training is run once, and then walked back: each step is taken again, with its derivatives, for all queries
    together. A walk that was killed goes on where it last saved, after the training has been run again up to there.

    Attributes:
        training: what made the study's model, of its training examples.
        branching: None holds about 2 sqrt(steps) states of three times the parameters, and takes each step once more;
            k holds about k log_k(steps), and takes each step log_k(steps) - 1 times more. Results are the same bits.
        states_on_disk: have them in the run directory instead of the host's memory.

    How many queries are taken back through a step together is the study's `query_batch_size`: None is all, fewer take
    less memory.
    """

    training: ReplayableTraining[Any]
    branching: int | None = None
    states_on_disk: bool = False

    name: ClassVar[str] = "magic"
    full_precision: ClassVar[str] = "training is repeated as it was"

    def rise(self, train: int) -> float | None:
        return 1.0

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        if context.ranks.count > 1:
            raise RankError(
                f"Magic in {context.ranks.count} processes: expected one, since a training is one chain of steps. "
                "Start it without torchrun."
            )
        execution, training = context.sweep.execution, self.training
        settings = self._settings(context)
        walk = _Walk(
            training,
            queries.dataset,
            self.branching,
            execution.query_batch_size,
            execution.checkpoint_seconds,
            execution.progress,
        )

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            folder = within(result.cache.folder, f"{result.name}.partial.states")
            advice = "Give a smaller query_batch_size."
            with within_memory("Derivatives of all queries do", training.start().device, advice):
                return walk.scores(result.sums, StoredStates(folder if self.states_on_disk else None))

        return Job("magic", settings, compute, without=[MODEL, "layers", LEFT_OUT])

    def _settings(self, context: Context[Any]) -> dict[str, str]:
        """What the scores depend on.

        Raises:
            InputError: the training is of other examples than the study's.
        """
        training, count = self.training, self.training.count
        if training.train is not context.train.dataset and dataset_digest(training.train) != context.train.digest:
            raise InputError(
                "training: its examples are not the study's. Make the Study with the training set that the model was "
                "trained on."
            )
        return {
            "model before training": model_digest(training.model),  # what is attributed is what came of it
            "mode": "training" if any(module.training for module in training.model.modules()) else "evaluation",
            "trained task": json.dumps(checked_settings(training.task), sort_keys=True),
            "recipe": f"{described_class(type(training.recipe))} {json.dumps(asdict(training.recipe))}",
            "count": "examples" if count is None else described("count", count),
        }


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
    check_argument(step > 0, "step", step, "a change of weights above 0, such as 0.01")
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

    def scores(self, partial: Partial, states: StoredStates) -> dict[str, Tensor]:
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

            replay = Replay(start, advance, left, self.branching, states)
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
