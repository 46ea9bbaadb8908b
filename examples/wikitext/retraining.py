"""Fine-tuning a checkpoint's model again on a part of its training set, as `wherefrom.evaluate.retrain` asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from common import Common
from datasets import Dataset, disable_progress_bars
from models import Recipe, load_base, recipe_data
from torch import Tensor, nn
from training import finetune, measured_losses
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wherefrom.evaluate.retrain import Retraining, current_device
from wherefrom.store.fingerprint import dataset_digest, model_digest


@dataclass
class Retrained(Common):
    """Options of the scripts that fine-tune again."""

    num_workers: int | None = None
    """Fine-tunings at once; one for each GPU or CPU core by default."""
    overwrite_retrainings: bool = False
    """Delete the finished retrainings, which all evaluations of the run directory share, and begin again."""
    cache_dir: Path = Path("cache")
    """Where train.py keeps the pre-trained small model."""


@dataclass(frozen=True)
class Finetuning:
    """A training function: the recipe of a checkpoint, on a subset; the summed loss of each query after it.

    What it needs it loads where it runs, once for each worker.
    """

    recipe: Recipe
    cache_dir: Path

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        """Each query's loss after each fine-tuning, [retrainings, queries]."""
        model, train, queries = self._start
        settings = self.recipe.settings
        tuned = (finetune(model, train.select(each.subset), settings, each.seed) for each in retrainings)
        return torch.stack([measured_losses(each, queries) for each in tuned])

    def fingerprint(self) -> dict[str, str]:
        """What decides the results, apart from subset and seed."""
        model, train, queries = self._start
        return {
            "start": model_digest(model),
            "training data": dataset_digest(train),
            "queries": dataset_digest(queries),
            "settings": json.dumps(asdict(self.recipe.settings), sort_keys=True),
        }

    def __getstate__(self) -> dict[str, object]:
        """Without what is loaded: a worker loads its own."""
        return {"recipe": self.recipe, "cache_dir": self.cache_dir}

    @cached_property
    def _start(self) -> tuple[PreTrainedModel, Dataset, Dataset]:
        disable_progress_bar()
        disable_progress_bars()
        model, tokenizer = load_base(self.recipe.model, self.cache_dir)
        nn.Module.to(model, current_device())
        return model, *recipe_data(self.recipe, tokenizer)
