"""Compiled activation functions change nothing but the last bits, and leave the model alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import gpt2_case, relative_error
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.compiling import CompiledOnGPU, compiled_activations

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
def test_scores_are_those_without(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    plain = wf.Study(tmp_path / "plain", case.model, case.task, train=case.train)
    compiled = wf.Execution(compile_activations=True, train_batch_size=5)
    quick = wf.Study(tmp_path / "quick", case.model, case.task, train=case.train, execution=compiled)
    expected = plain.score(case.queries, wf.EKFAC()).values
    found = quick.score(case.queries, wf.EKFAC()).values
    assert relative_error(found, expected) < 1e-4


@needs_compiler
def test_what_an_example_takes_is_measured_compiled() -> None:
    """GPT-2's activation function keeps four tensors of its size for going back, compiled only its input."""
    case = gpt2_case(torch.float32)
    layers = select_layers(case.model, case.task.layers)
    plain: Sweep[Any] = Sweep(case.model, case.task, layers)
    examples = Examples([{"input_ids": list(range(10))}], case.task)
    expected = plain.footprint(examples)
    found = replace(plain, execution=wf.Execution(compile_activations=True)).footprint(examples)
    each = 4 * 10 * 32  # bytes of an activation function's input
    # In each of two layers; and single numbers, such as sizes.
    assert 0 <= found.saved_bytes - (expected.saved_bytes - 2 * 3 * each) < 16
    assert replace(found, saved_bytes=expected.saved_bytes) == expected


def test_only_activation_functions_are_compiled_and_the_model_is_left_as_it_was() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act, self.drop, self.norm = nn.Linear(2, 2), nn.GELU(), nn.Dropout(), nn.LayerNorm(2)
            self.relu = nn.ReLU(inplace=True)

    model = Block()
    with pytest.raises(KeyboardInterrupt), compiled_activations(model):
        assert [name for name, each in model.named_modules() if "forward" in vars(each)] == ["act"]
        raise KeyboardInterrupt
    assert not [name for name, each in model.named_modules() if "forward" in vars(each)]


def test_what_does_not_compile_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def doubled_and_one(tensor: Tensor) -> Tensor:
        return 2 * tensor + 1

    monkeypatch.setattr("wherefrom.runtime.compiling._worth_compiling", lambda tensor: True)
    # By PyTorch's own means, which put the setting back; monkeypatch would delete it.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        function = CompiledOnGPU(doubled_and_one)
        with caplog.at_level("WARNING", "wherefrom"):
            assert function(torch.arange(3.0)).tolist() == [1.0, 3.0, 5.0]
            assert function(torch.arange(2.0)).tolist() == [1.0, 3.0]
        (message,) = [record.getMessage() for record in caplog.records if record.name == "wherefrom"]
        assert "doubled_and_one runs without torch.compile, which failed: " in message


def test_running_out_of_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps try smaller batches then; to run it again in more passes would take more memory, not less."""
    calls = []

    def greedy(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("wherefrom.runtime.compiling._worth_compiling", lambda tensor: True)
    monkeypatch.setattr("torch.compile", lambda function, **options: function)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledOnGPU(greedy)(torch.arange(3.0))
    assert len(calls) == 1
