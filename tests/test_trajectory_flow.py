"""Trajectory flow: against dense steps with a dense Gauss-Newton matrix, and against MAGIC."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.dense_gauss_newton import Logits, dense, label_rows, system_of, token_logits
from tests.models import Case, relative_error
from tests.reference import BruteForce
from tests.test_magic import CASES, RECIPE, magic_scores, training_of
from tests.test_trajectory import study_of
from wherefrom.curvature.conditioning import adam_conditioning
from wherefrom.curvature.solvers.krylov import KrylovSpace
from wherefrom.methods.trajectory.flow import Walk
from wherefrom.methods.trajectory.steps import steps_of
from wherefrom.runtime.errors import InputError, LossError
from wherefrom.scoring.results import Scores
from wherefrom.store.recording import RecordedCheckpoint
from wherefrom.store.weights import load_weights

COMPLETE = wf.GradientFlow(300, 0.0, block_size=2)


def dense_steps(
    case: Case, training: wf.ReplayableTraining[Any], last: RecordedCheckpoint, layers: list[str], logits: Logits
) -> Tensor:
    """Minus by how much each query's loss changes with each example's weight, by dense H, forwards through all steps.

    The recursion is linear, so the change of a weight by 1 gives its derivative.
    """
    recipe, model = training.recipe, copy.deepcopy(case.model)
    load_weights(model, last.path)
    trained = replace(case, model=model)
    brute = BruteForce(model, case.task, layers, case.train, case.queries)
    queries, train = brute.vectors(brute.queries), brute.vectors(brute.train)
    step_sizes = adam_conditioning(last, inside=True)
    preconditioner = torch.cat([brute.matrix(name, step_sizes).flatten() for name in layers])
    divisors = [training.divisor(step) for step in range(len(training.batches))]
    followed = sum(len(batch) / divisor for batch, divisor in zip(training.batches, divisors, strict=True))
    with_layers: Any = type("Layers", (), {"layers": dict.fromkeys(layers)})
    matrix = dense(trained, with_layers, logits).detach() * followed / len(divisors)
    columns = []
    for example in range(len(case.train)):
        moved, mean = torch.zeros_like(preconditioner), torch.zeros_like(preconditioner)
        for step, rate in enumerate(recipe.learning_rates):
            slope = matrix @ moved
            if example in training.batches[step].tolist():
                slope = slope + train[example] / divisors[step]
            mean = recipe.betas[0] * mean + (1 - recipe.betas[0]) * slope
            corrected = mean / (1 - recipe.betas[0] ** (step + 1))
            moved = moved * (1 - rate * recipe.weight_decay) - rate * preconditioner * corrected
        columns.append(queries @ moved)
    return -torch.stack(columns, 1)


@pytest.mark.parametrize(("name", "logits"), [("classification", label_rows), ("GPT-2", token_logits)])
def test_scores_are_those_of_dense_steps(name: str, logits: Logits, tmp_path: Path) -> None:
    case, recipe = CASES[name]()
    training = training_of(case, recipe)
    study = study_of(training, tmp_path)
    last = study.history[-1]
    assert isinstance(last, RecordedCheckpoint)
    found = study.score(case.queries, wf.TrajectoryFlow(training=training, flow=COMPLETE))
    assert relative_error(found.values, dense_steps(case, training, last, list(study.layers), logits)) < 1e-6
    assert found.predicted_rise is not None and found.last_changes is not None
    top = study.score(case.queries, wf.TrajectoryFlow(training=training, flow=COMPLETE), keep=wf.Top(2))
    assert torch.equal(top.values, found.values.topk(2, dim=1).values)
    assert top.last_changes is not None and torch.equal(top.last_changes, found.last_changes)


def test_it_is_magic_where_a_training_is_linear(tmp_path: Path) -> None:
    """Squares, all examples in each step, and so large an epsilon that Adam's second moments do not matter."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(15, 3, generator=generator, dtype=torch.float64)
    examples: list[object] = [(each, each[:2].sin()) for each in inputs]
    model = nn.Linear(3, 2, bias=False).double()
    recipe = wf.TrainingRecipe(batch_size=12, learning_rates=[3.0] * 40, weight_decay=0.01, epsilon=300.0)
    training = wf.ReplayableTraining(model, wf.Regression(), examples[:12], recipe)
    exact = magic_scores(tmp_path / "magic", training, examples[12:]).values
    study = study_of(training, tmp_path, checkpoints=1)
    found = study.score(examples[12:], wf.TrajectoryFlow(training=training, flow=COMPLETE)).values
    assert float(torch.nn.functional.cosine_similarity(found, exact).min()) > 0.95


