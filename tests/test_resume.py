"""Runs killed with SIGKILL continue where they were and end with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from tests.models import mlp_case
from tests.runs import kill_and_resume, lines, results
from wherefrom.sweep import Sweep

# Sweeps of the worker: covariance 6 batches, eigenvalues 6, queries 1, pairwise 6; two examples are measured to plan.
BATCHES = 21


def start(run: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.resume_worker", str(run), str(log)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder / "run", folder / "log").wait() == 0
    assert lines(folder / "log") == BATCHES
    return results(folder / "run")


@pytest.mark.parametrize("kills", [(1, 8, 15), (3, 6, 12), (7, 13, 18), (9, 14, 16)])
def test_killed_runs_end_with_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor], kills: tuple[int, ...]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    kill_and_resume(start, run, log, kills)
    found = results(run)
    assert found.keys() == undisturbed.keys()
    assert all((found[name] == tensor).all() for name, tensor in undisturbed.items())  # bit for bit
    # A kill costs the batch it falls into, the one whose sums were being saved, the resident gradients and the plan.
    assert lines(log) <= BATCHES + 5 * len(kills)
    left = [path.name for path in run.rglob("*") if ".part" in path.name]
    assert not left


def test_out_of_memory_halves_the_batch_and_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of more than three examples fails after part of its layers were collected."""
    import torch

    import wherefrom as wf
    from wherefrom.curvature import EigenvalueCollector
    from wherefrom.errors import MemoryLimitError

    case = mlp_case()
    expected = wf.Study(tmp_path / "one", case.model, case.task, train=case.train).fit("diagonal", batch_size=3)
    original = EigenvalueCollector.collect
    limit = 3

    def limited(self: EigenvalueCollector, layer: str, captured: object, rows: slice) -> None:
        original(self, layer, captured, rows)  # type: ignore[arg-type]
        if layer == "twice" and rows.stop - rows.start > limit:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(EigenvalueCollector, "collect", limited)
    study = wf.Study(tmp_path / "two", case.model, case.task, train=case.train, checkpoint_seconds=0)
    found = study.fit("diagonal", batch_size=12)
    assert all(torch.equal(found.eigenvalues[name], each) for name, each in expected.eigenvalues.items())
    limit = 0
    with pytest.raises(MemoryLimitError, match="a single example does not fit"):
        study.fit("diagonal", seed=1, name="other")


def test_batch_sizes_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from wherefrom.layers import select_layers

    case = mlp_case()
    sweep = Sweep(case.model, case.task, select_layers(case.model))

    def suggest(free: int) -> int:
        monkeypatch.setattr("wherefrom.memory.free_memory", lambda device: free)
        footprint = sweep.footprint(case.train, lambda model, batch, rows: case.task.train_loss(model, batch))
        return footprint.batch_size(len(case.train), sweep.usable_memory(), sweep.device)

    assert suggest(2**40) == len(case.train)
    assert suggest(1) == 1
    assert 1 < suggest(20_000) < len(case.train)
