"""Retraining many small models: stacked with torch.func, or one after another with the plain loop.

One process with one thread, CPU seconds of the user, three repeats in turn, medians; the losses of both are compared.

    python benchmarks/stacked.py                 # an MLP of the size of scikit-learn's digits
    python benchmarks/stacked.py cache/small-*   # a Hugging Face causal language model: here the example's small one
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from wherefrom import CausalLM, Classification, Task
from wherefrom.evaluate.retrain import Retraining
from wherefrom.evaluate.stacked import StackedTraining
from wherefrom.tasks.losses import IGNORED

REPEATS = 3
console = Console()


@dataclass(frozen=True)
class Case:
    """What is trained, how long, and how many at once."""

    name: str
    model: nn.Module
    task: Task[Any]
    train: list[object]
    queries: list[object]
    retrainings: list[Retraining]
    together: Sequence[int]
    batch_size: int
    epochs: int
    learning_rate: float
    count: Callable[[Any], Tensor]


def digits_case() -> Case:
    """64 retrainings on 1000 examples for 5 epochs."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    inputs, labels = torch.randn(2100, 64, generator=generator), torch.randint(10, (2100,), generator=generator)
    examples: list[object] = list(zip(inputs, labels, strict=True))
    retrainings = _subsets(64, 2000, 1000)
    return Case(
        "MLP 64-32-10", model, Classification(), examples[:2000], examples[2000:], retrainings,
        (4, 16, 64), 32, 5, 1e-3, lambda batch: torch.tensor(len(batch[1])),
    )  # fmt: skip


def language_case(path: str) -> Case:
    """8 retrainings on 32 sequences of 128 random tokens: 4 steps of 8 each."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    tokens = torch.randint(model.config.vocab_size, (72, 128), generator=torch.Generator().manual_seed(0))
    examples: list[object] = [{"input_ids": row} for row in tokens]
    return Case(
        path, model, CausalLM(), examples[:64], examples[64:], _subsets(8, 64, 32), (2, 4, 8), 8, 1, 1e-3,
        lambda batch: (batch["labels"][:, 1:] != IGNORED).sum(),
    )  # fmt: skip


def _subsets(count: int, examples: int, size: int) -> list[Retraining]:
    orders = [torch.randperm(examples, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [Retraining(tuple(sorted(order[:size].tolist())), seed) for seed, order in enumerate(orders)]


def one_after_another(case: Case) -> Tensor:
    """The plain loop, on batches that are picked from one collated batch as `StackedTraining` does."""
    train = case.task.collate(case.train)
    pick = partial(_picked, train)
    return torch.stack([_train_alone(case, each, pick) for each in case.retrainings])


def _train_alone(case: Case, retraining: Retraining, pick: Callable[[Tensor], Any]) -> Tensor:
    model = copy.deepcopy(case.model).eval()
    optimizer = AdamW(model.parameters(), lr=case.learning_rate)
    generator = torch.Generator().manual_seed(retraining.seed)
    kept = torch.tensor(retraining.subset)
    for _ in range(case.epochs):
        for rows in kept[torch.randperm(len(kept), generator=generator)].split(case.batch_size):
            batch = pick(rows)
            optimizer.zero_grad()
            torch.autograd.backward(case.task.train_loss(model, batch) / case.count(batch))
            optimizer.step()
    with torch.no_grad():
        return torch.stack([case.task.measurement(model, case.task.collate([each])) for each in case.queries])


def _picked(batch: Any, rows: Tensor) -> Any:
    if isinstance(batch, dict):
        return {name: values[rows] for name, values in batch.items()}
    return [values[rows] for values in batch]


def stacked(case: Case, together: int) -> Tensor:
    """`StackedTraining` on groups of `together` retrainings."""
    training = StackedTraining(
        case.model, case.task, case.train, case.queries,
        optimizer=partial(AdamW, lr=case.learning_rate),
        batch_size=case.batch_size, epochs=case.epochs, count=case.count,
    )  # fmt: skip
    starts = range(0, len(case.retrainings), together)
    return torch.cat([training(case.retrainings[start : start + together]) for start in starts])


def main(case: Case) -> None:
    """Run all ways in turn and print their medians."""
    torch.set_num_threads(1)
    ways: dict[str, Callable[[], Tensor]] = {"one after another": lambda: one_after_another(case)}
    ways |= {f"stacked, {count} at once": partial(stacked, case, count) for count in case.together}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = os.times().user
            losses[name] = way()
            seconds[name].append(os.times().user - start)
    table = Table("", "CPU seconds", "all repeats", "ratio", "largest difference of a loss", title=case.name)
    plain = statistics.median(seconds["one after another"])
    reference = losses["one after another"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        difference = float(((losses[name] - reference).abs() / reference.abs()).max())
        table.add_row(
            name, f"{middle:.2f}", " ".join(f"{value:.2f}" for value in values), f"{plain / middle:.2f}x",
            f"{difference:.1e}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main(language_case(sys.argv[1]) if len(sys.argv) > 1 else digits_case())
