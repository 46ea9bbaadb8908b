"""Jobs on worker processes: every job on one CPU thread, worker k on GPU k, nothing left running when the caller stops.

This module must not know what the jobs are; `retrain` says so.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.spawn import get_preparation_data
from typing import Any, TypeAlias, TypeVar

import torch

from wherefrom.runtime.errors import InputError

Input = TypeVar("Input")
Output = TypeVar("Output")
Receive: TypeAlias = Callable[[int, Output | Exception], None]


class WorkerError(Exception):
    """A worker process died."""


def default_workers() -> int:
    """One worker for each GPU, or without GPUs one for each CPU core that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_may_start_workers() -> None:
    """Refuse to go on in a worker that is importing the script, before it waits for a lock that its parent has.

    Raises:
        RuntimeError: the script asks for workers outside of `if __name__ == "__main__":`.
    """
    get_preparation_data("worker")  # which raises it


def run_jobs(
    function: Callable[[Input], Output], jobs: Iterable[Input], workers: int, receive: Receive[Output]
) -> None:
    """Apply a function to every job; one worker is this process itself, more are processes of their own.

    Whatever runs a job has one CPU thread, so that a job's result is the same on any of them. After `receive` has
    raised, or a worker died, no further job is begun; those under way are finished and received before the error is
    raised. An interrupt ends the workers at once, and so does the end of this process, even by SIGKILL.

    Args:
        function: picklable, when there is more than one worker.
        receive: called in this process with a job's position and its result, or what the function raised, in the order
            of completion.

    Raises:
        WorkerError: a worker died.
        InputError: the function cannot be pickled.
        Exception: what `receive` raised.
    """
    if workers > 1:
        _run_on_processes(function, jobs, workers, receive)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for position, job in enumerate(jobs):
            receive(position, _outcome(function, job))
    finally:
        torch.set_num_threads(threads)


def _outcome(function: Callable[[Input], Output], job: Input) -> Output | Exception:
    try:
        return function(job)
    except Exception as error:
        return error


def _run_on_processes(
    function: Callable[[Input], Output], jobs: Iterable[Input], workers: int, receive: Receive[Output]
) -> None:
    try:
        packed = pickle.dumps(function)
    except Exception as error:  # whatever the object's own __getstate__ or __reduce__ raises
        raise InputError(
            f"The function for {workers} workers cannot be sent to another process ({error}): expected an object of a "
            "module-level class that holds picklable values. Define it so, or pass workers=1."
        ) from error
    waiting = iter(enumerate(jobs))
    busy: dict[Any, int] = {}  # the connection to a worker, and the position of its job
    failure: Exception | None = None
    with ExitStack() as processes:
        idle: list[Any] = [processes.enter_context(_worker(packed, number)) for number in range(workers)]
        while True:
            if failure is None:
                for worker, (position, job) in zip(idle, waiting, strict=False):
                    busy[worker] = position
                    with suppress(OSError):  # of a dead worker, which has no answer either
                        worker.send(job)
            if not busy:
                break
            idle = list(wait(list(busy)))
            for worker in idle:
                try:
                    receive(busy.pop(worker), _answer(worker))
                except Exception as error:
                    failure = failure or error
        if failure is not None:
            raise failure


@contextmanager
def _worker(packed: bytes, number: int) -> Iterator[Connection]:
    """The connection to a new worker process, which ends with it, and is killed where the caller fails."""
    context = get_context("spawn")  # a forked process would inherit the locks of threads that it does not have
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(packed, number, there))
    process.start()
    there.close()
    try:
        yield here
    except BaseException:
        process.kill()
        raise
    finally:
        here.close()
        process.join()


def _answer(worker: Connection) -> Any:
    try:
        return worker.recv()
    except (EOFError, OSError):
        raise WorkerError from None


# What follows runs in the workers.


def _work(packed: bytes, number: int, caller: Connection) -> None:
    """Answer jobs until the caller closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    function = _outcome(_unpacked, packed)
    with suppress(EOFError):
        while True:
            job = caller.recv()
            outcome = function if isinstance(function, Exception) else _outcome(function, job)
            caller.send(_portable(outcome) if isinstance(outcome, Exception) else outcome)


def _end_with_parent() -> None:
    """Leave in the middle of a job when the parent has ended, which also happens by SIGKILL."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _unpacked(packed: bytes) -> Callable[[object], object]:
    try:
        function: Callable[[object], object] = pickle.loads(packed)
    except Exception as error:
        raise InputError(
            f"The function cannot be read in a worker process ({error}): expected an object of a class that can be "
            "imported from a module, not one of a notebook or prompt. Move it to a file, or pass workers=1."
        ) from error
    return function


def _portable(error: Exception) -> Exception:
    """An error that can be sent, with its traceback as a note."""
    described = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(described)
    return error
