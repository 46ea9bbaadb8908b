"""Trajectory Fisher: against dense matrices in the space of weights, walked step by step, and against MAGIC."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, mlp_case, relative_error
from tests.test_magic import CASES, RECIPE, Training, magic_scores, training_of
from wherefrom.methods.checkpoints import with_record
from wherefrom.runtime.errors import InputError, LossError
from wherefrom.store.recording import MOMENTS, RecordedCheckpoint
from wherefrom.store.weights import load_weights

DRAWS, SEED = 2, 5


def study_of(training: Training, folder: Path, checkpoints: int = 4, **execution: Any) -> wf.Study[Any]:
    """Of a recorded training, with its checkpoints in the folder too."""
    history = training.record(folder / "training", checkpoints)
    model = copy.deepcopy(training.model)
    load_weights(model, history[-1].path)
    settings = wf.Execution(progress=False, **execution)
    return wf.Study(folder / "run", model, training.task, train=training.train, history=history, execution=settings)


def dense(
    case: Case,
    training: Training,
    checkpoints: Sequence[RecordedCheckpoint],
    parameters: list[str],
    seed: int = SEED,
    draws: int = DRAWS,
    rank: int | None = None,
) -> Tensor:
    """Minus by how much each query's loss changes with each example's weight, by dense H, forwards through all steps.

    The recursion is linear, so the change of a weight by 1 gives its derivative.
    """
    recipe, steps = training.recipe, len(training.batches)
    task, model, count = case.task, copy.deepcopy(case.model), len(case.train)
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
    measured = torch.stack([gradient(task.measurement(model, task.collate([each]))) for each in case.queries])

    divisors = [training.divisor(step) for step in range(steps)]
    matrix = torch.zeros(len(square), len(square), dtype=square.dtype)
    for step, rows in enumerate(training.batches):
        for row in rows.tolist():
            matrix += fisher[nearest[step], row] / divisors[step] / steps
    if rank is not None:
        load_weights(model, checkpoints[-1].path)
        alone = [task.collate([each]) for each in case.train]
        once = [gradient(task.train_loss(model, each, wf.Sampler(seed, [row]))) for row, each in enumerate(alone)]
        root = preconditioner.sqrt()
        conditioned: list[Tensor] = [root * each for each in once]
        kept = leading_span(conditioned, list(weights), rank)
        restricted = kept / root[:, None] * root  # P^(-1/2) Pi P^(1/2)
        trained = {key: restricted @ each for key, each in trained.items()}
        measured = measured @ restricted.T
        matrix = restricted @ matrix @ restricted.T
    columns = []
    for example in range(count):
        moved, mean = torch.zeros_like(square), torch.zeros_like(square)
        for step, rate in enumerate(recipe.learning_rates):
            slope = matrix @ moved
            if example in training.batches[step].tolist():
                slope = slope + trained[nearest[step], example] / divisors[step]
            mean = recipe.betas[0] * mean + (1 - recipe.betas[0]) * slope
            corrected = mean / (1 - recipe.betas[0] ** (step + 1))
            moved = moved * (1 - rate * recipe.weight_decay) - rate * preconditioner * corrected
        columns.append(measured @ moved)
    return -torch.stack(columns, 1)


def leading_span(gradients: list[Tensor], weights: list[Tensor], rank: int) -> Tensor:
    """What projects on the leading directions of each matrix of weights, and of its bias as another column."""
    projectors, start = [], 0
    shapes = [each.shape for each in weights]
    while start < len(shapes):
        biased = start + 1 < len(shapes) and len(shapes[start + 1]) == 1
        outputs, inputs = shapes[start][0], shapes[start][1] + biased
        before = sum(each.numel() for each in weights[:start])
        flat = torch.stack(gradients)[:, before : before + outputs * inputs]
        found = [flat[:, : outputs * (inputs - biased)].view(-1, outputs, inputs - biased)]
        whole = torch.cat([*found, flat[:, outputs * (inputs - biased) :].unsqueeze(2)] if biased else found, 2)
        sides = []
        for size, each in ((outputs, whole.mT), (inputs, whole)):
            vectors = torch.linalg.svd(each.flatten(0, 1))[2][:rank]  # leading right singular vectors
            sides.append(
                vectors.T @ vectors if size > rank and outputs * inputs > rank**2 else torch.eye(size).to(each)
            )
        # From [out, in + 1] to weight and then bias.
        order = torch.arange(outputs * inputs).view(outputs, inputs)
        order = torch.cat([order[:, : inputs - biased].flatten(), order[:, inputs - biased :].flatten()])
        projectors.append(torch.kron(*sides)[order][:, order])
        start += 1 + biased
    whole_span: Tensor = torch.block_diag(*projectors)
    return whole_span


def parameters_of(study: wf.Study[Any]) -> list[str]:
    """Names of all tracked weights."""
    names = {id(each): name for name, each in study._sweep.model.named_parameters()}
    return [names[id(part.parameter)] for layer in study.layers.values() for part in layer.parts]


@pytest.mark.parametrize("name", ["classification", "regression", "GPT-2"])
@pytest.mark.parametrize("checkpoints", [1, 4])
def test_scores_are_those_of_dense_steps(name: str, checkpoints: int, tmp_path: Path) -> None:
    case, recipe = CASES[name]()
    training = training_of(case, recipe)
    study = study_of(training, tmp_path, checkpoints)
    found = study.score(case.queries, wf.TrajectoryFisher(training=training, draws=DRAWS, seed=SEED))
    expected = dense(case, training, with_record(study.history), parameters_of(study))
    assert expected.abs().max() > 1e-3
    assert relative_error(found.values, expected) < 1e-9


@pytest.mark.parametrize("rank", [2, 4])
def test_scores_in_leading_directions_are_those_of_dense_projections(rank: int, tmp_path: Path) -> None:
    case, recipe = CASES["classification"]()
    training = training_of(case, recipe)
    study = study_of(training, tmp_path)
    found = study.score(case.queries, wf.TrajectoryFisher(training=training, draws=DRAWS, rank=rank, seed=SEED)).values
    expected = dense(case, training, with_record(study.history), parameters_of(study), rank=rank)
    assert relative_error(found, expected) < 1e-8
    whole = dense(case, training, with_record(study.history), parameters_of(study))
    assert relative_error(expected, whole) > 1e-3


def test_it_comes_close_to_magic_where_a_training_is_nearly_linear(tmp_path: Path) -> None:
    """Squares, whose Fisher matrix is their curvature, all examples in each step, and so large an epsilon that Adam's
    second moments do not matter: what is left is the noise of draws."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(15, 3, generator=generator, dtype=torch.float64)
    examples: list[object] = [(each, each[:2].sin()) for each in inputs]
    model = nn.Linear(3, 2, bias=False).double()
    recipe = wf.TrainingRecipe(batch_size=12, learning_rates=[3.0] * 12, weight_decay=0.01, epsilon=30.0)
    training = wf.ReplayableTraining(model, wf.Regression(), examples[:12], recipe)
    exact = magic_scores(tmp_path / "magic", training, examples[12:]).values
    study = study_of(training, tmp_path, checkpoints=12)
    found = study.score(examples[12:], wf.TrajectoryFisher(training=training, draws=12)).values
    assert relative_error(found, exact) < 0.1
    first = study.score(examples[12:], wf.Dot()).values
    cosines = torch.nn.functional.cosine_similarity(torch.stack([found, first]), exact, dim=-1)
    assert cosines[0].min() > 0.995 > cosines[1].max()  # curvature does matter here