def test_an_example_counts_for_the_steps_that_saw_it(tmp_path: Path) -> None:
    case, recipe = CASES["classification"]()
    short = replace(recipe, learning_rates=recipe.learning_rates[:1])  # a step, of a part of the examples
    training = training_of(case, short)
    study = study_of(training, tmp_path, checkpoints=1)
    found = study.score(case.queries, wf.TrajectoryFlow(training=training, flow=COMPLETE)).values
    seen = torch.zeros(len(case.train), dtype=torch.bool)
    seen[training.batches[0]] = True
    assert not found[:, ~seen].any() and bool(found[:, seen].all())


def test_what_would_have_diverged_is_an_error(tmp_path: Path) -> None:
    case, recipe = CASES["classification"]()
    training = training_of(case, replace(recipe, learning_rates=[0.02] * 60, epsilon=1e-6))
    study = study_of(training, tmp_path, checkpoints=1)
    steps = [replace(each, rate=100 * each.rate) for each in steps_of(training)]
    walk = Walk(steps, 0.9, 0.0)
    system = system_of(study, case, 1.0)
    space = KrylovSpace(system.damping, torch.randn(2, len(system.damping), dtype=torch.float64))
    for _ in range(3):
        space.extend(1e4 * system.product(space.following))
    products = torch.ones(len(space.curvature), len(case.train))
    with pytest.raises(LossError, match="would have diverged"):
        walk.back(space, products, walk.seen(range(len(case.train))))


def test_what_is_resident_in_parts_is_the_same(tmp_path: Path) -> None:
    case, recipe = CASES["GPT-2"]()
    training = training_of(case, recipe)
    method = wf.TrajectoryFlow(training=training, flow=wf.GradientFlow(3, 0.0, examples=4, block_size=2))
    values = [
        study_of(training, tmp_path / str(budget), memory_budget=budget).score(case.queries, method).values
        for budget in (None, 1e-9)
    ]
    assert relative_error(values[1], values[0]) < 1e-10


def test_what_has_not_converged_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, recipe = CASES["classification"]()
    training = training_of(case, recipe)
    study, flow = study_of(training, tmp_path), wf.GradientFlow(1)
    with caplog.at_level(logging.WARNING, "wherefrom"):
        found = study.score(case.queries, wf.TrajectoryFlow(training=training, flow=flow))
    assert f"{flow} has not converged: the last iteration" in caplog.text
    stored = Scores.load(tmp_path / "run" / "scores" / found.name).last_changes
    assert stored is not None and found.last_changes is not None and torch.equal(stored, found.last_changes)


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    case, recipe = CASES["classification"]()
    training = training_of(case, recipe)
    with pytest.raises(InputError, match=r"clipped to max_norm=0\.5.*Use Magic"):
        wf.TrajectoryFlow(training=training_of(case, replace(RECIPE, max_norm=0.5)))
    study = study_of(training, tmp_path)
    with pytest.raises(InputError, match=r"last checkpoint was recorded with.*training\.record"):
        study.score(case.queries, wf.TrajectoryFlow(training=training_of(case, replace(RECIPE, weight_decay=0.2))))
    with pytest.raises(InputError, match="TrajectoryFlow: its scores cannot be had so"):
        study.score(case.queries, wf.TrajectoryFlow(training=training), keep=wf.Aggregated(queries="sum"))
