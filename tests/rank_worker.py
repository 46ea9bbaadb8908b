"""One of several processes on one study: `python -m tests.rank_worker JOB RUN`, started by torchrun or by a test."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case
from wherefrom.errors import WherefromError
from wherefrom.ranks import Ranks, join_ranks

# Of 12 training examples and 5 queries, processes get unequal shares; with fewer queries, some get none.
TRAIN, QUERIES = 11, 5


def everything(case: Case, run: Path, queries: int = QUERIES) -> wf.Study[object]:
    """Every kind of result."""
    study = wf.Study(run, case.model, case.task, train=case.train[:TRAIN], checkpoint_seconds=0)
    for strategy in ("identity", "diagonal", "kfac", "ekfac"):
        factors = study.fit(strategy, batch_size=3)
        study.score(case.queries[:queries], factors, damping=1e-3, train_batch_size=2)
    study.score_tokens(case.queries[:queries], factors, damping=1e-3, name="tokens")
    study.score(case.queries[:queries], factors, damping=1e-3, query_rank=2, rescore=3)
    return study


def mlp(run: Path) -> None:
    """A classifier of vectors."""
    everything(mlp_case(), run)


def gpt2(run: Path) -> None:
    """A language model with padding, and fewer queries than processes."""
    everything(gpt2_case(), run, queries=2)


def sharded(run: Path) -> None:
    """As `gpt2`, with weights that are spread over the processes."""
    case = gpt2_case()
    for block in case.model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(case.model)
    everything(case, run, queries=2)


class Slow(wf.Classification):
    """Takes its time, and kills its process after some batches if it is told to."""

    _batches = 0

    def train_loss(self, *arguments: object) -> Tensor:
        time.sleep(0.02)
        self._batches += 1
        if os.environ.get("KILL") == f"{Ranks.current().index}:{self._batches}":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_loss(*arguments)  # type: ignore[arg-type]


def slow(run: Path) -> None:
    """A job that dies where KILL=PROCESS:BATCH says."""
    case = mlp_case()
    study = wf.Study(run, case.model, Slow(), train=case.train[:TRAIN], checkpoint_seconds=0)
    study.score(case.queries, study.fit("ekfac", batch_size=1), train_batch_size=1, query_batch_size=2)


class Poisoned(wf.Classification):
    """The last training example's loss is not a number."""

    def train_loss(self, model: nn.Module, batch: object, sampler: wf.Sampler | None = None) -> Tensor:
        loss = super().train_loss(model, batch, sampler)  # type: ignore[arg-type]
        last = Ranks.current().index == Ranks.current().count - 1
        return loss * torch.nan if last else loss


def poisoned(run: Path) -> None:
    """A job that cannot be done for the examples of one process."""
    case = mlp_case()
    wf.Study(run, case.model, Poisoned(), train=case.train).fit("diagonal")


def unlike(run: Path) -> None:
    """Processes with different weights."""
    case = mlp_case()
    with torch.no_grad():
        next(case.model.parameters()).add_(Ranks.current().index)
    wf.Study(run, case.model, case.task, train=case.train).fit("diagonal")


JOBS: dict[str, Callable[[Path], None]] = {job.__name__: job for job in (mlp, gpt2, sharded, slow, poisoned, unlike)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    join_ranks()
    try:
        JOBS[sys.argv[1]](Path(sys.argv[2]))
        torch.distributed.destroy_process_group()
    except WherefromError as error:
        sys.exit(f"{type(error).__name__}: {error}")
