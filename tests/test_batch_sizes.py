"""Sweeps that run out of memory, and the batch sizes that they begin with; `reliability.kills` has those killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wherefrom as wf
from tests.models import mlp_case
from wherefrom.curvature.collectors import EigenvalueCollector
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import MemoryLimitError


def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more than three examples fails after part of its layers were collected."""
    case = mlp_case()
    small = wf.Execution(train_batch_size=3)
    expected = wf.Study(tmp_path / "one", case.model, case.task, train=case.train, execution=small).fit(wf.Diagonal())
    original = EigenvalueCollector.collect
    limit = 3

    def limited(self: EigenvalueCollector, layer: str, captured: object, batch: slice) -> None:
        original(self, layer, captured, batch)  # type: ignore[arg-type]
        if layer == "twice" and batch.stop - batch.start > limit:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(EigenvalueCollector, "collect", limited)
    large = wf.Execution(train_batch_size=12, checkpoint_seconds=0)
    study = wf.Study(tmp_path / "two", case.model, case.task, train=case.train, execution=large)
    found = study.fit(wf.Diagonal())
    assert all(torch.equal(found.eigenvalues[name], each) for name, each in expected.eigenvalues.items())
    limit = 0
    with pytest.raises(MemoryLimitError, match="a single example does not fit"):
        study.fit(wf.Diagonal(seed=1), name="other")


def test_batch_sizes_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    sweep = Sweep(case.model, case.task, select_layers(case.model))

    def suggest(free: int) -> int:
        monkeypatch.setattr("wherefrom.runtime.memory.free_memory", lambda device: free)
        footprint = sweep.footprint(Examples(case.train, case.task))
        return footprint.batch_size(len(case.train), sweep.usable_memory(), sweep.device)

    assert suggest(2**40) == len(case.train)
    assert suggest(1) == 1
    assert 1 < suggest(20_000) < len(case.train)
