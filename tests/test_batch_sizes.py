"""Sweeps that run out of memory, and the batch sizes that they begin with; `reliability.kills` has those killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.models import mlp_case
from wherefrom import Diagonal, Execution
from wherefrom.engine.sweep import Sweep


def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more than three examples fails after part of its layers were collected."""
    import torch

    import wherefrom as wf
    from wherefrom.curvature.collectors import EigenvalueCollector
    from wherefrom.runtime.errors import MemoryLimitError

    case = mlp_case()
    expected = wf.Study(tmp_path / "one", case.model, case.task, train=case.train).fit(
        Diagonal(), execution=Execution(train_batch_size=3)
    )
    original = EigenvalueCollector.collect
    limit = 3

    def limited(self: EigenvalueCollector, layer: str, captured: object, rows: slice) -> None:
        original(self, layer, captured, rows)  # type: ignore[arg-type]
        if layer == "twice" and rows.stop - rows.start > limit:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(EigenvalueCollector, "collect", limited)
    study = wf.Study(
        tmp_path / "two", case.model, case.task, train=case.train, execution=Execution(checkpoint_seconds=0)
    )
    found = study.fit(Diagonal(), execution=replace(study.execution, train_batch_size=12))
    assert all(torch.equal(found.eigenvalues[name], each) for name, each in expected.eigenvalues.items())
    limit = 0
    with pytest.raises(MemoryLimitError, match="a single example does not fit"):
        study.fit(Diagonal(seed=1), name="other")


def test_batch_sizes_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from wherefrom.engine.layers import select_layers

    case = mlp_case()
    sweep = Sweep(case.model, case.task, select_layers(case.model))

    def suggest(free: int) -> int:
        monkeypatch.setattr("wherefrom.runtime.memory.free_memory", lambda device: free)
        footprint = sweep.footprint(case.train, lambda model, batch, rows: case.task.train_loss(model, batch))
        return footprint.batch_size(len(case.train), sweep.usable_memory(), sweep.device)

    assert suggest(2**40) == len(case.train)
    assert suggest(1) == 1
    assert 1 < suggest(20_000) < len(case.train)
