"""Jobs of several processes on one study, each of which calls `main` as if torchrun had started it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import wherefrom as wf
from tests.mixtures import mixture
from tests.models import Case, gpt2_case, mlp_case, token_rows
from tests.runs import factored
from wherefrom.runtime.distributed import Ranks, join_ranks
from wherefrom.runtime.errors import WherefromError
from wherefrom.runtime.placement import execution_device
from wherefrom.scoring import scoring
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import PairwiseCollector

# Of 12 training examples and 5 queries, processes get unequal shares; with fewer queries, some get none.
TRAIN, QUERIES = 11, 5


def everything(case: Case, run: Path, queries: int = QUERIES) -> wf.Study[object]:
    """Every kind of result."""
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=2)
    study = wf.Study(run, case.model, case.task, train=case.train[:TRAIN], execution=execution)
    queried = case.queries[:queries]
    for strategy in ("identity", "diagonal", "kfac", "shampoo", "ekfac"):
        study.fit(factored(strategy), execution=replace(execution, train_batch_size=3))
        study.score(queried, factored(strategy, damping=0.001))
    automatic = replace(execution, train_batch_size=None)
    study.score(queried, wf.EKFAC(damping=0.001), keep=wf.Tokens(), execution=automatic)
    study.score(queried, wf.EKFAC(damping=0.001, query_rank=2, rescore=3), execution=automatic)
    for chunk in (None, 3):
        study.index(wf.EKFAC(), wf.Sketch(numbers=64, bits=32, chunk=chunk), execution=automatic)
    study.score(queried, wf.TwoStage(first=torch.tensor([[1, 4]] * queries)), keep=wf.Top(10000), execution=automatic)
    study.score(queried, wf.Trak(rank=2), execution=automatic)
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


def experts(run: Path) -> None:
    """A mixture of experts, of which each process's examples choose others."""
    _experts_of(mixture("mixtral"), run)


def sharded_experts(run: Path) -> None:
    """The same, with weights that are spread over the processes."""
    model = mixture("mixtral")
    for block in model.model.layers:
        fully_shard(block)
    _experts_of(fully_shard(model), run)


def _experts_of(model: nn.Module, run: Path) -> None:
    execution = wf.Execution(train_batch_size=1)
    study = wf.Study(run, model, wf.CausalLM(), train=token_rows(5), execution=execution)
    study.score(token_rows(2, seed=4), wf.EKFAC(damping=0.001), keep=wf.Tokens())


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
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=1, query_batch_size=2)
    wf.Study(run, case.model, Slow(), train=case.train[:TRAIN], execution=execution).score(case.queries, wf.EKFAC())


class Poisoned(wf.Classification):
    """The last training example's loss is not a number."""

    def train_loss(self, model: nn.Module, batch: object, sampler: wf.Sampler | None = None) -> Tensor:
        loss = super().train_loss(model, batch, sampler)  # type: ignore[arg-type]
        last = Ranks.current().index == Ranks.current().count - 1
        return loss * torch.nan if last else loss


def poisoned(run: Path) -> None:
    """A job that cannot be done for the examples of one process."""
    case = mlp_case()
    wf.Study(run, case.model, Poisoned(), train=case.train).fit(wf.Diagonal())


def unlike(run: Path) -> None:
    """Processes with different weights."""
    case = mlp_case()
    with torch.no_grad():
        next(case.model.parameters()).add_(Ranks.current().index)
    wf.Study(run, case.model, case.task, train=case.train).fit(wf.Diagonal())


def unlike_queries(run: Path) -> None:
    """Processes with different queries."""
    case = mlp_case()
    study = wf.Study(run, case.model, case.task, train=case.train)
    study.score(case.queries[Ranks.current().index :][:3], wf.Dot())


