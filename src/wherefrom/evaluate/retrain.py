"""The retraining bank: a model trained again and again on subsets of its data, for any model and any task.

What an attribution method says about leaving examples out is held against these measurements. A bank is one table on
disk that only ever grows: each retraining is kept as soon as it is finished, and asking again, or for more, trains
what is missing. This module must not know scores, nor how a model is trained; that is the training function's.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.evaluate.bank import Bank, Row, retraining_key
from wherefrom.evaluate.pool import JobError, default_workers, run_jobs
from wherefrom.runtime.errors import InputError, LossError, TrainingError
from wherefrom.runtime.progress import progress_bar
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.store.locks import DirectoryLock

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True)
class Retraining:
    """One model to train.

    Attributes:
        kept: positions in the training set, ascending.
        seed: of everything that is random in the training.
    """

    kept: tuple[int, ...]
    seed: int


TrainFunction = Callable[[Sequence[Retraining]], Tensor]
"""Trains a model for each retraining and returns each query's measured loss, float [retrainings, queries].

All that is random must come from each retraining's seed. With more than one worker it runs in fresh processes that do
not share the caller's settings of PyTorch: it sets itself what it needs (default dtype, TF32, deterministic kernels).
"""


@dataclass(frozen=True)
class Retrainings:
    """What retraining on subsets did to each query's loss.

    Attributes:
        masks: bool [subsets, train], the examples kept.
        seeds: one for each repeat.
        losses: float64 [subsets, repeats, queries], in the unit of the training function.
        seconds: float64 [subsets, repeats]: how long each training took; an even share of its group's time where
            several were trained together.
    """

    masks: Tensor
    seeds: tuple[int, ...]
    losses: Tensor
    seconds: Tensor


def half_subsets(train: int, count: int, seed: int = 0) -> Tensor:
    """Random subsets that keep `floor(train / 2)` examples each: bool [count, train].

    Subset i depends on (seed, i, train) alone, so a longer list begins with the shorter one.

    Raises:
        InputError: `train` is less than 2, or `count` less than 1.
    """
    if train < 2 or count < 1:
        raise InputError(f"train={train}, count={count}: expected at least 2 training examples and at least 1 subset.")
    masks = torch.zeros(count, train, dtype=torch.bool)
    for subset in range(count):
        masks[subset, permutation(train, f"half subset/{seed}/{subset}")[: train // 2]] = True
    return masks


def permutation(length: int, stream: str) -> Tensor:
    """A random order, int64 [length], that depends on the length and the name of the stream alone."""
    digest = hashlib.sha256(f"{stream}/{length}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.randperm(length, generator=generator)


def current_device() -> torch.device:
    """Where a training function should train: the GPU that its worker was given, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def retrain(
    path: str | Path,
    train: TrainFunction,
    masks: Tensor,
    seeds: Sequence[int],
    *,
    fingerprint: Fingerprint,
    workers: int | None = None,
    together: int = 1,
    progress: bool | None = None,
    overwrite: bool = False,
) -> Retrainings:
    """Train on every subset once with each seed, or load what is there.

    The same subset and seed give the same result on the same kind of machine, whatever the workers and the order,
    bit for bit if the training function is that deterministic itself. Different kinds of GPU, CPU or versions of
    PyTorch round differently: a finished bank can be read anywhere, but is extended only where it was begun.

    A kill at any moment loses the retrainings under way and no others.

    Args:
        path: where the table is kept, for example RUN/retrainings. While it grows, finished retrainings are beside it
            in RUN/retrainings.runs.
        train: picklable (an object of a module-level class) when there is more than one worker, and the script that
            calls this must then do so under `if __name__ == "__main__":`.
        masks: bool [subsets, train], the examples to keep.
        seeds: one for each repeat, all different.
        fingerprint: what makes two results the same: model, data, queries, settings of the training.
        workers: processes that train at once, each on one CPU thread, worker k on GPU k (modulo their number). None is
            one for each GPU, or without GPUs one for each CPU core. A single worker is this process itself.
        together: how many retrainings, all on subsets of one size, `train` is given at once. Whether one's result
            depends on the others' company, by rounding, is up to `train`.
        progress: show a progress bar; None shows one when the standard error is a terminal.
        overwrite: train everything again, and replace what has this name.

    Raises:
        InputError: an argument, or what `train` returned, has the wrong type or shape.
        LossError: a measured loss is not finite.
        TrainingError: `train` raised, or a worker died; what is finished is kept.
        MismatchError: the table at `path` was made from something else.
        DamagedError: a stored file is not what was written.
        StorageError: a result cannot be written.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)}: expected at least one seed, and none of them twice.")
    _check_masks(masks)
    # Every subset once before any twice: a bank that is stopped early has whole repeats.
    pairs = [(subset, seed) for seed, subset in product(seeds, range(len(masks)))]
    losses, seconds = retrain_pairs(
        path, train, masks, pairs,
        fingerprint=fingerprint, workers=workers, together=together, progress=progress, overwrite=overwrite,
    )  # fmt: skip
    shape = (len(seeds), len(masks))
    losses, seconds = losses.view(*shape, -1).transpose(0, 1), seconds.view(shape).T
    return Retrainings(masks, tuple(seeds), losses.contiguous(), seconds.contiguous())


def retrain_pairs(
    path: str | Path,
    train: TrainFunction,
    masks: Tensor,
    pairs: Sequence[tuple[int, int]],
    *,
    fingerprint: Fingerprint,
    workers: int | None = None,
    together: int = 1,
    progress: bool | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`retrain` for chosen pairs of a subset and a seed; equal pairs are trained once.

    Args:
        masks: bool [subsets, train], the examples to keep.
        pairs: (row of `masks`, seed) of each retraining.

    Returns:
        The losses, float64 [pairs, queries], and the seconds, float64 [pairs].

    Raises:
        WherefromError: see `retrain`.
    """
    _check_masks(masks)
    workers = default_workers() if workers is None else workers
    if workers < 1 or together < 1:
        raise InputError(f"workers={workers}, together={together}: expected at least 1 of each.")
    if not pairs:
        raise InputError("pairs is empty: expected at least one subset and seed.")
    wrong = [seed for _, seed in pairs if not isinstance(seed, int) or not -(2**63) <= seed < 2**63]
    if wrong:
        raise InputError(f"seed {wrong[0]!r} is a {type(wrong[0]).__name__}: expected integers of 64 bits.")
    masks = masks.detach().cpu()
    keys = [retraining_key(masks[subset], seed) for subset, seed in pairs]
    asked: dict[str, tuple[int, int]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        asked.setdefault(key, pair)
    path = Path(path)
    with DirectoryLock(path.with_name(f".{path.name}.lock")):
        bank = Bank(path, fingerprint, masks.shape[1], overwrite)
        missing = [key for key in asked if key not in bank.rows]
        if missing:
            bank.check_machine()
            groups = _groups(missing, asked, masks.sum(1).tolist(), together)
            _Work(bank, masks, asked, groups).run(train, workers, progress)
        bank.merge()
    rows = [bank.rows[key] for key in keys]
    return torch.stack([row.losses for row in rows]), torch.tensor([row.seconds for row in rows], dtype=torch.float64)


def _check_masks(masks: Tensor) -> None:
    if masks.dtype != torch.bool or masks.ndim != 2 or masks.numel() == 0:
        raise InputError(
            f"masks is {masks.dtype} {list(masks.shape)}: expected torch.bool [subsets, train], true where an example "
            "is kept, with at least one subset."
        )
    empty = (~masks.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"masks: subset {empty[0]} keeps no example; there is nothing to train on. Leave it out.")


def _groups(
    missing: Iterable[str], asked: dict[str, tuple[int, int]], sizes: Sequence[int], together: int
) -> list[list[str]]:
    """Cut the retrainings into groups of one subset size each: what is trained together has the same steps."""
    by_size: dict[int, list[str]] = {}
    for key in missing:
        by_size.setdefault(sizes[asked[key][0]], []).append(key)
    return [keys[start : start + together] for keys in by_size.values() for start in range(0, len(keys), together)]


_Job = Sequence[tuple[NDArray[np.bool_], int]]


@dataclass(frozen=True)
class _Timed:
    """The training function as the workers run it: arrays in, arrays and the seconds for each retraining out."""

    train: TrainFunction

    def __call__(self, job: _Job) -> tuple[NDArray[np.float64], float]:
        retrainings = [Retraining(tuple(np.flatnonzero(mask).tolist()), seed) for mask, seed in job]
        start = time.perf_counter()
        # A copy: the function may use its tensor again.
        losses = torch.as_tensor(self.train(retrainings)).detach().to("cpu", torch.float64, copy=True)
        return losses.numpy(), (time.perf_counter() - start) / len(job)


@dataclass(frozen=True)
class _Work:
    """The retrainings of one call that are still to be done.

    Attributes:
        asked: subset and seed of every key of the call.
        groups: keys that are trained together.
    """

    bank: Bank
    masks: Tensor
    asked: dict[str, tuple[int, int]]
    groups: list[list[str]]

    def run(self, train: TrainFunction, workers: int, progress: bool | None) -> None:
        """Train all groups and keep each as it is finished."""
        jobs = [[(self._mask(key).numpy(), self.asked[key][1]) for key in group] for group in self.groups]
        try:
            with progress_bar("retraining", len(self.asked), progress) as show:

                def receive(position: int, result: tuple[NDArray[np.float64], float]) -> None:
                    self._keep(self.groups[position], *result)
                    show(self._finished())

                show(self._finished())
                run_jobs(_Timed(train), jobs, min(workers, len(jobs)), receive)
        except JobError as error:
            cause = error.__cause__
            reason = f"{type(cause).__name__}: {cause}".rstrip(".")
            raise TrainingError(
                f"Training on {self._named(self.groups[error.job])} failed: {reason}. {self._standing()}"
            ) from cause
        except BrokenProcessPool as error:
            raise TrainingError(
                f"A training process died: it was killed, ran out of memory, or could not start. {self._standing()} "
                "If memory ran out, pass fewer workers. If none ever started, see that the script calls this "
                'under `if __name__ == "__main__":`.'
            ) from error
        except (KeyboardInterrupt, SystemExit):
            logger.warning(f"Stopped. {self._standing()}")
            raise

    def _keep(self, group: Sequence[str], losses: NDArray[np.float64], seconds: float) -> None:
        known = next(iter(self.bank.rows.values()), None)
        queries = len(known.losses) if known else losses.shape[-1] if losses.ndim else 0
        if losses.shape != (len(group), queries) or queries == 0:
            raise InputError(
                f"train returned {list(losses.shape)} losses for {self._named(group)}: expected "
                f"[{len(group)}, {queries or 'queries'}], one row for each retraining and one column for each query."
            )
        rows = dict(zip(group, torch.from_numpy(losses), strict=True))
        diverged = [key for key, row in rows.items() if not row.isfinite().all()]
        for key, row in rows.items():
            if key not in diverged:
                self.bank.add(Row(self._mask(key), self.asked[key][1], row, seconds))
        if diverged:
            row = rows[diverged[0]]
            query = int((~row.isfinite()).nonzero()[0])
            raise LossError(
                f"After training on {self._named(diverged[:1])} the loss of query {query} is {float(row[query])}. Look "
                f"at the training function: did the training diverge? {self._standing()}"
            )

    def _mask(self, key: str) -> Tensor:
        return self.masks[self.asked[key][0]]

    def _finished(self) -> int:
        return sum(key in self.bank.rows for key in self.asked)

    def _standing(self) -> str:
        return (
            f"{self._finished()} of {len(self.asked)} retrainings are finished and kept; the same call goes on "
            "from there."
        )

    def _named(self, keys: Sequence[str]) -> str:
        names = [f"subset {subset} with seed {seed}" for subset, seed in (self.asked[key] for key in keys)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
