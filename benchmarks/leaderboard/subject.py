"""What the methods are asked about. This module knows the setting and checkpoints; it must not know methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

import wherefrom as wf
from leaderboard.setting import Setting
from wherefrom.store.recording import RecordedCheckpoint
from wherefrom.store.weights import load_weights
from wherefrom.tasks.language import Measure


@dataclass(frozen=True)
class Subject:
    """What a method is asked about.

    Attributes:
        setting: the model before training, the data, the training.
        checkpoints: of the training; the last is the trained model.
        folder: the method's own, empty at first.
    """

    setting: Setting
    checkpoints: list[RecordedCheckpoint]
    folder: Path

    @property
    def time(self) -> float:
        """The sum of learning rates over the steps of the training."""
        return sum(each.learning_rate * each.steps for each in self.checkpoints)

    def study(self, layers: tuple[str, ...] | None = None, measure: Measure = "loss") -> wf.Study[dict[str, Tensor]]:
        """The trained model's study; all linear layers but the head by default."""
        task, execution = wf.CausalLM(layers, measure), wf.Execution(query_batch_size=8)
        history = self.checkpoints
        return wf.Study(self.folder, self.model(), task, train=self.setting.train, history=history, execution=execution)

    def model(self) -> PreTrainedModel:
        """The trained model."""
        load_weights(self.setting.start, self.checkpoints[-1].path)
        return self.setting.start
