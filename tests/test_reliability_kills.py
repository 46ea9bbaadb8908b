"""Processes killed at random moments, or asked to stop, and started again; docs/reliability.md has many more."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.processes import start
from tests.reliability import kills, stops
from tests.reliability.kill_worker import End, log_batches
from tests.runs import begun
from tests.test_cli import folder  # noqa: F401  (a fixture)
from wherefrom.cli.main import main


def stopped_command(log: Path, batch: int, number: signal.Signals, arguments: tuple[str, ...]) -> None:
    """The command, sent a signal in a batch."""
    log_batches(log, End(batch=batch, signal=number))
    sys.argv = ["wherefrom", *arguments]
    main()


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the files of a process in /proc")
def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    assert sum(outcome.times for outcome in kills.measure(tmp_path, count=12, seed=19)) == 12


def test_stopping_at_random_batches_loses_nothing(tmp_path: Path) -> None:
    assert sum(outcome.times for outcome in stops.measure(tmp_path, count=8, seed=0)) == 8


def test_a_command_that_is_asked_to_stop_says_how_to_go_on(folder: Path) -> None:  # noqa: F811
    """Five sequences are three batches, of each of two sweeps."""
    log = folder / "batches"
    given = ("--model", str(folder / "model"), "--train", str(folder / "train.txt"), "--train-batch-size", "2")
    for name, batch, status, word in (("SIGTERM", 2, 143, "Ended by SIGTERM"), ("SIGINT", 3, 130, "Interrupted")):
        arguments = ("fit", str(folder / "stopped"), *given)
        stopped = start(stopped_command, log, batch, signal.Signals[name], arguments).finished()
        assert stopped.returncode == status, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert (
            stopped.stderr.splitlines()[-1]
            == f"{word}. The same command (without --overwrite) goes on from what is saved."
        )
        assert f"{name} after 4 of 5 examples; their sums are saved" in " ".join(stopped.stderr.split())
    covariance = [f"covariance {rows}" for rows in ("0 to 2", "2 to 4", "4 to 5")]
    assert begun(log) == [*covariance, "eigenvalues 0 to 2", "eigenvalues 2 to 4"]
