"""Fits and scores that are asked to stop, with SIGTERM or as Ctrl-C does, and started again until they finish.

This module draws signals and batches; `jobs.py` does the rest.
"""

from __future__ import annotations

import random
import signal
from itertools import cycle
from pathlib import Path

from tests.reliability.jobs import Ended, Undisturbed, UndisturbedRuns
from tests.reliability.kill_worker import JOBS, End
from tests.reliability.outcomes import Outcome

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MOST = 3  # signals to one run
# So that nothing is saved but because of the signal.
_NEVER = 3600.0


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Send jobs a signal until `count` have stopped because of it, and let each finish.

    Half of the signals come while a batch is computed, the others at a drawn change of a file.

    Returns:
        One for each signal.

    Raises:
        AssertionError: a job has not ended as it should; what is said names the seed and the batches.
    """
    draw, undisturbed = random.Random(seed), UndisturbedRuns(folder / "undisturbed")
    jobs = list(JOBS)
    draw.shuffle(jobs)
    stopped = dict.fromkeys(SIGNALS, 0)
    for number, job in enumerate(cycle(jobs)):
        left = count - sum(stopped.values())
        if not left:
            break
        whole = undisturbed.of(job)
        ends = [_drawn(draw, whole) for _ in range(draw.randint(1, min(left, _MOST)))]
        ended = Ended.again_and_again(whole, folder / f"{number}", ends, f"seed {seed}, round {number}", _NEVER)
        for end, code in zip(ends, ended.codes, strict=True):
            stopped[end.signal] += _stopped(ended, end, code)
        ended.check(len(ends), lost=0)
    return [_outcome(number, times) for number, times in stopped.items() if times]


def _drawn(draw: random.Random, undisturbed: Undisturbed) -> End:
    number = draw.choice(SIGNALS)
    if draw.random() < 0.5:
        return End(batch=draw.randint(1, undisturbed.begun.total()), signal=number)
    return End(moment=draw.randint(1, undisturbed.moments), signal=number)


def _stopped(ended: Ended, end: End, code: int) -> bool:
    """Whether a process has stopped in the documented way, rather than had fewer batches left to do."""
    assert code in (0, 128 + end.signal), f"{ended.case}: {ended.said}"
    assert "Traceback" not in ended.said, f"{ended.case}: {ended.said}"
    if code:
        assert "The same command (without --overwrite) goes on from what is saved." in ended.said, (
            f"{ended.case}: {ended.said}"
        )
    return code != 0


def _outcome(number: signal.Signals, times: int) -> Outcome:
    return Outcome(
        f"{number.name} in a random batch, or at a random change of a file, of a fit or score that saves nothing else",
        times,
        f"It saved what was done and ended with exit status {128 + number} and a line that says how to go on. Started "
        "again, no batch of training examples was begun twice, and the files were those of an undisturbed run, bit "
        "for bit.",
    )
