"""What a way of scoring is given: a small language model with its data, and everything that a caller may choose.

This module knows no way of scoring.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, gpt2, token_rows
from tests.test_checkpoints import moved
from tests.test_source import recorded
from wherefrom.store.recording import RecordedCheckpoint

# What the longest sequence may have, and what padded ones are given.
LENGTH = 12
PADDING_TOKEN = 5
TRAIN, QUERIES = 6, 3
Variation = Literal["damping", "query set", "seed", "training set", "model"]
RATES = (0.3, 0.2)


class Watched(wf.CausalLM):
    """Counts its losses, and kills its process at one of them if it is told to."""

    _calls = 0
    _fatal = 0

    @property
    def calls(self) -> int:
        """How many losses were computed."""
        return self._calls

    def kill_at(self, call: int) -> None:
        """End the process with SIGKILL in this call, counted from now on."""
        self._calls, self._fatal = 0, call

    def train_loss(self, *arguments: Any) -> Tensor:
        self._calls += 1
        if self._calls == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_loss(*arguments)


@dataclass(frozen=True)
class Setting:
    """What an answer depends on, and how the work is cut, on which it must not depend.

    Attributes:
        checkpoints: of a training, for what scores by several; the model itself is none of them.
        damping: None is the method's own.
        empirical: factors of the dataset's own targets instead of drawn ones.
        factors: what `fit` returned elsewhere, instead of factors that are fitted first.
        name: of the result in the run directory.
    """

    model: nn.Module
    task: Watched
    train: Sequence[object]
    queries: Sequence[object]
    checkpoints: Sequence[RecordedCheckpoint]
    damping: float | None = None
    seed: int = 0
    empirical: bool = False
    half_precision: bool = False
    factors: wf.Factors | None = None
    batch_size: int | None = 8
    checkpoint_seconds: float = 60.0
    name: str | None = None
    overwrite: bool = False

    @property
    def weight_decay(self) -> float:
        """What damps SOURCE, of a size that matters to it."""
        return (self.damping or 0.0) / 1000

    @property
    def case(self) -> Case:
        """The model and the data alone."""
        return Case(self.model, self.task, list(self.train), list(self.queries))

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """Words for the tokens of queries and training examples."""
        queries, train = ([" ".join(f"w{token}" for token in tokens(each)) for each in side] for side in self.sides)
        return queries, train

    @property
    def sides(self) -> tuple[Sequence[object], Sequence[object]]:
        """Queries and training examples."""
        return self.queries, self.train


def tokens(example: object) -> list[int]:
    """The tokens of an example, without padding."""
    assert isinstance(example, dict)
    found: list[int] = example["input_ids"]
    return found[: sum(example.get("attention_mask", [1] * len(found)))]


def padded(example: object) -> dict[str, list[int]]:
    """The same example with padding of its own, on the right."""
    found = tokens(example)
    extra = LENGTH - len(found)
    return {"input_ids": found + [PADDING_TOKEN] * extra, "attention_mask": [1] * len(found) + [0] * extra}


class Settings:
    """The usual setting, and others that differ from it in one thing: a second legitimate use of a run directory.

    Args:
        folder: an empty one, for checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Setting] = {}

    def usual(self, dtype: torch.dtype = torch.float64) -> Setting:
        """Double precision, for the truth; others for half precision and for bits."""
        return self._of(str(dtype), lambda: gpt2(dtype, layers=1))

    def other(self, what: Variation) -> Setting:
        """The usual setting but for this."""
        usual = self.usual()
        return {
            "damping": lambda: replace(usual, damping=400.0),
            "query set": lambda: replace(usual, queries=token_rows(QUERIES, seed=8)),
            "seed": lambda: replace(usual, seed=1),
            "training set": lambda: replace(usual, train=token_rows(TRAIN, seed=11)),
            "model": lambda: self._of("another", lambda: moved(gpt2(layers=1), seed=9)),
        }[what]()

    def _of(self, name: str, make: Callable[[], nn.Module]) -> Setting:
        """The setting of a model, and of a training that has saved other weights; checkpoints have the same names."""
        if name not in self._made:
            self._made[name] = _with_checkpoints(make(), self._folder / name)
        return self._made[name]


def _with_checkpoints(model: nn.Module, folder: Path) -> Setting:
    folder.mkdir(parents=True)
    models = [moved(model, seed) for seed in range(len(RATES))]
    paths = [folder / f"{number}.safetensors" for number in range(len(RATES))]
    for path, each in zip(paths, models, strict=True):
        save_file({name: tensor.clone() for name, tensor in each.named_parameters()}, path)
    checkpoints = recorded(paths, models, RATES)
    return Setting(model, Watched(["transformer.h.*"]), token_rows(TRAIN), token_rows(QUERIES, seed=4), checkpoints)
