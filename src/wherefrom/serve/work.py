"""Whose turn it is: one job at a time on the model, a few that wait, and what a job says while it runs.

A job ends at its next batch when nobody waits for it any more. This module knows threads and events; it must not know
what the jobs do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from wherefrom.runtime.errors import WherefromError
from wherefrom.runtime.progress import watched

logger = logging.getLogger("wherefrom")

MOST_WAITING = 4
_PAUSE = 0.1  # seconds between two reports of one stage's progress

Tell = Callable[[str, object], None]
"""Says an event to whoever waits for the job: its name, and what JSON has of it."""


class Stopped(Exception):  # noqa: N818  (as Ctrl-C is no error)
    """Nobody waits for the job any more."""


class Busy(Exception):  # noqa: N818
    """Too many jobs wait."""


class Job:
    """Work on the model, for somebody who waits for its events.

    Args:
        work: is given a function that says events; it raises `Stopped` once the job is to end.
        deliver: takes each event, in the worker's thread; None is the end.
    """

    def __init__(self, work: Callable[[Tell], None], deliver: Callable[[tuple[str, object] | None], None]) -> None:
        self._work, self._deliver = work, deliver
        self._stopped, self._told = threading.Event(), 0.0

    def stop(self) -> None:
        """End it at the next event or batch."""
        self._stopped.set()

    def tell(self, name: str, said: object) -> None:
        """Say an event."""
        if self._stopped.is_set():
            raise Stopped
        self._deliver((name, said))

    def run(self) -> None:
        """Do the work; whatever becomes of it is told."""
        log = _Told(self)
        logger.addHandler(log)
        try:
            with watched(self._progress):
                self._work(self.tell)
        except Stopped:
            logger.info("Nobody waits for the answer any more; what was begun goes on when it is asked again.")
        except WherefromError as error:
            self._deliver(("failed", {"message": str(error)}))
        except Exception:
            logger.exception("A job has failed.")
            message = "This has failed in a way that was not foreseen; the server's terminal says more."
            self._deliver(("failed", {"message": message}))
        finally:
            logger.removeHandler(log)
            self._deliver(None)

    def _progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._stopped.is_set():
            raise Stopped
        if done in (0, total) or now - self._told >= _PAUSE:
            self._told = now
            self.tell("progress", {"stage": stage, "done": done, "total": total})


class _Told(logging.Handler):
    """Passes on what the library says while a job runs, from the job's own thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.INFO)
        self._job, self._thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.exc_info is None:
            self._job._deliver(("note", {"message": record.getMessage()}))


class Worker:
    """The one thread that works on the model."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="wherefrom-serve", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: enough wait already.
        """
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()

    def ahead(self, job: Job) -> int:
        """How many jobs come before one; 0 once it runs, or has."""
        with self._changed:
            return self._waiting.index(job) + (self._running is not None) if job in self._waiting else 0

    def leave(self, job: Job) -> None:
        """Stop a job, or take it out of those that wait."""
        job.stop()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self, seconds: float = 10.0) -> None:
        """Stop all jobs, and wait for the one that runs to end."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *filter(None, [self._running])):
                job.stop()
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._running = job = self._waiting.popleft()
            job.run()
