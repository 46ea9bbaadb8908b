"""The contract of all ways of scoring: in several processes, and after a process was killed."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.contract import worker
from tests.contract.answers import Answers, able
from tests.contract.methods import METHODS, Property
from tests.contract.settings import Setting
from tests.models import relative_error
from tests.processes import start, start_ranks
from tests.runs import results
from wherefrom.store.names import labelled

PROCESSES = 2


def outcome(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank{rank}" / worker.OUTCOME).read_text())
    return found


def scored_values(folder: Path, rank: int = 0) -> Tensor:
    return load_file(folder / f"rank{rank}" / "values.safetensors")["values"]


def names_with(wanted: Property) -> list[str]:
    return [name for name, each in METHODS.items() if wanted not in each.unsupported]


@pytest.fixture(scope="module")
def together(answers: Answers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them by two processes, which begin once."""
    folder = tmp_path_factory.mktemp("together")
    names = [name for name, each in METHODS.items() if each.folder is not None]
    running = start_ranks(worker.score_together, folder, names, answers.settings.usual(), count=PROCESSES)
    for process in running:
        done = process.finished(timeout=600)
        assert done.returncode == 0, done.stderr
    return folder


def pairs(run: Path, other: Path) -> list[tuple[str, Tensor, Tensor]]:
    """The finished tensors of two run directories, those of the same name, or else of the same label.

    Eigenvectors that several processes find differ in their last bits, and so do the digests of projections on them.
    """
    found, expected = results(run), results(other)
    unmatched = {unlabelled(key): key for key in expected.keys() - found.keys()}
    assert len(unmatched) == len(expected.keys() - found.keys())
    names = {key: key if key in expected else unmatched.pop(unlabelled(key)) for key in found}
    assert not unmatched
    return [(key, found[key], expected[name]) for key, name in names.items()]


def unlabelled(key: str) -> str:
    """A tensor's place without the digests of results."""
    return "/".join(labelled(part)[0] for part in key.split("/"))


@able("processes")
def test_several_processes_give_what_one_gives(name: str, answers: Answers, together: Path) -> None:
    alone, folder = answers.usual(name), together / name
    for rank in range(PROCESSES):
        assert "error" not in outcome(folder, rank), outcome(folder, rank)
        assert relative_error(scored_values(folder, rank), alone.values) < 1e-9
    for key, found, expected in pairs(folder / "run", alone.run):
        if "eigenbasis/" not in key:  # eigenvectors have no sign
            assert torch.allclose(found.double(), expected.double(), rtol=1e-9, atol=1e-9), key
    assert not [path for path in (folder / "run").rglob("*") if ".part" in path.name]


@pytest.mark.parametrize(
    "name", [name for name, each in METHODS.items() if each.folder and "processes" in each.unsupported]
)
def test_what_several_processes_cannot_do_is_refused_in_each(name: str, together: Path) -> None:
    missing = METHODS[name].unsupported["processes"]
    assert missing.error is not None
    for rank in range(PROCESSES):
        assert outcome(together / name, rank)["error"].startswith(f"{missing.error.__name__}: {missing.message}")


@pytest.fixture(scope="module")
def saving(answers: Answers) -> Setting:
    """In small batches, and saved after each of them."""
    return replace(answers.settings.usual(torch.float32), batch_size=2, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def undisturbed(saving: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them by a process that nothing came in between."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = start(worker.score_alone, folder, names_with("kill"), saving).finished(timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@able("kill")
def test_what_was_killed_goes_on_to_the_same_bits(
    name: str, saving: Setting, undisturbed: Path, tmp_path: Path
) -> None:
    """In its last loss: all others are saved, or were needed in memory alone."""
    calls = outcome(undisturbed / name)["calls"]
    killed = start(worker.score_alone, tmp_path, [name], saving, calls).finished()
    assert killed.returncode == -signal.SIGKILL
    resumed = start(worker.score_alone, tmp_path, [name], saving).finished()
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path / name)["calls"] < calls, "what was finished was done again"
    assert torch.equal(scored_values(tmp_path / name), scored_values(undisturbed / name))
    found, expected = results(tmp_path / name / "run"), results(undisturbed / name / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert files(tmp_path / name / "run") == files(undisturbed / name / "run")


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}
