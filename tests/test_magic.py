"""Gradients through a whole training: against finite differences, against one graph of all steps, with few states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import wherefrom as wf
from tests.models import Case, gpt2, mlp_case, relative_error, token_rows
from tests.runs import labels
from wherefrom.methods.magic.replay import Replay, StoredStates
from wherefrom.runtime.errors import InputError, LossError, MismatchError
from wherefrom.tasks.losses import IGNORED

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


def frozen_case() -> Case:
    case = mlp_case()
    next(case.model.children()).requires_grad_(False)
    return case


def regression_case() -> Case:
    case = mlp_case()
    inputs = [case.task.collate([each])[0][0] for each in (*case.train, *case.queries)]
    examples: list[object] = [(each, each[:3].sin()) for each in inputs]
    return Case(case.model, wf.Regression(), examples[:12], examples[12:])


CASES: dict[str, Callable[[], tuple[Case, wf.TrainingRecipe]]] = {
    "classification": lambda: (mlp_case(), RECIPE),
    "classification, clipped": lambda: (mlp_case(), replace(RECIPE, max_norm=0.3)),
    "classification, one layer frozen": lambda: (frozen_case(), RECIPE),
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
    trained = {name: each for name, each in case.model.named_parameters() if each.requires_grad}
    start = {name: each.detach().clone().requires_grad_() for name, each in trained.items()}
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
            loss = loss / sum(case.task.collate([case.train[row]])["labels"].shape[1] - 1 for row in rows)
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
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        found: Tensor = torch.func.functional_call(_Loss(case), named, (example,))
    return found


def magic_scores(
    path: Path,
    training: wf.ReplayableTraining[Any],
    queries: Sequence[object],
    *,
    query_batch_size: int | None = None,
    checkpoint_seconds: float = 60.0,
    name: str | None = None,
    overwrite: bool = False,
    **fields: Any,
) -> wf.Scores:
    """The scores of a training, of a study of it."""
    execution = wf.Execution(query_batch_size=query_batch_size, checkpoint_seconds=checkpoint_seconds, progress=False)
    study = wf.Study(path, training.model, training.task, train=training.train, execution=execution)
    return study.score(queries, wf.Magic(training=training, **fields), name=name, overwrite=overwrite)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_scores_equal_finite_differences(make: Callable[[], tuple[Case, wf.TrainingRecipe]], tmp_path: Path) -> None:
    case, recipe = make()
    training = training_of(case, recipe)
    scores = magic_scores(tmp_path, training, case.queries)
    expected = by_finite_differences(training, case.queries)
    assert expected.abs().max() > 1e-3
    assert relative_error(scores.values, expected) < 1e-6


@pytest.mark.parametrize("make", [each for name, each in CASES.items() if "dropout" not in name])
def test_scores_equal_one_graph_of_all_steps(
    make: Callable[[], tuple[Case, wf.TrainingRecipe]], tmp_path: Path
) -> None:
    case, recipe = make()
    scores = magic_scores(tmp_path, training_of(case, recipe), case.queries)
    assert relative_error(scores.values, by_one_graph(case, recipe)) < 1e-10


def test_the_training_is_that_of_torch() -> None:
    case = mlp_case()
    recipe = replace(RECIPE, epsilon=1e-14, max_norm=0.5)  # so small that it does not matter where it stands
    found = training_of(case, recipe).parameters()
    optimizer = torch.optim.AdamW(case.model.parameters(), betas=recipe.betas, eps=1e-14, weight_decay=0.1)
    order, norms = torch.Generator().manual_seed(6), []
    orders = [torch.randperm(12, generator=order) for _ in range(3)]
    for rate, rows in zip(RATES, [rows for each in orders for rows in each.split(5)], strict=True):
        optimizer.zero_grad()
        batch = case.task.collate([case.train[row] for row in rows.tolist()])
        torch.autograd.backward(case.task.train_loss(case.model, batch) / len(rows))
        norms.append(float(nn.utils.clip_grad_norm_(case.model.parameters(), 0.5)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert min(norms) < 0.5 < max(norms)
    assert relative_error(found, torch.cat([each.flatten() for each in case.model.parameters()])) < 1e-9


def test_trained_parameters_make_the_trained_model() -> None:
    case = frozen_case()
    training = training_of(case)
    trained = training.parameters()
    case.model.load_state_dict(training.by_name(trained), strict=False)
    measured = [case.task.measurement(case.model, case.task.collate([each])) for each in case.queries]
    assert torch.equal(torch.stack(measured), training.measurements(trained, case.queries))


def test_queries_together_are_as_one_at_a_time(tmp_path: Path) -> None:
    case = gpt2_case(dropout=0.2)
    together = magic_scores(tmp_path / "together", training_of(case), case.queries).values
    for number, query in enumerate(case.queries):
        alone = magic_scores(tmp_path / f"{number}", training_of(case), [query]).values
        assert relative_error(alone[0], together[number]) < 1e-12
    in_parts = magic_scores(tmp_path / "parts", training_of(case), case.queries, query_batch_size=2).values
    assert relative_error(in_parts, together) < 1e-12


def test_float32_is_close_to_float64(tmp_path: Path) -> None:
    found, expected = (
        magic_scores(tmp_path / f"{dtype}", training_of(case := gpt2_case(dtype=dtype)), case.queries).values
        for dtype in (torch.float32, torch.float64)
    )
    assert (found.dtype, expected.dtype) == (torch.float32, torch.float64)
    assert relative_error(found, expected) < 1e-3


@pytest.mark.parametrize("branching", [2, 3, 100])
@pytest.mark.parametrize("states_on_disk", [False, True])
def test_results_are_the_same_bits_whatever_is_stored(tmp_path: Path, branching: int, states_on_disk: bool) -> None:
    case = gpt2_case(dropout=0.2, dtype=torch.float32)
    usual = magic_scores(tmp_path / "usual", training_of(case), case.queries)
    other = magic_scores(
        tmp_path / "other", training_of(case), case.queries, branching=branching, states_on_disk=states_on_disk
    )
    assert torch.equal(usual.values, other.values)
    assert labels(tmp_path / "other" / "scores") == ["magic"]


class CountedStates(StoredStates):
    """Notes how many states were stored at once."""

    most = 0

    def store(self, step: int, state: Tensor) -> None:
        super().store(step, state)
        self.most = max(self.most, len(self))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 64, 100, 1000])
@pytest.mark.parametrize("branching", [None, 2, 3, 10])
def test_few_states_are_stored_and_few_steps_taken_again(steps: int, branching: int | None) -> None:
    taken = []

    def advance(state: Tensor, step: int) -> Tensor:
        assert state == step
        taken.append(step)
        return state + 1

    states = CountedStates()
    replay = Replay(torch.zeros(()), advance, steps, branching, states)
    assert replay.forwards() == steps
    assert taken == list(range(steps))
    assert [(step, int(state)) for step, state in replay.backwards()] == [(each, each) for each in range(steps)][::-1]
    again, levels = len(taken) - steps, 2
    if branching is not None:
        levels = next(each for each in range(1, 11) if branching**each >= steps)
    assert states.most <= (branching or math.isqrt(steps - 1) + 1) * levels
    assert again <= steps * (levels - 1)
    assert len(states) == 0


def test_a_killed_walk_goes_on_where_it_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(dropout=0.2, dtype=torch.float32)
    whole = magic_scores(tmp_path / "whole", training_of(case), case.queries)
    pulled: list[int] = []
    pull_back = wf.ReplayableTraining.pull_back

    def stopping(training: Training, state: Tensor, step: int, *more: Any) -> Tensor:
        pulled.append(step)
        if pulled == [8, 7, 6, 5]:
            raise KeyboardInterrupt
        return pull_back(training, state, step, *more)

    monkeypatch.setattr(wf.ReplayableTraining, "pull_back", stopping)
    with pytest.raises(KeyboardInterrupt):
        magic_scores(tmp_path / "killed", training_of(case), case.queries, checkpoint_seconds=0)
    again = magic_scores(tmp_path / "killed", training_of(case), case.queries, branching=2)
    assert pulled == [8, 7, 6, 5, 5, 4, 3, 2, 1, 0]
    assert torch.equal(whole.values, again.values)
    magic_scores(tmp_path / "killed", training_of(case), case.queries)
    assert len(pulled) == 10, "finished scores were computed again"


def test_scores_of_another_training_are_refused(tmp_path: Path) -> None:
    case = mlp_case()
    first = magic_scores(tmp_path, training_of(case), case.queries, name="mine")
    other = training_of(case, replace(RECIPE, seed=7))
    with pytest.raises(MismatchError, match="recipe"):
        magic_scores(tmp_path, other, case.queries, name="mine")
    replaced = magic_scores(tmp_path, other, case.queries, name="mine", overwrite=True)
    beside = magic_scores(tmp_path, training_of(case), case.queries)
    assert torch.equal(beside.values, first.values)
    assert replaced.method == "magic"
    assert not torch.equal(first.values, replaced.values)


def test_nothing_else_is_changed(tmp_path: Path) -> None:
    case = gpt2_case(dropout=0.2)
    before = {name: each.clone() for name, each in case.model.state_dict().items()}
    random_state = torch.get_rng_state()
    magic_scores(tmp_path, training_of(case), case.queries)
    assert all(torch.equal(each, before[name]) for name, each in case.model.state_dict().items())
    assert case.model.training
    assert torch.equal(torch.get_rng_state(), random_state)


def smoothness(activation: nn.Module, rate: float) -> float:
    """Over three directions, the mean."""
    case = mlp_case()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), activation, nn.Linear(16, 3)).double()
    recipe = replace(RECIPE, learning_rates=[rate] * 40, weight_decay=0.0)
    training = training_of(replace(case, model=model), recipe)
    return sum(wf.metasmoothness(training, seed=seed) for seed in range(3)) / 3


def test_a_smooth_training_is_told_from_one_that_is_not() -> None:
    assert smoothness(nn.Tanh(), 0.01) > 0.95
    assert smoothness(nn.ReLU(), 1.0) < 0.5


def test_a_training_that_does_not_move_is_smooth() -> None:
    assert smoothness(nn.Tanh(), 0.0) == 1.0


class MeanLoss(wf.Classification):
    def train_loss(self, model: nn.Module, batch: Any, sampler: wf.Sampler | None = None) -> Tensor:
        return super().train_loss(model, batch, sampler) / len(batch[0])


class PastTheOutputs(wf.Classification):
    def train_loss(self, model: nn.Module, batch: Any, sampler: wf.Sampler | None = None) -> Tensor:
        penalty = sum(each.square().sum() for each in model.parameters())
        return super().train_loss(model, batch, sampler) + len(batch[0]) * penalty


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.inner(inputs).sum()
        return found


@pytest.mark.parametrize("task", [MeanLoss(), PastTheOutputs()])
def test_a_loss_that_is_no_sum_over_rows_is_refused(task: wf.Task[Any]) -> None:
    with pytest.raises(InputError, match="cannot be weighted by example"):
        training_of(replace(mlp_case(), task=task))


def test_models_that_cannot_be_replayed_are_refused() -> None:
    case = mlp_case()
    models = {
        "a row for each": Scalar(),
        "batch normalisation": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(),
        "none that requires": nn.Linear(4, 3).double().requires_grad_(False),
        "bfloat16": nn.Linear(4, 3).bfloat16(),
    }
    for message, model in models.items():
        with pytest.raises(InputError, match=message):
            training_of(replace(case, model=model))
    training_of(replace(case, model=models["batch normalisation"].eval()))


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    impossible: dict[str, Any] = {
        "batch_size": 0, "learning_rates": [], "epsilon": 0.0, "betas": (0.9, 1.0), "max_norm": 0.0,
    }  # fmt: skip
    for name, value in impossible.items():
        with pytest.raises(InputError, match=name):
            replace(RECIPE, **{name: value})
    case = mlp_case()
    with pytest.raises(InputError, match="train is empty"):
        training_of(replace(case, train=[]))
    training = training_of(case)
    with pytest.raises(InputError, match="step=0"):
        wf.metasmoothness(training, step=0)
    with pytest.raises(InputError, match="queries is empty"):
        magic_scores(tmp_path, training, [])
    impossible = {"branching": 1, "query_batch_size": 0, "name": "../elsewhere"}
    for name, value in impossible.items():
        with pytest.raises(InputError, match=name):
            magic_scores(tmp_path, training, case.queries, **{name: value})


def test_a_training_that_diverges_is_named(tmp_path: Path) -> None:
    case = replace(regression_case(), model=nn.Linear(4, 3).double())
    training = training_of(case, replace(RECIPE, learning_rates=[1e200] * 6))
    with pytest.raises(LossError, match="measurement of query 0"):
        magic_scores(tmp_path, training, case.queries)
    assert not list((tmp_path / "scores").glob("*/manifest.json"))
