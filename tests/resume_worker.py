"""A fit and a score for a process of its own, slow enough to meet another."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

import wherefrom as wf
from tests.models import mlp_case


class Slow(wf.Classification):
    """Writes a line for every batch before it is computed, and takes its time."""

    _log: Path

    def train_loss(self, *arguments: object) -> Tensor:
        with self._log.open("a") as stream:
            stream.write("batch\n")
        time.sleep(0.01)
        return super().train_loss(*arguments)  # type: ignore[arg-type]


def main(run: str, log: str) -> None:
    """Fit EK-FAC factors and score, saving partial sums after every batch."""
    case = mlp_case(torch.float32)
    task = Slow()
    task._log = Path(log)
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=2, query_batch_size=5)
    wf.Study(run, case.model, task, train=case.train, execution=execution).score(case.queries)
