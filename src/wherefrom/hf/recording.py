"""The Trainer's callback that records what attribution over training needs, whenever a checkpoint is saved.

This module knows the Trainer's callbacks and optimizers; `wherefrom.store.recording` reads what it writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from wherefrom.store.files import write_tensors, write_text
from wherefrom.store.recording import MOMENTS, RECORDING, RECORDING_FORMAT, ParameterGroup, read_entries

logger = logging.getLogger("wherefrom")


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
        folder = Path(args.output_dir or ".")
        if state.is_world_process_zero and (folder / RECORDING).exists():
            _write(folder, [entry for entry in read_entries(folder) if entry["step"] <= state.global_step])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates before the scheduler changes them."""
        self._rates = [float(group["lr"]) for group in kwargs["optimizer"].param_groups]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the checkpoint that was just saved."""
        folder, name = Path(args.output_dir or "."), f"checkpoint-{state.global_step}"
        optimizer = kwargs["optimizer"]
        moments = dict(second_moments(kwargs["model"], optimizer))  # by every process, since sharded ones are gathered
        if not state.is_world_process_zero:
            return
        if not (folder / name).is_dir():
            logger.warning(f"{folder / name} is not there, so this checkpoint is not recorded.")
            return
        if moments:
            write_tensors(folder / name / MOMENTS, moments, {})
        groups = zip(optimizer.param_groups, self._rates, strict=True)
        entry = {
            "name": name,
            "step": state.global_step,
            "epoch": state.epoch,
            "optimizer": _unwrapped(optimizer),
            "groups": [asdict(_group(settings, rate)) for settings, rate in groups],
        }
        earlier = read_entries(folder) if (folder / RECORDING).exists() else []
        _write(folder, [*(each for each in earlier if each["step"] < state.global_step), entry])


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Entries of the checkpoints that the Trainer has not deleted."""
    there = [entry for entry in entries if (folder / entry["name"]).is_dir()]
    write_text(folder / RECORDING, json.dumps({"format": RECORDING_FORMAT, "checkpoints": there}, indent=1) + "\n")


def _unwrapped(optimizer: Any) -> str:
    """The name of the optimizer's class, without accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _group(settings: Mapping[str, Any], learning_rate: float) -> ParameterGroup:
    betas = settings.get("betas")
    pair = None if betas is None else (float(betas[0]), float(betas[1]))
    return ParameterGroup(learning_rate, pair, settings.get("eps"), settings.get("weight_decay"))


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
