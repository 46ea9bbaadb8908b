"""Run directories under test: what is in them, and processes that are killed while they make them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

Start = Callable[[Path, Path], "subprocess.Popen[bytes]"]
"""Starts a process on a run directory, which writes a line into a log before each batch."""


def results(run: Path) -> dict[str, Tensor]:
    """Every finished tensor, by its place in the run directory."""
    return {
        f"{file.parent.relative_to(run)}/{name}": tensor
        for file in run.rglob("tensors.safetensors")
        for name, tensor in load_file(file).items()
    }


def begun(log: Path) -> list[str]:
    """The batches or retrainings in the order in which they began: what each line says first."""
    return [line.split(" | ")[0] for line in log.read_text().splitlines()] if log.exists() else []


def lines(log: Path) -> int:
    """How many batches were begun."""
    return len(begun(log))


def kill_and_resume(start: Start, run: Path, log: Path, kills: Sequence[int]) -> None:
    """Kill a process after so many batches in all, again and again, and let the last one finish."""
    for after in kills:
        process = start(run, log)
        while lines(log) < after and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(run, log).wait() == 0


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply: for root they mean nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(0)
