"""Trajectory Fisher: against dense matrices in the space of weights, walked step by step, and against MAGIC."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wherefrom as wf
from tests.models import Case, mlp_case, relative_error
from tests.test_magic import CASES, RECIPE, Training, magic_scores, training_of
from wherefrom.runtime.errors import InputError
from wherefrom.store.recording import MOMENTS, RecordedCheckpoint
from wherefrom.store.weights import load_weights

DRAWS, SEED = 2, 5


def study_of(training: Training, folder: Path, checkpoints: int = 4, **execution: Any) -> wf.Study[Any]:
    """Of a recorded training, with its checkpoints in the folder too."""
    history = training.record(folder / "training", checkpoints)
    model = training.model
    load_weights(model, history[-1].path)
    settings = wf.Execution(progress=False, **execution)
    return wf.Study(folder / "run", model, training.task, train=training.train, history=history, execution=settings)


def dense(
    case: Case,
    training: Training,
    checkpoints: list[RecordedCheckpoint],
    parameters: list[str],
    queries: list[object],
    draws: int = DRAWS,
    seed: int = SEED,
    change: float = 1.0,
) -> Tensor:
    """Minus by how much each query's loss changes with each example's weight, by dense H, forwards through all steps.

    The recursion is linear, so any change of a weight gives its derivative.
    """
    recipe, steps = training.recipe, len(training.batches)
    task, model, count = case.task, case.model, len(case.train)
    moments = load_file(checkpoints[-1].path / MOMENTS)
    square = torch.cat([moments[name].flatten() for name in parameters])
    preconditioner = 1 / (square / (1 - recipe.betas[1] ** steps) + recipe.epsilon**2).sqrt()
    weights = [dict(model.named_parameters())[name] for name in parameters]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])

    nearest = [min(range(len(checkpoints)), key=lambda c: abs(checkpoints[c].step - t)) for t in range(steps)]
    trained: dict[tuple[int, int], Tensor] = {}
    fisher: dict[tuple[int, int], Tensor] = {}
    for number, checkpoint in enumerate(checkpoints):
        load_weights(model, checkpoint.path)
        for row in {row for t, rows in enumerate(training.batches) if nearest[t] == number for row in rows.tolist()}:
            batch = task.collate([case.train[row]])
            trained[number, row] = gradient(task.train_loss(model, batch))
            positions = [count * (number + draw * len(checkpoints)) + row for draw in range(draws)]
            drawn = [gradient(task.train_loss(model, batch, wf.Sampler(seed, [each]))) for each in positions]
            fisher[number, row] = sum((torch.outer(each, each) / draws for each in drawn), torch.zeros(()))
    measured = torch.stack([gradient(task.measurement(model, task.collate([each]))) for each in queries])

    divisors = [training.divisor(step) for step in range(steps)]
    matrix = torch.zeros(len(square), len(square), dtype=square.dtype)
    for step, rows in enumerate(training.batches):
        for row in rows.tolist():
            matrix += fisher[nearest[step], row] / divisors[step] / steps
    columns = []
    for example in range(count):
        moved, mean = torch.zeros_like(square), torch.zeros_like(square)
        for step, rate in enumerate(recipe.learning_rates):
            slope = matrix @ moved
            if example in training.batches[step].tolist():
                slope = slope + change * trained[nearest[step], example] / divisors[step]
            mean = recipe.betas[0] * mean + (1 - recipe.betas[0]) * slope
            corrected = mean / (1 - recipe.betas[0] ** (step + 1))
            moved = moved * (1 - rate * recipe.weight_decay) - rate * preconditioner * corrected
        columns.append(measured @ moved / change)
    return -torch.stack(columns, 1)


def parameters_of(study: wf.Study[Any]) -> list[str]:
    names = {id(each): name for name, each in study._sweep.model.named_parameters()}
    return [names[id(part.parameter)] for layer in study.layers.values() for part in layer.parts]


@pytest.mark.parametrize("name", ["classification", "regression", "GPT-2"])
@pytest.mark.parametrize("checkpoints", [1, 4])
def test_scores_are_those_of_dense_steps(name: str, checkpoints: int, tmp_path: Path) -> None:
    case, recipe = CASES[name]()
    training = training_of(case, recipe)
    study = study_of(training, tmp_path, checkpoints)
    found = study.score(case.queries, wf.TrajectoryFisher(training=training, draws=DRAWS, seed=SEED))
    expected = dense(case, training, list(study.history), parameters_of(study), case.queries)
    assert expected.abs().max() > 1e-3
    assert relative_error(found.values, expected) < 1e-9
