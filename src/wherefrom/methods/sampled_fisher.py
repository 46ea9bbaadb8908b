"""Scores with the sampled Fisher matrix of all tracked layers together: no blocks, no Kronecker factors.

With M gradients S [M, weights] of losses whose targets the model has drawn, the matrix is `F = S^T S / M`, and

    g_q^T (F + damping)^-1 g_t = (q . t - (S q)^T (S S^T / M + damping)^-1 (S t) / M) / damping

(Woodbury's identity; for optimizers, Ren & Goldfarb 2019, arXiv 1906.02353). Nothing is needed but dot products of
gradients, which are the pairwise scores of `identity`: of drawn losses with each other, with training examples, and of
queries with both. This module is above `study`; it knows nothing of how dot products are computed or kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from wherefrom.curvature.conditioning import Conditioning, conditioning_digest, conditioning_roots
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.kept_scores import keep_scores
from wherefrom.scoring.options import checked_result_name
from wherefrom.scoring.results import Scores
from wherefrom.store.cache import Stages
from wherefrom.store.files import within
from wherefrom.store.fingerprint import Dataset, checked_length, dataset_digest, read_example
from wherefrom.store.names import result_name
from wherefrom.study import Study
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Batch, Task, checked_settings

# Of the mean eigenvalue in the space of samples.
_DAMPING_SHARE = 0.01

_Kind = Literal["trained", "drawn", "asked"]


def fisher_scores(
    study: Study[Batch],
    queries: Dataset[object],
    samples: int = 3,
    *,
    conditioning: Conditioning | None = None,
    damping: float | None = None,
    seed: int = 0,
    query_batch_size: int | None = None,
    train_batch_size: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Scores:
    """Score every pair with the inverse of the sampled Fisher matrix, all tracked layers together.

    `g_q^T (F + damping)^-1 g_t`, F a mean over `samples` draws of each training example's targets. Beyond the damping,
    sampling is the only approximation of F. It takes M = samples x N gradients, their M x M dot products, and the
    inverse of a matrix of that size: for some thousand training examples, and best for all weights (`layers=[...]`).
    The dot products are kept in `RUN/fisher`, so that another damping costs no sweep.

    Args:
        study: the model, its task and training examples; scores are kept in its run directory.
        queries: as in `Study.score`.
        samples: draws of each training example's targets.
        conditioning: as in `Study.fit`: the damping is then that of the optimizer's coordinates, damping x P^-1.
        damping: absolute, above 0; None is 0.01 x the mean of the M eigenvalues that F can have.
        seed: of the draws.
        query_batch_size, train_batch_size: None finds them.
        name: of the scores in the run directory; by default "fisher", and a digest of all that they depend on.
        overwrite: compute them again and replace them, also where they have this name and were made from something
            else, which is refused otherwise. It replaces these scores alone, no dot products.

    Raises:
        InputError: an argument is impossible.
        WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
    """
    checked_length("queries", queries)
    if name is not None:
        checked_result_name(name)
    if samples < 1:
        raise InputError(f"samples={samples}: expected at least 1.")
    if damping is not None and not 0 < damping < math.inf:
        raise InputError(f"damping={damping}: expected a number above 0, or None for 0.01 x the mean eigenvalue.")
    roots = {} if conditioning is None else conditioning_roots(study._sweep, conditioning)
    fingerprint = {
        **study._fingerprint(),
        "strategy": "fisher",
        "targets": f"{samples} drawn for each example, seed {seed}",
        "damping": "0.01 x mean eigenvalue" if damping is None else repr(damping),
        "queries": dataset_digest(queries),
        "measured": checked_settings(study._sweep.task).get("measure", "measurement"),
        "precision": str(study._sweep.precision),
        **conditioning_digest(roots),
    }

    folder = f"{samples}-samples-seed{seed}" + "-conditioned" * bool(roots)

    def compute(_: Stages) -> dict[str, Tensor]:
        def dots(asked: _Examples, known: _Examples) -> Tensor:
            there = _with_losses(study, known, seed, within(study.path, "fisher", folder, known.kind))
            factors = there.fit("identity", conditioning=conditioning)
            found = there.score(asked, factors, query_batch_size=query_batch_size, train_batch_size=train_batch_size)
            return found.values.double()

        trained, asked = _Examples(study.train, "trained"), _Examples(queries, "asked")
        drawn = _Examples(study.train, "drawn", samples)
        products = dots(asked, trained), dots(asked, drawn), dots(drawn, trained), dots(drawn, drawn)
        values = inverse_products(*products, damping)
        return {"values": values.to(study._sweep.dtype)} if study._sweep.ranks.is_main else {}

    with study.alone():
        called = result_name("fisher", fingerprint, name)
        return Scores.load(keep_scores(study.path, called, fingerprint, study.profile, overwrite, compute))


def inverse_products(pairs: Tensor, asked: Tensor, trained: Tensor, drawn: Tensor, damping: float | None) -> Tensor:
    """g_q^T (F + damping)^-1 g_t for every pair [queries, train] out of dot products.

    Args:
        pairs: of queries with training examples, [queries, train].
        asked: of queries with samples, [queries, samples].
        trained: of samples with training examples, [samples, train].
        drawn: of samples with each other, [samples, samples].
        damping: as in `fisher_scores`.

    Raises:
        InputError: all drawn gradients are zero, so there is no mean eigenvalue.
    """
    count = len(drawn)
    gram = (drawn + drawn.T) / (2 * count)
    added = _DAMPING_SHARE * float(gram.diagonal().mean()) if damping is None else damping
    if not added > 0:
        raise InputError("damping=None: all gradients of drawn targets are zero, so it would be 0. Give a number.")
    damped = gram + added * torch.eye(count, dtype=gram.dtype)
    found: Tensor = (pairs - asked @ torch.linalg.solve(damped, trained) / count) / added
    return found


@dataclass(frozen=True)
class _Examples:
    """A dataset whose examples say which loss is meant, one time or several.

    Attributes:
        kind: "trained", the loss; "drawn", the loss with targets that the model draws; "asked", the measurement.
        times: how often it is gone through.
    """

    examples: Dataset[object]
    kind: _Kind
    times: int = 1

    def __len__(self) -> int:
        return len(self.examples) * self.times

    def __getitem__(self, position: int, /) -> object:
        return self.kind, position, read_example(self.examples, position % len(self.examples))


class _Marked(NamedTuple, Generic[Batch]):
    """A batch of examples of one kind, with their positions."""

    kind: str
    positions: tuple[int, ...]
    batch: Batch


class _Losses(Task[_Marked[Batch]]):
    """A task with all three kinds of losses."""

    def __init__(self, task: Task[Batch], seed: int) -> None:
        super().__init__(task.layers)
        self._task, self.seed = task, seed

    def train_loss(self, model: nn.Module, batch: _Marked[Batch], sampler: Sampler | None = None) -> Tensor:
        """The loss that a batch's kind says."""
        if batch.kind == "asked":
            return self._task.measurement(model, batch.batch)
        drawn = Sampler(self.seed, batch.positions) if batch.kind == "drawn" else None
        return self._task.train_loss(model, batch.batch, drawn)

    def masks(self, batch: _Marked[Batch]) -> Sequence[Tensor]:
        return self._task.masks(batch.batch)

    def head(self, model: nn.Module) -> nn.Module | None:
        return self._task.head(model)

    def collate(self, examples: Sequence[object]) -> _Marked[Batch]:
        kinds, positions, plain = zip(*cast(Sequence[tuple[str, int, object]], examples), strict=True)
        return _Marked(kinds[0], positions, self._task.collate(plain))

    def select(self, model: nn.Module, example: object) -> object:
        kind, position, plain = cast(tuple[str, int, object], example)
        return kind, position, self._task.select(model, plain)

    def check(self, model: nn.Module, batch: _Marked[Batch]) -> None:
        self._task.check(model, batch.batch)

    def verify(self, model: nn.Module, batch: _Marked[Batch]) -> None:
        self._task.verify(model, batch.batch)

    def settings(self) -> dict[str, str]:
        return {**super().settings(), **{f"task's {key}": each for key, each in checked_settings(self._task).items()}}


def _with_losses(study: Study[Batch], train: _Examples, seed: int, path: Path) -> Study[_Marked[Batch]]:
    """A study of the same model whose training examples are these."""
    sweep = study._sweep
    return Study(
        path,
        sweep.model,
        _Losses(sweep.task, seed),
        train=train,
        progress=sweep.progress,
        checkpoint_seconds=sweep.checkpoint_seconds,
        memory_budget=None if sweep.memory_budget is None else sweep.memory_budget / 2**30,
        compile_activations=sweep.compile_activations,
        offload_factors=sweep.offload_factors,
    )
