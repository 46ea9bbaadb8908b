"""Inputs that nobody wished for: wrong arguments, files, tasks, datasets and models, and damaged files of a run."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import fuzz_command, fuzz_manifests, fuzz_tasks
from tests.reliability.outcomes import Outcome


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Give the command, the library and the readers of files about `count` wrong inputs, a third each.

    Raises AssertionError, or the exception that should not have been, for the first that does not end in a result, in
    an error of ours, or in the exception of the user's own code; hypothesis prints the smallest input that it finds.
    """
    third = max(2, count // 3)
    return [
        *fuzz_command.measure(folder / "command", third, seed),
        *fuzz_tasks.measure(folder / "tasks", third, seed),
        *fuzz_manifests.measure(folder / "manifests", third, seed),
    ]
