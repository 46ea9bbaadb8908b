"""Whether estimates of disk space are right: the space that real runs take at the most, against what is refused.

A process with mounts of its own: `python -m tests.reliability.space_estimates FOLDER`, under `space.UNSHARED`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import ManyExamples
from tests.reliability.space import Disk, Moments
from tests.runs import factored
from wherefrom.runtime.errors import StorageError

_TRAIN, _QUERIES = 2_000, 300
# An estimate may be so much above what was used, and headers besides: 8 KiB a file, of which there are some dozens. It
# may be below by the run's lock, by whole pages for small files, and by the rounding of the message.
_SHARE, _HEADERS, _BELOW = 1.04, 2**20, 2**16
_EXECUTION, _PAIRS = wf.Execution(progress=False, checkpoint_seconds=0), wf.Pairs()
# GiB in which a sixth of the queries are resident, beside the scores of a part of the training examples.
_LITTLE = 0.016


def _examples(count: int) -> ManyExamples:
    """Many, of three tokens each."""
    return ManyExamples(count, inputs=(3, 4), label=(1,))


class _Task(wf.Task[Any]):
    """Three tokens an example."""

    def train_loss(self, model: nn.Module, batch: Any, sampler: Any = None) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs).mean(1), labels[:, 0], reduction="sum")


def _study(run: Path, width: int, train: int) -> wf.Study[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    return wf.Study(run, model, _Task(), train=_examples(train), execution=_EXECUTION)


Flow = Callable[[Path], object]


def _fit(strategy: str) -> Flow:
    """Factors take as much for any number of examples."""
    execution = replace(_EXECUTION, train_batch_size=20)
    return lambda run: _study(run, 700, 40).fit(factored(strategy), execution=execution)


def _score(
    keep: wf.Keep[Any] = _PAIRS, queries: int = _QUERIES, memory_budget: float | None = None, **fields: Any
) -> Flow:
    execution = replace(_EXECUTION, train_batch_size=500, memory_budget=memory_budget)
    return lambda run: _study(run, 4, _TRAIN).score(
        _examples(queries), wf.Dot(**fields), keep=keep, execution=execution
    )


_FLOWS: dict[str, Flow] = {
    "ekfac": _fit("ekfac"),
    "diagonal": _fit("diagonal"),
    "scores": _score(),
    "blocks": _score(memory_budget=_LITTLE),
    "parts": _score(wf.Pairs(layers=True, self_influence=True)),
    "parts in blocks": _score(wf.Pairs(layers=True, self_influence=True), memory_budget=_LITTLE),
    "rescored": _score(query_rank=1, rescore=40),
    "summed": _score(wf.Aggregated(train="sum")),
    "top": _score(wf.Top(300)),
    "tokens": _score(wf.Tokens(), queries=20),
}


def main(folder: str) -> None:
    """Prints for each flow what was used, what was estimated, and fails when they are far apart."""
    logging.getLogger("wherefrom").setLevel(logging.ERROR)
    disk = Disk(Path(folder))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", folder], check=True)
    moments = Moments(disk.run)
    for name, flow in _FLOWS.items():
        used = _most_used(disk, moments, flow)
        needed = _refused(disk, flow)
        print(json.dumps({"flow": name, "used": used, "estimated": needed}))
        # Which scores are computed again depends on the scores: that estimate is a bound.
        share = 1.5 if name == "rescored" else _SHARE
        assert used - _BELOW <= needed <= used * share + _HEADERS, f"{name}: {used:,} used, {needed:,} estimated"


def _most_used(disk: Disk, moments: Moments, flow: Flow) -> int:
    """The most bytes that were in use while a flow ran."""
    most = 0

    def look(_: int) -> None:
        nonlocal most
        most = max(most, disk.used())

    with moments.watched(look):
        flow(disk.run)
    shutil.rmtree(disk.run)
    return most


def _refused(disk: Disk, flow: Flow) -> int:
    """What the refusal says is needed, on a disk without room; nothing may have been begun."""
    disk.fill(left=2**13)
    try:
        flow(disk.run)
    except StorageError as error:
        found = re.search(r"Not enough space .* ([\d,.]+) MiB needed", str(error))
        assert found, f"not refused before it began: {error}"
        return round(float(found[1].replace(",", "")) * 2**20)
    finally:
        disk.restore()
        begun = list(disk.run.rglob("*.safetensors"))
        assert not begun, f"begun: {begun}"
        shutil.rmtree(disk.run, ignore_errors=True)
    raise AssertionError("a run on a full disk was not refused")


if __name__ == "__main__":
    main(sys.argv[1])
