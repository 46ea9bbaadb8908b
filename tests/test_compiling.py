"""Compiled activation functions change nothing but the last bits, and leave the model alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.models import gpt2_case, relative_error
from wherefrom.compiling import compiled_activations

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@needs_compiler
def test_scores_are_those_without(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    plain = wf.Study(tmp_path / "plain", case.model, case.task, train=case.train)
    quick = wf.Study(tmp_path / "quick", case.model, case.task, train=case.train, compile_activations=True)
    expected = plain.score(case.queries, plain.fit("ekfac")).values
    found = quick.score(case.queries, quick.fit("ekfac", batch_size=5)).values
    assert relative_error(found, expected) < 1e-4


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
