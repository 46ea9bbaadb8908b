"""A model trained again and again on subsets of its data, for any model and any task.

What an attribution method says about leaving examples out is held against these measurements. Each retraining is stored
as soon as it is finished, and asking again, or for more, trains what is missing. This module must not know scores, nor
how a model is trained; that is the training function's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Required, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from wherefrom.evaluate.pool import WorkerError, check_may_start_workers, default_workers, run_jobs
from wherefrom.evaluate.retrainings import (
    GroundTruth,
    retraining_fingerprint,
    retraining_key,
    store_retraining,
    stored_losses,
)
from wherefrom.runtime.errors import InputError, LossError, TrainingError
from wherefrom.runtime.progress import progress_bar
from wherefrom.store.files import remove, within
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.store.locks import DirectoryLock

logger = logging.getLogger("wherefrom")


@dataclass(frozen=True)
class Retraining:
    """One model to train.

    Attributes:
        subset: positions in the training set, ascending.
        seed: of everything that is random in the training.
    """

    subset: tuple[int, ...]
    seed: int


TrainFunction = Callable[[Sequence[Retraining]], Tensor]
"""Trains a model for each retraining and returns each query's measured loss, float [retrainings, queries].

All that is random must come from each retraining's seed. With more than one worker it runs in fresh processes that do
not share the caller's settings of PyTorch: it sets itself what it needs (default dtype, TF32, deterministic kernels).
It must be picklable then (an object of a module-level class), and the script that asks for retrainings must do so under
`if __name__ == "__main__":`.
"""


class RetrainOptions(TypedDict, total=False):
    """Keyword arguments of everything that retrains.

    Attributes:
        fingerprint: required: what makes two results the same: model, data, queries, settings of the training.
        workers: processes that train at once, each on one CPU thread, worker k on GPU k (modulo their number). None is
            one for each GPU, or without GPUs one for each CPU core. A single worker is this process itself.
        together: how many retrainings, all on subsets of one size, the training function is given at once; 1 by
            default. Whether one's result depends on the others' company, by rounding, is up to that function.
        progress: show a progress bar; None shows one when the standard error is a terminal.
        overwrite: train everything again, and delete all that is in the folder.
    """

    fingerprint: Required[Fingerprint]
    workers: int | None
    together: int
    progress: bool | None
    overwrite: bool


def half_subsets(train: int, count: int, seed: int = 0) -> Tensor:
    """Random subsets of `floor(train / 2)` examples each: bool [count, train].

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
    path: str | Path, train: TrainFunction, masks: Tensor, seeds: Sequence[int], **options: Unpack[RetrainOptions]
) -> GroundTruth:
    """Train on every subset once with each seed, or load what is there.

    The same subset and seed give the same result on the same kind of machine, whatever the workers and the order,
    bit for bit if the training function is that deterministic itself. Different kinds of GPU, CPU or versions of
    PyTorch round differently: what is finished can be read anywhere, but is added to only where it was begun.

    A kill at any moment loses the retrainings under way and no others.

    Args:
        path: the folder of the retrainings, for example RUN/retrainings.
        masks: bool [subsets, train], true for the examples of the subset.
        seeds: one for each repeat, all different.
        options: those of `RetrainOptions`.

    Raises:
        InputError: an argument, or what `train` returned, has the wrong type or shape.
        LossError: a measured loss is not finite.
        TrainingError: `train` raised, or a worker died; what is finished is stored.
        MismatchError: what is in the folder was made from something else.
        DamagedError: a stored file is not what was written.
        StorageError: a result cannot be written.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)}: expected at least one seed, and none of them twice.")
    _check_masks(masks)
    # Every subset once before any twice: where it is stopped early there are whole repeats.
    pairs = [(subset, seed) for seed, subset in product(seeds, range(len(masks)))]
    losses = retrain_pairs(path, train, masks, pairs, **options).view(len(seeds), len(masks), -1)
    return GroundTruth(masks, losses.transpose(0, 1).contiguous())


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
) -> Tensor:
    """`retrain` for chosen pairs of a subset and a seed; equal pairs are trained once.

    Args:
        pairs: (position in `masks`, seed) of each retraining.

    Returns:
        The losses, float64 [pairs, queries].

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
    if workers > 1:
        check_may_start_workers()
    masks, path = masks.detach().cpu(), within(Path(path).parent, Path(path).name)
    keys = [retraining_key(masks[subset], seed) for subset, seed in pairs]
    wanted: dict[str, tuple[int, int]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        wanted.setdefault(key, pair)
    with DirectoryLock(path.with_name(f".{path.name}.lock")):
        if overwrite:
            remove(path)
        fingerprint = retraining_fingerprint(fingerprint, masks.shape[1])
        missing = [key for key in wanted if not (path / key).exists()]
        finished = stored_losses(path, fingerprint, adding=bool(missing))
        if missing:
            _Work(path, fingerprint, masks, wanted, finished).run(train, missing, together, workers, progress)
    return torch.stack([finished[key] for key in keys])


def _check_masks(masks: Tensor) -> None:
    if masks.dtype != torch.bool or masks.ndim != 2 or masks.numel() == 0:
        raise InputError(
            f"masks is {masks.dtype} {list(masks.shape)}: expected torch.bool [subsets, train], true where an example "
            "is kept, with at least one subset."
        )
    empty = (~masks.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"masks: subset {empty[0]} keeps no example; there is nothing to train on. Leave it out.")


@dataclass(frozen=True)
class _AsArray:
    """The training function as the workers run it: an array goes from process to process by itself."""

    train: TrainFunction

    def __call__(self, retrainings: Sequence[Retraining]) -> NDArray[np.float64]:
        # A copy: the function may use its tensor again.
        losses = torch.as_tensor(self.train(retrainings)).detach().to("cpu", torch.float64, copy=True)
        return losses.numpy()


@dataclass(frozen=True)
class _Work:
    """The retrainings of one call.

    Attributes:
        wanted: their subsets and seeds, by `retraining_key`.
        finished: the losses of all that are in the folder, which become more.
    """

    folder: Path
    fingerprint: Fingerprint
    masks: Tensor
    wanted: dict[str, tuple[int, int]]
    finished: dict[str, Tensor]

    def run(
        self, train: TrainFunction, missing: Sequence[str], together: int, workers: int, progress: bool | None
    ) -> None:
        """Train what is missing and store each as it is finished."""
        groups = list(self._groups(missing, together))
        jobs = ([self._retraining(key) for key in group] for group in groups)
        try:
            with progress_bar("retraining", len(self.wanted), progress) as show:

                def receive(position: int, outcome: NDArray[np.float64] | Exception) -> None:
                    self._store(groups[position], outcome)
                    show(self._count())

                show(self._count())
                run_jobs(_AsArray(train), jobs, min(workers, len(groups)), receive)
        except WorkerError as error:
            raise TrainingError(
                f"A training process died: it was killed, ran out of memory, or could not start. {self._standing()} "
                "If memory ran out, pass fewer workers. If none ever started, see that the script calls this "
                'under `if __name__ == "__main__":`.'
            ) from error
        except TrainingError as error:
            # Only now is everything stored that was under way.
            raise TrainingError(f"{error} {self._standing()}") from error.__cause__
        except (KeyboardInterrupt, SystemExit):
            logger.warning(f"Stopped. {self._standing()}")
            raise

    def _groups(self, keys: Sequence[str], together: int) -> Iterator[list[str]]:
        """Groups of one subset size each: what is trained together has the same steps."""
        sizes = self.masks.sum(1).tolist()
        by_size: dict[int, list[str]] = {}
        for key in keys:
            by_size.setdefault(sizes[self.wanted[key][0]], []).append(key)
        for alike in by_size.values():
            yield from (alike[start : start + together] for start in range(0, len(alike), together))

    def _retraining(self, key: str) -> Retraining:
        subset, seed = self.wanted[key]
        return Retraining(tuple(self.masks[subset].nonzero().flatten().tolist()), seed)

    def _store(self, group: Sequence[str], outcome: NDArray[np.float64] | Exception) -> None:
        """Store what a group's training gave, and refuse what it should not have given."""
        if isinstance(outcome, Exception):
            reason = f"{type(outcome).__name__}: {outcome}".rstrip(".")
            raise TrainingError(f"Training on {self._named(group)} failed: {reason}.") from outcome
        known = next(iter(self.finished.values()), None)
        queries = len(known) if known is not None else outcome.shape[-1] if outcome.ndim else 0
        if outcome.shape != (len(group), queries) or queries == 0:
            raise InputError(
                f"train returned {list(outcome.shape)} losses for {self._named(group)}: expected "
                f"[{len(group)}, {queries or 'queries'}], one row for each retraining and one column for each query."
            )
        diverged = []
        for key, losses in zip(group, torch.from_numpy(outcome), strict=True):
            if losses.isfinite().all():
                store_retraining(self.folder, self.fingerprint, key, self.masks[self.wanted[key][0]], losses)
                self.finished[key] = losses
            else:
                diverged.append((key, losses))
        if diverged:
            key, losses = diverged[0]
            query = int((~losses.isfinite()).nonzero()[0])
            raise LossError(
                f"After training on {self._named([key])} the loss of query {query} is {float(losses[query])}. Look at "
                f"the training function: did the training diverge? {self._standing()}"
            )

    def _count(self) -> int:
        return sum(key in self.finished for key in self.wanted)

    def _standing(self) -> str:
        return (
            f"{self._count()} of {len(self.wanted)} retrainings are finished and stored; the same call goes on "
            "from there."
        )

    def _named(self, keys: Sequence[str]) -> str:
        names = [f"subset {subset} with seed {seed}" for subset, seed in (self.wanted[key] for key in keys)]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
