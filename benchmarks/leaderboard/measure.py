"""One method in a process of its own: its scores, and what they took. What is finished is kept.

This module knows how to run a method; it must not know retrainings.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from statistics import median

import torch
from safetensors.torch import load_file
from torch import Tensor
from workload import PeakMemory, provenance, synchronize

import wherefrom as wf
from leaderboard.methods import METHODS
from leaderboard.setting import Setting, predicted_tokens
from leaderboard.subject import Subject
from wherefrom.runtime.errors import LossError
from wherefrom.store.files import write_tensors, write_text

SCORES, COST = "scores.safetensors", "cost.json"


@dataclass(frozen=True)
class Cost:
    """What a method took, from the trained model and its checkpoints to all scores.

    Attributes:
        seconds: CPU time of one thread, or wall time where there is a GPU.
        epochs: the same in units of a plain pass of training (forward, backward, AdamW) over the training set, timed
            in the same process.
        peak_bytes: memory beyond what the process had with the model and the data loaded; on a GPU, of the GPU.
        provenance: command, commit, machine.
        failure: why there are no scores, or None.
        residual: of a solver's solves, relative, in the median over queries; None without one.
    """

    seconds: float
    epochs: float
    peak_bytes: int
    provenance: dict[str, object]
    failure: str | None = None
    residual: float | None = None


def measured(subject: Subject, name: str) -> tuple[Tensor | None, Cost]:
    """A method's scores and cost; computed if they are not there.

    Args:
        subject: its folder is that of all methods.
        name: of the method.
    """
    folder = subject.folder / re.sub(r"\W+", "-", name)
    if not (folder / COST).exists():
        with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
            pool.submit(_measure, replace(subject, folder=folder), name).result()
    cost = Cost(**json.loads((folder / COST).read_text()))
    return (None if cost.failure else load_file(folder / SCORES)["values"]), cost


def _measure(subject: Subject, name: str) -> None:
    torch.set_num_threads(1)
    folder = subject.folder
    shutil.rmtree(folder, ignore_errors=True)
    subject = replace(subject, folder=folder / "run")
    epoch = _plain_epoch(subject.setting)
    cuda = torch.cuda.is_available()
    memory = PeakMemory()
    memory.start()
    start, failure, residual = _now(), None, None
    try:
        scores = METHODS[name].scores(subject)
        residual = None if scores.residuals is None else float(scores.residuals.median())
        write_tensors(folder / SCORES, {"values": scores.values.float().contiguous()}, {})
    except LossError as error:  # a method that diverges is a result, too
        failure = str(error)
    seconds, peak = _now() - start, memory.stop()
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    shutil.rmtree(subject.folder, ignore_errors=True)
    cost = Cost(seconds, seconds / epoch, peak, provenance(), failure, residual)
    write_text(folder / COST, json.dumps(asdict(cost), indent=1) + "\n")


def _plain_epoch(setting: Setting) -> float:
    """Seconds of a plain pass of training over the training set."""
    training = setting.training()
    model, task = training.model, wf.CausalLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batches = [task.collate([setting.train[row] for row in rows.tolist()]) for rows in training.batches]
    batches = [{key: each.to(training.start().device) for key, each in batch.items()} for batch in batches]
    batches = batches[: len(batches) // setting.size.epochs]
    found = []
    for _ in range(4):
        start = _now()
        for batch in batches:
            optimizer.zero_grad()
            torch.autograd.backward(task.train_loss(model, batch) / predicted_tokens(batch))
            optimizer.step()
        found.append(_now() - start)
    return median(found[1:])  # the first warms up


def _now() -> float:
    if torch.cuda.is_available():
        synchronize()
        return time.perf_counter()
    return time.process_time()
