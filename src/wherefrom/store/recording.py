"""What a `transformers.Trainer` run leaves for attribution: checkpoints, learning rates, Adam's second moments.

`TrainingRecorder` writes them as the Trainer saves checkpoints; `read_recording` reads them back, with neither the
model nor the optimizer. This module knows the Trainer's callbacks; it does not know what the records are used for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.store.files import checked_name, read_json, write_tensors, write_text

logger = logging.getLogger("wherefrom")

RECORDING = "wherefrom.json"
MOMENTS = "adam_second_moments.safetensors"
_FORMAT = 1
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


class TrainingRecorder(TrainerCallback):
    """Records, whenever the Trainer saves a checkpoint, what attribution over training needs.

    Pass it as `Trainer(..., callbacks=[TrainingRecorder()])`. `output_dir/wherefrom.json` lists the checkpoints that
    are there, and each of them gets Adam's second moments. A training that is resumed goes on with its recording,
    without checkpoints later than where it resumes. Sharded moments are gathered; those that an optimizer keeps in
    another form (DeepSpeed, FSDP with flat parameters, 8-bit) are left out, and the log says so.
    """

    def __init__(self) -> None:
        self._rates: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the checkpoints of another training, or of later steps."""
        if state.is_world_process_zero and (_folder(args) / RECORDING).exists():
            _write(_folder(args), [entry for entry in _read(_folder(args)) if entry["step"] <= state.global_step])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates before the scheduler changes them."""
        self._rates = [float(group["lr"]) for group in kwargs["optimizer"].param_groups]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the checkpoint that was just saved."""
        folder, name = _folder(args), f"checkpoint-{state.global_step}"
        optimizer = kwargs["optimizer"]
        moments = dict(second_moments(kwargs["model"], optimizer))  # by every process, since sharded ones are gathered
        if not state.is_world_process_zero:
            return
        if not (folder / name).is_dir():
            logger.warning(f"{folder / name} is not there, so this checkpoint is not recorded.")
            return
        if moments:
            write_tensors(folder / name / MOMENTS, moments, {})
        entry = {
            "name": name,
            "step": state.global_step,
            "epoch": state.epoch,
            "optimizer": _unwrapped(optimizer),
            "groups": [
                asdict(_group(group, rate)) for group, rate in zip(optimizer.param_groups, self._rates, strict=True)
            ],
        }
        earlier = _read(folder) if (folder / RECORDING).exists() else []
        _write(folder, [*(each for each in earlier if each["step"] < state.global_step), entry])


def read_recording(folder: str | Path) -> list[RecordedCheckpoint]:
    """The checkpoints of a training that a `TrainingRecorder` has watched, in the order of their steps.

    Args:
        folder: the Trainer's `output_dir`.

    Raises:
        InputError: there is no recording.
        DamagedError: it cannot be read.
    """
    folder = Path(folder)
    if not (folder / RECORDING).exists():
        raise InputError(
            f"{folder}: holds no {RECORDING}; expected the output_dir of a Trainer with "
            "callbacks=[wherefrom.TrainingRecorder()]."
        )
    entries = [entry for entry in _read(folder) if (folder / entry["name"]).is_dir()]
    steps = [0, *(entry["step"] for entry in entries)]
    try:
        return [
            _checkpoint(folder, entry, after - before)
            for entry, (before, after) in zip(entries, pairwise(steps), strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{folder / RECORDING} lacks what a recording has ({error}). {_ADVICE}") from error


def _checkpoint(folder: Path, entry: Mapping[str, Any], steps: int) -> RecordedCheckpoint:
    return RecordedCheckpoint(
        path=folder / entry["name"],
        step=entry["step"],
        epoch=float(entry["epoch"]),
        steps=steps,
        optimizer=str(entry["optimizer"]),
        groups=tuple(
            ParameterGroup(**{**group, "betas": group["betas"] and tuple(group["betas"])}) for group in entry["groups"]
        ),
    )


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _read(folder: Path) -> list[dict[str, Any]]:
    file = folder / RECORDING
    content = read_json(file, _ADVICE)
    if content.get("format") != _FORMAT:
        raise DamagedError(f"{file} has the format {content.get('format')!r}, expected {_FORMAT}. {_ADVICE}")
    try:
        entries = sorted(content["checkpoints"], key=lambda entry: int(entry["step"]))
        for entry in entries:
            checked_name(entry["name"])  # a name, so that it leads nowhere else
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{file} is not a readable recording ({error}). {_ADVICE}") from error
    return entries


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Entries of the checkpoints that the Trainer has not deleted."""
    kept = [entry for entry in entries if (folder / entry["name"]).is_dir()]
    write_text(folder / RECORDING, json.dumps({"format": _FORMAT, "checkpoints": kept}, indent=1) + "\n")


def _unwrapped(optimizer: Any) -> str:
    """The name of the optimizer's class, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _group(settings: Mapping[str, Any], learning_rate: float) -> ParameterGroup:
    betas = settings.get("betas")
    return ParameterGroup(
        learning_rate,
        betas=None if betas is None else (float(betas[0]), float(betas[1])),
        eps=settings.get("eps"),
        weight_decay=settings.get("weight_decay"),
    )


def second_moments(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Adam's second moments by the names of the model's trained parameters, whole and on the host."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        logger.warning("Adam's second moments are not recorded: FSDP keeps flat parameters (FSDP2 does not).")
        return
    lacking = []
    for name, parameter in trained:
        moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
            lacking.append(name)
            continue
        whole = moment.full_tensor() if hasattr(moment, "full_tensor") else moment
        yield name, whole.detach().cpu().contiguous()
    if lacking:
        logger.warning(
            f"Adam's second moments of {len(lacking)} of {len(trained)} parameters are not recorded, {lacking[0]} for "
            f"one: {_unwrapped(optimizer)} has no tensor exp_avg_sq of the parameter's shape for them."
        )