def test_layers_are_taken_as_memory_has_room(tmp_path: Path) -> None:
    case, recipe = CASES["GPT-2"]()
    training, method = training_of(case, recipe), wf.TrajectoryFisher(training=training_of(case, recipe), draws=DRAWS)
    values = [
        study_of(training, tmp_path / str(budget), memory_budget=budget).score(case.queries, method).values
        for budget in (None, 2**-13)
    ]
    assert relative_error(values[1], values[0]) < 1e-12


def test_products_of_draws_serve_other_queries(tmp_path: Path) -> None:
    case, recipe = CASES["classification"]()
    training = training_of(case, recipe)
    method = wf.TrajectoryFisher(training=training, draws=DRAWS, seed=SEED)
    study, fresh = (study_of(training, tmp_path / name) for name in ("one", "other"))
    study.score(case.queries[:2], method)
    stored = {file: file.stat().st_mtime_ns for file in (tmp_path / "one" / "run" / "trajectory").rglob("*.*")}
    found = study.score(case.queries[2:], method)
    assert relative_error(found.values, fresh.score(case.queries[2:], method).values) < 1e-12
    assert {file: file.stat().st_mtime_ns for file in stored} == stored != {}


def test_recorded_checkpoints_are_those_of_torch(tmp_path: Path) -> None:
    case = mlp_case()
    recipe = replace(RECIPE, epsilon=1e-14)  # so small that it does not matter where it stands
    recorded = training_of(case, recipe).record(tmp_path, 2)
    optimizer = torch.optim.AdamW(case.model.parameters(), betas=recipe.betas, eps=1e-14, weight_decay=0.1)
    for number, (rate, rows) in enumerate(zip(recipe.learning_rates, recipe.batches(12), strict=False), start=1):
        optimizer.zero_grad()
        batch = case.task.collate([case.train[row] for row in rows.tolist()])
        torch.autograd.backward(case.task.train_loss(case.model, batch) / len(rows))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for each in (each for each in recorded if each.step == number):
            weights, squares = load_file(each.path / "model.safetensors"), load_file(each.path / MOMENTS)
            for name, parameter in case.model.named_parameters():
                assert relative_error(weights[name], parameter.detach()) < 1e-9
                assert relative_error(squares[name], optimizer.state[parameter]["exp_avg_sq"]) < 1e-9
    assert [(each.step, each.steps, each.learning_rate) for each in recorded] == [
        (5, 5, recipe.learning_rates[4]), (9, 4, recipe.learning_rates[8]),
    ]  # fmt: skip


