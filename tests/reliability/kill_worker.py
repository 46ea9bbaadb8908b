"""Jobs to be killed, on a model small enough to do each in a moment; `jobs.py` starts each as a process of its own.

A job is cut into blocks, shards and parts by limits that are set here: a large run has them because it is large. This
module must not know when a job is killed, nor what is checked afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import serialize_file

import wherefrom as wf
import wherefrom.planning.plan
import wherefrom.scoring.tokens
from tests.models import mlp_case
from tests.processes import detach_resource_tracker
from tests.retrain_worker import fill
from wherefrom.cli.shared import command_line
from wherefrom.engine.sweep import Sweep

# Twelve training examples in three shards of two batches; a token's score is a float32.
SHARD_EXAMPLES, TRAIN_BATCH, TOKENS_PER_PART = 4, 2, 5
QUERIES = 3


@dataclass(frozen=True)
class End:
    """When a process is ended; without any of these, when it has finished.

    Attributes:
        seconds: by another process, with SIGKILL, after so long.
        moment: by itself, with `signal`, at so many of its `Moments`.
        batch: by itself, with `signal`, in the midst of so many batches.
    """

    seconds: float | None = None
    moment: int | None = None
    batch: int | None = None
    signal: signal.Signals = signal.SIGKILL


_FILE_EVENTS = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"})


class Moments:
    """Counts what a process does to files, and ends it at one of these moments: before any change of a name; for each
    file that is flushed, as it is and, if it is killed, with only a part of its bytes there; and for tensors that
    safetensors has written and not yet given their name.
    """

    def __init__(self, end: End) -> None:
        self.count = 0
        self._end = end
        self._flushed: dict[tuple[Path, int], bytes] = {}

    def watch(self) -> None:
        """Count from now on; cannot be undone."""
        sys.addaudithook(lambda event, _: self._pass() if event in _FILE_EVENTS else None)
        flush = os.fsync

        def watched(descriptor: int) -> None:
            file = Path(f"/proc/self/fd/{descriptor}").resolve()
            key = file, os.fstat(descriptor).st_ino
            self._pass(lambda: _tear(file, self._flushed.get(key), self.count % 4))
            self._pass()
            flush(descriptor)
            if file.is_file():
                self._flushed[key] = file.read_bytes()

        os.fsync = watched  # type: ignore[assignment]

        def saved(tensors: Any, file: Path, metadata: dict[str, str] | None) -> None:
            self._pass(lambda: serialize_file(tensors, file.with_name(".tmpKilled"), metadata))
            serialize_file(tensors, file, metadata)

        safetensors.torch.serialize_file = saved  # type: ignore[attr-defined, assignment]

    def _pass(self, before: Callable[[], None] = lambda: None) -> None:
        self.count += 1
        if self.count == self._end.moment:
            if self._end.signal == signal.SIGKILL:
                before()
            os.kill(os.getpid(), self._end.signal)


def _tear(file: Path, flushed: bytes | None, quarters: int) -> None:
    """Leave some quarters of what was written to a file since it was flushed, as if killed; a directory stays.

    Args:
        flushed: its bytes then; None for a new file, which is cut.
    """
    if not file.is_file():
        return
    content = file.read_bytes()
    if flushed is None or len(flushed) != len(content):
        os.truncate(file, len(content) * quarters // 4)
        return
    changed = [place for place, (old, new) in enumerate(zip(flushed, content, strict=True)) if old != new]
    lost = changed[len(changed) * quarters // 4 :]
    if lost:
        file.write_bytes(content[: lost[0]] + flushed[lost[0] :])


def work(job: str, run: Path, log: Path, end: End, checkpoint_seconds: float) -> None:
    """Do a job as a command would; the log gets a line for every batch, a file beside it how many moments there were.

    Args:
        checkpoint_seconds: as in `Study`.
    """
    begun = time.perf_counter()
    detach_resource_tracker()
    errors = log.with_suffix(".errors").open("a")
    os.dup2(errors.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    moments = Moments(end)
    moments.watch()
    with command_line():
        if job in BANKS:
            run.mkdir(parents=True, exist_ok=True)
            fill(run / "bank", log, BANKS[job], seconds=0.02)
        else:
            log_batches(log, end)
            _study_job(job, run, checkpoint_seconds)
    counted = {"moments": moments.count, "seconds": time.perf_counter() - begun}
    log.with_suffix(".json").write_text(json.dumps(counted))


def log_batches(log: Path, end: End) -> None:
    """From now on write a line for every batch that is begun, and send this process the signal in its batch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    process = Sweep._batch
    numbers = count(1)

    def logged(self: Sweep[Any], state: Any, loader: Any, batch: range) -> None:
        with log.open("a") as stream:
            stream.write(f"{state.name} {batch.start} to {batch.stop}\n")
        if next(numbers) == end.batch:
            signal.raise_signal(end.signal)
        process(self, state, loader, batch)

    Sweep._batch = logged  # type: ignore[method-assign]


def _study_job(job: str, run: Path, checkpoint_seconds: float) -> None:
    wherefrom.planning.plan.SHARD_EXAMPLES, wherefrom.planning.plan.SHARD_BYTES = SHARD_EXAMPLES, 1
    wherefrom.scoring.tokens.PART_BYTES = TOKENS_PER_PART * torch.float32.itemsize
    case = mlp_case(torch.float32)
    execution = wf.Execution(
        progress=False,
        checkpoint_seconds=checkpoint_seconds,
        train_batch_size=TRAIN_BATCH,
        query_batch_size=1,
        memory_budget=2**-30,  # one query is resident at a time
    )
    study = wf.Study(run, case.model, case.task, train=case.train, execution=execution)
    study.fit()
    JOBS[job](study, case.queries[:QUERIES])


JOBS: dict[str, Callable[[wf.Study[Any], list[object]], object]] = {
    "a fit": lambda study, queries: None,
    "a score": lambda study, queries: study.score(queries),
    "a score with its layers and self-influence": lambda study, queries: study.score(
        queries, keep=wf.Pairs(layers=True, self_influence=True)
    ),
    "a score of low rank, rescored": lambda study, queries: study.score(queries, wf.EKFAC(query_rank=1, rescore=5)),
    "an aggregated score": lambda study, queries: study.score(queries, keep=wf.Aggregated(queries="sum")),
    "the highest scores": lambda study, queries: study.score(queries, keep=wf.Top(3)),
    "self-influence": lambda study, queries: study.self_influence(),
    "token scores of the highest pairs": lambda study, queries: study.score(queries, keep=wf.Tokens(4)),
    "token scores of all pairs": lambda study, queries: study.score(queries, keep=wf.Tokens()),
}
"""What is done with the factors of a study, by what it is called in a report."""

QUERIES_AGAIN = {"an aggregated score": QUERIES, "a score with its layers and self-influence": QUERIES}
"""How many batches of queries may be lost with a process, where it is not one: those of one sweep or resident block."""

BANKS = {"a bank of retrainings": 1, "a bank of retrainings with two workers": 2}
"""How many processes train."""
