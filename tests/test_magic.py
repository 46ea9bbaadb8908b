"""Gradients through a whole training: against finite differences, against one graph of all steps, with few states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, gpt2, mlp_case, relative_error, token_rows
from wherefrom.errors import InputError, LossError, MismatchError
from wherefrom.losses import IGNORED
from wherefrom.unrolled.replay import KeptStates, Replay

Training = wf.ReplayableTraining[Any]

# Warm-up and decay over two and a half epochs of 12 or 14 examples: most are seen three times, in another order each.
RATES = [0.01 * min(1, (step + 1) / 3) * (1 - step / 12) for step in range(9)]
RECIPE = wf.TrainingRecipe(
    batch_size=5, learning_rates=RATES, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-3, seed=6
)


def predicted_tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def gpt2_case(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Case:
    model = gpt2(dtype, layers=1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.train(dropout > 0)
    return Case(model, wf.CausalLM(), token_rows(12), token_rows(3, seed=4))


def regression_case() -> Case:
    case = mlp_case()
    examples: list[object] = [(row[0], row[0][:3].sin()) for row in (*case.train, *case.queries)]  # type: ignore[index]
    return Case(case.model, wf.Regression(), examples[:12], examples[12:])


CASES: dict[str, Callable[[], tuple[Case, wf.TrainingRecipe]]] = {
    "classification": lambda: (mlp_case(), RECIPE),
    "classification, clipped": lambda: (mlp_case(), replace(RECIPE, max_norm=0.3)),
    "regression": lambda: (regression_case(), RECIPE),
    "GPT-2": lambda: (gpt2_case(), RECIPE),
    "GPT-2 with dropout": lambda: (gpt2_case(dropout=0.2), RECIPE),
}


def training_of(case: Case, recipe: wf.TrainingRecipe = RECIPE) -> Training:
    count = predicted_tokens if isinstance(case.task, wf.CausalLM) else None
    return wf.ReplayableTraining(case.model, case.task, case.train, recipe, count)


def by_finite_differences(training: Training, queries: list[object], step: float = 1e-3) -> Tensor:
    """-d measurement / d weight by central differences of fourth order, [queries, train]."""
    columns = []
    for example in range(len(training.train)):
        at = {}
        for number in (-2, -1, 1, 2):
            weights = torch.ones(len(training.train), dtype=torch.float64)
            weights[example] += number * step
            at[number] = training.measurements(training.parameters(weights), queries).detach()
        columns.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step))
    return -torch.stack(columns, dim=1)


def by_one_graph(case: Case, recipe: wf.TrainingRecipe) -> Tensor:
    """The same by a training written out with autograd, one example at a time, and one backward pass through it."""
    weights = torch.ones(len(case.train), dtype=torch.float64, requires_grad=True)
    start = {name: each.detach().clone().requires_grad_() for name, each in case.model.named_parameters()}
    parameters = dict(start)
    mean = {name: torch.zeros_like(each) for name, each in start.items()}
    square = {name: torch.zeros_like(each) for name, each in start.items()}
    first, second = recipe.betas
    generator = torch.Generator().manual_seed(recipe.seed)
    orders = [torch.randperm(len(case.train), generator=generator) for _ in range(4)]
    batches = [rows for order in orders for rows in order.split(recipe.batch_size)]
    for step, rate in enumerate(recipe.learning_rates):
        rows = batches[step].tolist()
        loss = sum(weights[row] * loss_of(case, parameters, case.train[row]) for row in rows)
        assert isinstance(loss, Tensor)
        if isinstance(case.task, wf.CausalLM):
            loss = loss / sum(len(case.train[row]["input_ids"]) - 1 for row in rows)  # type: ignore[index]
        else:
            loss = loss / len(rows)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        if recipe.max_norm is not None:
            norm = torch.stack([each.square().sum() for each in gradients]).sum().sqrt()
            gradients = tuple(each * recipe.max_norm / (norm + 1e-6) for each in gradients) if norm > 0.3 else gradients
        for name, gradient in zip(start, gradients, strict=True):
            mean[name] = first * mean[name] + (1 - first) * gradient
            square[name] = second * square[name] + (1 - second) * gradient**2
            corrected = mean[name] / (1 - first ** (step + 1))
            root = torch.sqrt(square[name] / (1 - second ** (step + 1)) + recipe.epsilon**2)
            parameters[name] = parameters[name] * (1 - rate * recipe.weight_decay) - rate * corrected / root
    measured = [loss_of(case, parameters, query) for query in case.queries]
    return -torch.stack([torch.autograd.grad(each, weights, retain_graph=True)[0] for each in measured])


class _Loss(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.task = case.model, case.task

    def forward(self, example: object) -> Tensor:
        return self.task.train_loss(self.model, self.task.collate([example]))


def loss_of(case: Case, parameters: dict[str, Tensor], example: object) -> Tensor:
    named = {f"model.{name}": each for name, each in parameters.items()}
    found: Tensor = torch.func.functional_call(_Loss(case), named, (example,))
    return found


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_scores_equal_finite_differences(make: Callable[[], tuple[Case, wf.TrainingRecipe]], tmp_path: Path) -> None:
    case, recipe = make()
    training = training_of(case, recipe)
    scores = wf.magic_scores(tmp_path, training, case.queries)
    expected = by_finite_differences(training, case.queries)
    assert expected.abs().max() > 1e-3
    assert relative_error(scores.values, expected) < 1e-6


@pytest.mark.parametrize("make", [each for name, each in CASES.items() if "dropout" not in name])
def test_scores_equal_one_graph_of_all_steps(
    make: Callable[[], tuple[Case, wf.TrainingRecipe]], tmp_path: Path
) -> None:
    case, recipe = make()
    case.model.set_attn_implementation("eager") if isinstance(case.task, wf.CausalLM) else None
    scores = wf.magic_scores(tmp_path, training_of(case, recipe), case.queries)
    assert relative_error(scores.values, by_one_graph(case, recipe)) < 1e-10
