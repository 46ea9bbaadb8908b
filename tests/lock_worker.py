"""What a process does that takes a run directory for a while."""

from __future__ import annotations

import os
import time
from pathlib import Path

from wherefrom.runtime.progress import show_log
from wherefrom.store.locks import run_lock


def main(run: Path, log: Path, seconds: float) -> None:
    """Hold the lock for a while, twice as the same process may; write down when it begins and ends."""
    show_log()
    lock = run_lock(run)
    with lock, lock:
        with log.open("a") as stream:
            stream.write(f"begin {os.getpid()}\n")
        time.sleep(seconds)
        with log.open("a") as stream:
            stream.write(f"end {os.getpid()}\n")
