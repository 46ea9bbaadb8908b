"""What a recorded training has left for attribution: checkpoints, learning rates, Adam's second moments.

`wherefrom.TrainingRecorder` writes it; it is read with neither the model nor the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.store.files import checked_name, is_there, read_json

RECORDING = "wherefrom.json"
MOMENTS = "adam_second_moments.safetensors"
RECORDING_FORMAT = 1
_ADVICE = "Delete it; checkpoints can still be given by their paths and weights."


@dataclass(frozen=True)
class ParameterGroup:
    """The settings of one of the optimizer's groups of parameters; None where the optimizer has no such setting.

    Attributes:
        learning_rate: that of the step which led to the checkpoint.
    """

    learning_rate: float
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class RecordedCheckpoint:
    """A checkpoint of a recorded training.

    Attributes:
        path: its directory.
        step: optimizer steps since the start of training; gradients accumulated for one step count once.
        epoch: passes over the training set since the start.
        steps: optimizer steps since the checkpoint before it that is still there, or since the start.
        optimizer: the name of its class.
        groups: settings of the optimizer, for each group of parameters.
    """

    path: Path
    step: int
    epoch: float
    steps: int
    optimizer: str
    groups: tuple[ParameterGroup, ...]

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step which led to the checkpoint.

        Raises:
            InputError: groups of parameters had different ones; `groups` has them.
        """
        rates = {group.learning_rate for group in self.groups}
        if len(rates) != 1:
            raise InputError(f"{self.path}: its parameters had the learning rates {sorted(rates)}; choose from groups.")
        return rates.pop()

    @property
    def second_moments(self) -> Path | None:
        """Adam's running mean of squared gradients (`exp_avg_sq`, not corrected for its start), by parameter name."""
        file = self.path / MOMENTS
        return file if file.exists() else None


def read_recording(folder: str | Path) -> list[RecordedCheckpoint]:
    """The checkpoints of a training that a `TrainingRecorder` has watched, in the order of their steps.

    Args:
        folder: the Trainer's `output_dir`.

    Raises:
        InputError: there is no recording.
        DamagedError: it cannot be read.
    """
    folder = Path(folder)
    if not is_there(folder / RECORDING):
        raise InputError(
            f"{folder}: holds no {RECORDING}; expected the output_dir of a Trainer with "
            "callbacks=[wherefrom.TrainingRecorder()]."
        )
    entries = [entry for entry in read_entries(folder) if (folder / entry["name"]).is_dir()]
    steps = [0, *(entry["step"] for entry in entries)]
    try:
        return [
            _checkpoint(folder, entry, after - before)
            for entry, (before, after) in zip(entries, pairwise(steps), strict=True)
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{folder / RECORDING} lacks what a recording has ({error}). {_ADVICE}") from error


def _checkpoint(folder: Path, entry: Mapping[str, Any], steps: int) -> RecordedCheckpoint:
    groups = [
        ParameterGroup(**{**group, "betas": group["betas"] and tuple(group["betas"])}) for group in entry["groups"]
    ]
    epoch, optimizer = float(entry["epoch"]), str(entry["optimizer"])
    return RecordedCheckpoint(folder / entry["name"], entry["step"], epoch, steps, optimizer, tuple(groups))


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of a recording, also of checkpoints that have been deleted since, in the order of their steps."""
    file = folder / RECORDING
    content = read_json(file, _ADVICE)
    if content.get("format") != RECORDING_FORMAT:
        raise DamagedError(f"{file} has the format {content.get('format')!r}, expected {RECORDING_FORMAT}. {_ADVICE}")
    try:
        entries = sorted(content["checkpoints"], key=lambda entry: int(entry["step"]))
        for entry in entries:
            checked_name(entry["name"])  # a name, so that it leads nowhere else
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"{file} is not a readable recording ({error}). {_ADVICE}") from error
    return entries