class Full(wf.CausalLM):
    """The last process runs out of memory while training examples are swept."""

    def train_loss(self, model: nn.Module, batch: dict[str, Tensor], sampler: wf.Sampler | None = None) -> Tensor:
        if len(batch["input_ids"]) == 2 and Ranks.current().index == Ranks.current().count - 1:
            raise torch.OutOfMemoryError("out of memory")
        return super().train_loss(model, batch, sampler)

    def measurement(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return super().train_loss(model, batch)


def sharded_full(run: Path) -> None:
    """A job of two resident queries, for which a process that shares a model's weights has too little memory."""
    case = gpt2_case()
    fully_shard(case.model)
    execution = wf.Execution(train_batch_size=2)
    wf.Study(run, case.model, Full(), train=case.train[:TRAIN], execution=execution).score(case.queries[:2], wf.Dot())


class FullCollector(PairwiseCollector):
    """The last process has no room for the scores of more than two queries."""

    def __init__(self, bank: GradientBank, *arguments: Any, **options: Any) -> None:
        if len(bank) > 2 and Ranks.current().index == Ranks.current().count - 1:
            raise torch.OutOfMemoryError("out of memory")
        super().__init__(bank, *arguments, **options)


def full(run: Path) -> None:
    """A job for whose resident queries one process has too little memory."""
    case = mlp_case()
    vars(scoring)["PairwiseCollector"] = FullCollector
    study = wf.Study(run, case.model, case.task, train=case.train[:TRAIN])
    study.score(case.queries[:QUERIES], wf.Dot())


def impatient(run: Path) -> None:
    """A program's own processes, which wait a second for each other, and one of which is slower."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=1))
    case = mlp_case()
    study = wf.Study(run, case.model, Unequal(), train=case.train, execution=wf.Execution(train_batch_size=1))
    study.fit(wf.Diagonal())


class Unequal(wf.Classification):
    """Takes longer in the last process."""

    def train_loss(self, *arguments: object) -> Tensor:
        time.sleep(0.5 * Ranks.current().index)
        return super().train_loss(*arguments)  # type: ignore[arg-type]


def elsewhere(run: Path) -> None:
    """Processes on devices of different names, as with a GPU each."""
    case = mlp_case()
    if Ranks.current().index:
        add_hook_to_module(case.model, AlignDevicesHook(execution_device="cpu:0"))
    study = wf.Study(run, case.model, case.task, train=case.train)
    plan = study.plan(case.queries, wf.Dot())
    assert plan.form.device == plan.job.device == execution_device(case.model), plan


def joined_later(run: Path) -> None:
    """Processes that join after the study was made."""
    case = mlp_case()
    task = Counting()
    study = wf.Study(run, case.model, task, train=case.train, execution=wf.Execution(train_batch_size=1))
    join_ranks()
    study.fit(wf.Diagonal())
    # And one by which each process sees which layers run.
    assert task.examples == 1 + len(case.train) // Ranks.current().count, task.examples


class Counting(wf.Classification):
    """Counts the examples that are passed over."""

    _examples = 0

    @property
    def examples(self) -> int:
        """How many there were."""
        return self._examples

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: wf.Sampler | None = None) -> Tensor:
        self._examples += len(batch[1])
        return super().train_loss(model, batch, sampler)


JOBS: dict[str, Callable[[Path], None]] = {
    job.__name__: job
    for job in (
        *(mlp, gpt2, sharded, experts, sharded_experts, slow, poisoned, unlike),
        *(unlike_queries, sharded_full, full, impatient, elsewhere, joined_later),
    )
}


def main(job: str, run: Path) -> None:
    """Do a job as one of several processes, and end with exit status 1 where it cannot be done."""
    torch.set_num_threads(1)
    if job not in ("impatient", "joined_later"):
        join_ranks()
    status = 0
    try:
        JOBS[job](run)
    except WherefromError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = 1
    finally:
        dist.destroy_process_group()
    sys.stderr.flush()
    # Threads that PyTorch has left behind fully_shard on a CPU now and then abort an interpreter that ends by itself.
    os._exit(status)
