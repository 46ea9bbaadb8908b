"""Models trained together go the way that each goes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import wherefrom as wf
from tests.models import Mlp, gpt2, mlp_case, relative_error, token_rows
from wherefrom.evaluate.retrain import Retraining, half_subsets, retrain
from wherefrom.evaluate.stacked import StackedTraining
from wherefrom.runtime.errors import InputError
from wherefrom.tasks.losses import IGNORED
from wherefrom.tasks.task import Task

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "AdamW": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "SGD with momentum": partial(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
}
BATCH, EPOCHS = 3, 3
RETRAININGS = [
    Retraining((0, 1, 2, 3, 4, 5, 6), 0),
    Retraining((1, 3, 5, 7, 8, 9, 10), 1),
    Retraining((0, 2, 4, 6, 8, 10, 11), 0),
    Retraining((0, 1, 2, 3, 4, 5, 6), 5),
]  # of 12 examples; the last of an epoch's three batches has one


def rows(batch: Any) -> int:
    return len(batch[0])


def predicted_tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def alone(
    case: tuple[nn.Module, Task[Any], list[object], list[object]],
    optimizer: Callable[[list[Tensor]], Optimizer],
    retraining: Retraining,
    count: Callable[[Any], Tensor | int] = rows,
) -> Tensor:
    """The plain loop: one model, one backward pass a step. Each query's measurement after it: [queries]."""
    model, task, train, queries = case
    model = copy.deepcopy(model).eval()
    optimizer_ = optimizer([weight for weight in model.parameters() if weight.requires_grad])
    generator = torch.Generator().manual_seed(retraining.seed)
    kept = torch.tensor(retraining.subset)
    for _ in range(EPOCHS):
        for chosen in kept[torch.randperm(len(kept), generator=generator)].split(BATCH):
            batch = task.collate([train[row] for row in chosen.tolist()])
            optimizer_.zero_grad()
            torch.autograd.backward(task.train_loss(model, batch) / count(batch))
            optimizer_.step()
    with torch.no_grad():
        return torch.stack([task.measurement(model, task.collate([query])) for query in queries])


def regression_case() -> tuple[nn.Module, Task[Any], list[object], list[object]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    examples: list[object] = [
        (torch.randn(4, generator=generator).double(), torch.randn(3, generator=generator).double()) for _ in range(17)
    ]
    return Mlp().double(), wf.Regression(), examples[:12], examples[12:]


def classification_case() -> tuple[nn.Module, Task[Any], list[object], list[object]]:
    case = mlp_case()
    return case.model, case.task, case.train, case.queries


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("make_case", [classification_case, regression_case])
def test_stacked_models_are_the_models_trained_alone(
    make_case: Callable[[], tuple[nn.Module, Task[Any], list[object], list[object]]],
    optimizer: Callable[[list[Tensor]], Optimizer],
) -> None:
    case = make_case()
    before = copy.deepcopy(case[0].state_dict())
    training = StackedTraining(*case, optimizer=optimizer, batch_size=BATCH, epochs=EPOCHS)
    found = training(RETRAININGS)
    expected = torch.stack([alone(case, optimizer, each) for each in RETRAININGS])
    assert found.shape == (len(RETRAININGS), 5)
    assert relative_error(found, expected) < 1e-9
    # They are four different models, and none is the one where they started.
    untrained = torch.stack([case[1].measurement(case[0], case[1].collate([query])) for query in case[3]])
    distances = torch.cdist(torch.cat([found, untrained[None]]), torch.cat([found, untrained[None]]))
    assert bool((distances + torch.eye(5) > 1e-3).all())
    assert all(torch.equal(value, before[name]) for name, value in case[0].state_dict().items())


def test_frozen_weights_stay() -> None:
    case = classification_case()
    case[0].twice.requires_grad_(False)
    optimizer = OPTIMIZERS["AdamW"]
    training = StackedTraining(*case, optimizer=optimizer, batch_size=BATCH, epochs=EPOCHS)
    expected = torch.stack([alone(case, optimizer, each) for each in RETRAININGS])
    assert relative_error(training(RETRAININGS), expected) < 1e-9


def test_language_models_of_padded_sequences() -> None:
    model = gpt2(layers=1)
    model.set_attn_implementation("eager")
    case: tuple[nn.Module, Task[Any], list[object], list[object]] = (
        model, wf.CausalLM(), token_rows(12), token_rows(5, seed=4),
    )  # fmt: skip
    optimizer = OPTIMIZERS["AdamW"]
    training = StackedTraining(*case, optimizer=optimizer, batch_size=BATCH, epochs=EPOCHS, count=predicted_tokens)
    expected = torch.stack([alone(case, optimizer, each, predicted_tokens) for each in RETRAININGS[:2]])
    assert relative_error(training(RETRAININGS[:2]), expected) < 1e-9


def test_a_bank_trained_together_on_two_processes(tmp_path: Path) -> None:
    case = classification_case()
    optimizer = OPTIMIZERS["SGD with momentum"]
    training = StackedTraining(*case, optimizer=optimizer, batch_size=BATCH, epochs=EPOCHS)
    masks, seeds = half_subsets(12, 3), (4, 2)
    found = retrain(tmp_path / "bank", training, masks, seeds, fingerprint={"model": "an MLP"}, workers=2, together=4)
    for subset, mask in enumerate(masks):
        for repeat, seed in enumerate(seeds):
            kept = tuple(mask.nonzero().flatten().tolist())
            expected = alone(case, optimizer, Retraining(kept, seed))
            assert relative_error(found.losses[subset, repeat], expected) < 1e-9


class Named(wf.Classification):
    """Collates something that is no tensor."""

    def collate(self, examples: Any) -> Any:
        return [*super().collate(examples), "name"]


class Total(wf.Classification):
    """Collates something that has no row for each example."""

    def collate(self, examples: Any) -> Any:
        return [*super().collate(examples), torch.tensor([1.0, 2.0])]


def test_what_cannot_be_stacked_is_refused() -> None:
    model, task, train, queries = classification_case()
    settings: dict[str, Any] = {"optimizer": OPTIMIZERS["AdamW"], "batch_size": BATCH, "epochs": EPOCHS}
    training = StackedTraining(model, task, train, queries, **settings)
    with pytest.raises(InputError, match=r"subsets of \[2, 3\] examples"):
        training([Retraining((0, 1), 0), Retraining((0, 1, 2), 0)])
    with pytest.raises(InputError, match="keeps example 12, but the training set has 12"):
        training([Retraining((0, 12), 0)])
    with pytest.raises(InputError, match="train: a batch of its 12 examples holds a str 'name'"):
        StackedTraining(model, Named(), train, queries, **settings)
    with pytest.raises(InputError, match=r"holds a Tensor of shape \[2\]"):
        StackedTraining(model, Total(), train, queries, **settings)
    with pytest.raises(InputError, match="queries is empty"):
        StackedTraining(model, task, train, [], **settings)
    with pytest.raises(InputError, match="epochs=0"):
        StackedTraining(model, task, train, queries, **{**settings, "epochs": 0})
