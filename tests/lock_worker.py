"""A process that takes a run directory for a while: `python -m tests.lock_worker RUN LOG SECONDS`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from wherefrom.locks import run_lock
from wherefrom.progress import show_log


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