class OtherInputs(wf.Classification):
    """Gives the model other inputs where targets are drawn."""

    def train_loss(self, model: nn.Module, batch: Any, sampler: wf.Sampler | None = None) -> Tensor:
        shift = 0 if sampler is None else sum(sampler.examples)
        return super().train_loss(model, (batch[0] + shift, batch[1]), sampler)


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    case = mlp_case()
    training = training_of(case)
    with pytest.raises(InputError, match="draws=0: expected at least 1"):
        wf.TrajectoryFisher(training=training, draws=0)
    with pytest.raises(InputError, match="rank=0: expected at least 1, or None"):
        wf.TrajectoryFisher(training=training, rank=0)
    with pytest.raises(InputError, match=r"clipped to max_norm=0\.5.*Use Magic"):
        wf.TrajectoryFisher(training=training_of(case, replace(RECIPE, max_norm=0.5)))
    with pytest.raises(InputError, match="checkpoints=10: expected 1 to 9"):
        training.record(tmp_path, 10)
    study = study_of(training, tmp_path)
    with pytest.raises(InputError, match=r"last checkpoint was recorded with.*training\.record"):
        study.score(case.queries, wf.TrajectoryFisher(training=training_of(case, replace(RECIPE, weight_decay=0.2))))
    with pytest.raises(InputError, match="its examples are not the study's"):
        other = replace(case, train=case.train[1:])
        study.score(case.queries, wf.TrajectoryFisher(training=training_of(other)))
    for refused in (wf.Tokens(), wf.Aggregated(queries="sum")):
        with pytest.raises(InputError, match="TrajectoryFisher: its scores cannot be had so"):
            study.score(case.queries, wf.TrajectoryFisher(training=training), keep=refused)
    with pytest.raises(InputError, match="self_influence of TrajectoryFisher"):
        study.self_influence(wf.TrajectoryFisher(training=training))
    unrecorded = wf.Study(tmp_path / "unrecorded", case.model, case.task, train=case.train)
    with pytest.raises(InputError, match="history"):
        unrecorded.score(case.queries, wf.TrajectoryFisher(training=training))
    case = replace(case, task=OtherInputs())
    training = training_of(case)
    with pytest.raises(LossError, match="other inputs for other targets"):
        study_of(training, tmp_path / "inputs").score(case.queries, wf.TrajectoryFisher(training=training))
