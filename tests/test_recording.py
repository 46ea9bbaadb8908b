"""Recordings of real Trainer runs: against the optimizer's state, the scheduler's formula, what is on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import recording_worker
from tests.models import gpt2, relative_error, token_rows
from tests.processes import start
from tests.recording_worker import two_linears, two_steps
from wherefrom.hf.recording import TrainingRecorder
from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.store.recording import MOMENTS, RECORDING, read_recording

PEAK = 0.01
STEPS = 6


class Watch(TrainerCallback):
    """Adam's moments at each save, taken from the optimizer by the position of its parameters."""

    def __init__(self) -> None:
        self.moments: dict[int, list[torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        self.moments[state.global_step] = [
            optimizer.state[each]["exp_avg_sq"].clone() for each in parameters if "exp_avg_sq" in optimizer.state[each]
        ]


def train(folder: Path, resume: bool = False, model: nn.Module | None = None, **options: Any) -> tuple[Trainer, Watch]:
    watch = Watch()
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": PEAK, "lr_scheduler_type": "linear",
        "weight_decay": 0.1, "adam_beta2": 0.95, "save_steps": 2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 100, **options,
    }  # fmt: skip
    trainer = Trainer(
        model=model or gpt2(torch.float32, layers=1),
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=[{**row, "labels": row["input_ids"]} for row in token_rows(12)],  # type: ignore[dict-item, index]
        data_collator=_collate,
        callbacks=[TrainingRecorder(), watch],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer, watch


def _collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    import wherefrom as wf

    return wf.CausalLM().collate(rows)


def rate_of_step(step: int) -> float:
    """A linear schedule without warm-up: step number `step`, the first being 1, is taken at this rate."""
    return PEAK * (1 - (step - 1) / STEPS)


def test_recording_is_what_the_trainer_did(tmp_path: Path) -> None:
    trainer, watch = train(tmp_path, gradient_accumulation_steps=2)
    found = read_recording(tmp_path)
    assert [(each.step, each.steps, each.path.name) for each in found] == [
        (2, 2, "checkpoint-2"), (4, 2, "checkpoint-4"), (6, 2, "checkpoint-6")
    ]  # fmt: skip
    # 12 examples, 2 a pass, 2 passes a step: 3 steps an epoch
    assert [each.epoch for each in found] == pytest.approx([2 / 3, 4 / 3, 2])
    for each in found:
        assert each.learning_rate == pytest.approx(rate_of_step(each.step), rel=1e-12)
        assert each.optimizer == "AdamW"
        assert {group.betas for group in each.groups} == {(0.9, 0.95)}
        assert {group.eps for group in each.groups} == {1e-8}
        assert [group.weight_decay for group in each.groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}  # type: ignore[union-attr]
    assert trainer.optimizer is not None
    order = [names[id(each)] for group in trainer.optimizer.param_groups for each in group["params"]]
    for each in found:
        assert each.second_moments is not None
        moments = load_file(each.second_moments)
        assert sorted(moments) == sorted(order)
        for name, expected in zip(order, watch.moments[each.step], strict=True):
            assert torch.equal(moments[name], expected), name


def test_rotated_checkpoints_are_dropped(tmp_path: Path) -> None:
    train(tmp_path, save_total_limit=1, save_steps=1)
    assert [(each.step, each.steps) for each in read_recording(tmp_path)] == [(6, 6)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_deleted_by_hand_is_dropped(tmp_path: Path) -> None:
    import shutil

    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert [(each.step, each.steps) for each in read_recording(tmp_path)] == [(4, 4), (6, 2)]


def test_a_resumed_training_goes_on_with_its_recording(tmp_path: Path) -> None:
    import shutil

    train(tmp_path / "whole")
    train(tmp_path / "twice")
    shutil.rmtree(tmp_path / "twice" / "checkpoint-6")  # as if killed before it
    train(tmp_path / "twice", resume=True)
    whole, twice = read_recording(tmp_path / "whole"), read_recording(tmp_path / "twice")
    assert [(each.step, each.steps, each.groups) for each in whole] == [
        (each.step, each.steps, each.groups) for each in twice
    ]
    one, other = (load_file(each[-1].path / MOMENTS) for each in (whole, twice))
    assert all(relative_error(one[name], other[name]) < 1e-5 for name in one)


def test_a_new_training_in_the_same_directory_starts_a_new_recording(tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path, max_steps=3, save_steps=3)
    assert [each.step for each in read_recording(tmp_path)] == [3]


def test_an_optimizer_without_second_moments_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, max_steps=2, optim="sgd")
    (found,) = read_recording(tmp_path)
    assert (found.optimizer, found.second_moments, found.groups[0].betas) == ("SGD", None, None)
    assert "has no tensor exp_avg_sq" in caplog.text


def test_frozen_parameters_have_no_moments(tmp_path: Path) -> None:
    model = gpt2(torch.float32, layers=1)
    model.transformer.wte.weight.requires_grad_(False)
    train(tmp_path, model=model, max_steps=2)
    (found,) = read_recording(tmp_path)
    assert found.second_moments is not None
    assert set(load_file(found.second_moments)) == {n for n, p in model.named_parameters() if p.requires_grad}


def test_sharded_moments_are_gathered(tmp_path: Path) -> None:
    processes = [start(recording_worker.main, rank, tmp_path) for rank in range(2)]
    assert [process.finished().returncode for process in processes] == [0, 0]
    found = load_file(tmp_path / "moments.safetensors")
    model = two_linears()
    optimizer = two_steps(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], optimizer.state[parameter]["exp_avg_sq"]) < 1e-6, name


def test_missing_and_damaged_recordings_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no wherefrom.json"):
        read_recording(tmp_path)
    (tmp_path / RECORDING).write_text('{"format": 1, "checkpoints": [{')
    with pytest.raises(DamagedError, match="not readable JSON"):
        read_recording(tmp_path)
