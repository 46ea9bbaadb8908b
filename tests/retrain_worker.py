"""A model whose retraining has a closed form, and a bank of it for a process of its own, which waits to be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.evaluate.retrain import Retraining, half_subsets, retrain
from wherefrom.evaluate.retrainings import GroundTruth

EXAMPLES, SUBSETS, SEEDS = 10, 4, (7, 3)
FINGERPRINT = {"model": "the mean"}

TARGETS = np.linspace(-1, 1, EXAMPLES) ** 3
QUERIES = np.array([0.5, -2.0, 1.0])


def expected_losses(masks: NDArray[np.bool_], seeds: Sequence[int]) -> NDArray[np.float64]:
    """[subsets, repeats, queries]: the squared distance of each query from the mean of what is kept, plus the seed."""
    means = masks @ TARGETS / masks.sum(1)
    outputs = means[:, None] + np.array(seeds)[None, :]
    losses: NDArray[np.float64] = (outputs[:, :, None] - QUERIES) ** 2
    return losses


@dataclass(frozen=True)
class MeanModel:
    """Its only weight is the mean of the targets, and it adds the seed to it.

    Attributes:
        log: gets a line for every retraining before it begins: positions kept, seed, threads, process.
        seconds: how long each takes.
        hold: from this line of the log on, retrainings wait for longer than any test; 0 is never.
        meet: retrainings wait until this many processes have begun one.
        fail: positions kept on which it raises; kill: on which it kills its own process.
    """

    log: Path
    seconds: float = 0.0
    hold: int = 0
    fail: tuple[int, ...] = ()
    kill: tuple[int, ...] = ()
    meet: int = 1

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        return torch.stack([self._train(each) for each in retrainings])

    def _train(self, retraining: Retraining) -> Tensor:
        kept = list(retraining.subset)
        with self.log.open("a") as stream:
            stream.write(f"{kept} {retraining.seed} | {torch.get_num_threads()} | {os.getpid()}\n")
        deadline = time.monotonic() + 300  # then the test's own count says what was missing
        while len(processes(self.log)) < self.meet and time.monotonic() < deadline:
            time.sleep(0.01)
        held = self.hold and len(self.log.read_text().splitlines()) >= self.hold
        time.sleep(600 if held else self.seconds)
        if retraining.subset == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if retraining.subset == self.fail:
            raise ArithmeticError("no such model")
        output = torch.tensor(TARGETS)[kept].mean() + retraining.seed
        return (output - torch.tensor(QUERIES)).square()


def processes(log: Path) -> set[int]:
    """Which processes have begun a retraining."""
    return {int(line.split(" | ")[2]) for line in log.read_text().splitlines()}


def fill(
    path: Path,
    log: Path,
    workers: int,
    seconds: float = 0.0,
    hold: int = 0,
    meet: int = 1,
    overwrite: bool = False,
) -> GroundTruth:
    """The bank that every run of this module makes."""
    masks = half_subsets(EXAMPLES, SUBSETS)
    return retrain(
        path,
        MeanModel(log, seconds, hold, meet=meet),
        masks,
        SEEDS,
        fingerprint=FINGERPRINT,
        workers=workers,
        overwrite=overwrite,
    )


def fill_until_ended(path: Path, log: Path, workers: int, hold: int) -> None:
    """The same in a process that is told to stop; by an interrupt it ends as an interpreter does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
    try:
        fill(path, log, workers, seconds=0.05, hold=hold)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
