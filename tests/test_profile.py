"""The profile: what actions are charged with, and when it waits for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wherefrom as wf
from tests.models import mlp_case
from tests.runs import with_factors
from wherefrom.runtime.profile import Profile


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that are waited for, of three, the second without memory of this process."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0 if device == 1 else 2**20)
    monkeypatch.setattr(torch.cuda, "synchronize", found.append)
    return found


def test_every_boundary_waits_for_the_gpus_in_use(waits: list[int]) -> None:
    profile = Profile(synchronize=True)
    with profile.action("outer"), profile.action("inner"):
        assert waits == [0, 2] * 2
    assert waits == [0, 2] * 4


def test_a_plain_run_waits_for_none(waits: list[int], tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    assert not waits
    study.profile.synchronize = True
    study.score(case.queries, with_factors(factors))
    assert waits


def test_without_a_gpu_there_is_nothing_to_wait_for() -> None:
    profile = Profile(synchronize=True)
    with profile.action("alone"):
        pass
    assert "alone" in profile.text()
