"""One process at a time on a directory of results, with a lock that ends with its process and says who has it.

The lock itself is the system's (`flock`, by filelock), which a killed process gives up; the owner's record beside it is
for the message of whoever waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from wherefrom.runtime.errors import DamagedError, StorageError
from wherefrom.store.files import read_json, write_text

logger = logging.getLogger("wherefrom")

# How often, in seconds, whoever waits says that it still does.
_REMINDER = 600.0


class DirectoryLock:
    """Use it as a context around whatever looks for results and adds to them; it may be entered again inside, also by
    another object for the same file.

    Another process waits, and its log says for whom. A directory that cannot be written needs no lock: results can
    only be read there.

    Args:
        file: the lock, `.lock` in a run directory; the owner's record is beside it, with `.json` at its end.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._record = file, file.with_name(f"{file.name}.json")
        self._lock = FileLock(file.absolute(), is_singleton=True)
        self._needless = 0

    def __enter__(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            if os.access(self._file.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise StorageError(f"Cannot lock {self._file.parent}: {error.strerror}.") from error
            self._needless += 1
        else:
            if self._lock.lock_counter == 1:
                try:
                    self._sign()
                except BaseException:  # such as Ctrl-C, after which this process may live on
                    self._lock.release()
                    raise

    def __exit__(self, *exception: object) -> None:
        if self._needless:
            self._needless -= 1
            return
        if self._lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                self._record.unlink()
        self._lock.release()

    def _acquire(self) -> None:
        wait = 0.0
        while True:
            try:
                self._lock.acquire(timeout=wait)
                return
            except Timeout:
                logger.warning(f"{self._file.parent} is in use by {self._owner()}. Waiting for its end.")
                wait = _REMINDER

    def _sign(self) -> None:
        if self._record.exists():
            logger.warning(
                f"{self._file.parent} was in use by {self._owner()}, which has ended without finishing. Going on from "
                "what it has saved."
            )
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(StorageError):  # a full disk must not keep anybody from reading
            write_text(self._record, json.dumps(owner) + "\n")

    def _owner(self) -> str:
        """Whoever has the lock, or had it last."""
        try:
            record = read_json(self._record)
            minutes = (time.time() - record["since"]) / 60
            return f"process {record['process']} on {record['host']}, for {minutes:,.0f} min"
        except (DamagedError, StorageError, KeyError, TypeError, OverflowError):
            return "a process that has not said its name"


def run_lock(run: Path) -> DirectoryLock:
    """The lock of a run directory."""
    return DirectoryLock(run / ".lock")
