"""Jobs on worker processes: every job on one CPU thread, worker k on GPU k, nothing left running when the caller stops.

This module must not know what the jobs are; `retrain` says so.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

import torch

from wherefrom.runtime.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


class JobError(Exception):
    """A job failed; what it raised is the cause.

    Attributes:
        job: its position in the list of jobs.
    """

    def __init__(self, job: int) -> None:
        super().__init__(job)
        self.job = job


def default_workers() -> int:
    """One worker for each GPU, or without GPUs one for each CPU core that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, receive: Callable[[int, Result], None]
) -> None:
    """Apply a function to every job; one worker is this process itself, more are processes of their own.

    Whatever runs a job has one CPU thread, so that a job's result is the same on any of them. After a failure no
    further job is begun; those under way are finished and received before the error is raised. An interrupt ends the
    workers at once, and so does the end of this process, even by SIGKILL.

    Args:
        function: picklable, when there is more than one worker.
        receive: called in this process with a job's position and its result, in the order of completion.

    Raises:
        JobError: the function raised.
        BrokenProcessPool: a worker died.
        InputError: the function cannot be pickled.
        Exception: what `receive` raised.
    """
    if workers > 1:
        _run_on_processes(function, jobs, workers, receive)
        return
    with _one_thread():
        for position, job in enumerate(jobs):
            try:
                result = function(job)
            except Exception as error:
                raise JobError(position) from error
            receive(position, result)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_on_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, receive: Callable[[int, Result], None]
) -> None:
    try:
        packed = pickle.dumps(function)
    except Exception as error:  # whatever the object's own __getstate__ or __reduce__ raises
        raise InputError(
            f"The function for {workers} workers cannot be sent to another process ({error}): expected an object of a "
            "module-level class that holds picklable values. Define it so, or pass workers=1."
        ) from error
    context = get_context("spawn")  # a forked process would inherit the locks of threads that it does not have
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    lifeline, held = context.Pipe(duplex=False)
    with lifeline, held, ProcessPoolExecutor(workers, context, _start, (packed, numbers, lifeline)) as executor:
        try:
            _receive_all(executor, jobs, workers, receive)
        except BaseException:
            held.close()  # or leaving the executor would wait for every job that is under way
            raise


def _receive_all(
    executor: ProcessPoolExecutor, jobs: Sequence[Job], workers: int, receive: Callable[[int, Any], None]
) -> None:
    """Keep as many jobs under way as there are workers, so that none has to be called off after a failure."""
    waiting = iter(enumerate(jobs))
    under_way: dict[Future[Any], int] = {}
    failure: Exception | None = None
    while True:
        try:
            for position, job in islice(waiting, 0 if failure else workers - len(under_way)):
                under_way[executor.submit(_apply, job)] = position
        except BrokenProcessPool as error:
            failure = error
        if not under_way:
            break
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            position = under_way.pop(future)
            try:
                receive(position, _result(future, position))
            except Exception as error:
                failure = failure or error
    if failure is not None:
        raise failure


def _result(future: Future[Any], position: int) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception as error:
        raise JobError(position) from error


# What follows runs in the workers.

_packed_function: list[bytes] = []


def _start(packed: bytes, numbers: SimpleQueue[int], lifeline: Connection) -> None:
    """Prepare a new worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())
    _packed_function.append(packed)


def _end_with(lifeline: Connection) -> None:
    """Leave when the other end of the pipe is closed, which also happens when the parent is killed."""
    lifeline.poll(None)
    os._exit(1)


@cache
def _function() -> Callable[[Any], Any]:
    """The function, unpacked by the first job: a failure there is reported, one of `_start` would not be."""
    try:
        function: Callable[[Any], Any] = pickle.loads(_packed_function[0])
    except Exception as error:
        raise InputError(
            f"The function cannot be read in a worker process ({error}): expected an object of a class that can be "
            "imported from a module, not one of a notebook or prompt. Move it to a file, or pass workers=1."
        ) from error
    return function


def _apply(job: Any) -> Any:
    try:
        return _function()(job)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that cannot travel would break the whole pool
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise
