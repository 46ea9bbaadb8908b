"""Fits, scores and banks of retrainings killed at random moments, and started again until they finish.

This module draws the moments; `jobs.py` does the rest.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from tests.reliability.jobs import Ended, Undisturbed, UndisturbedRuns
from tests.reliability.kill_worker import BANKS, JOBS, End
from tests.reliability.outcomes import Outcome

_MOST = 4  # kills of one run


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Kill jobs with SIGKILL until `count` of them were under way when it came, and let each finish.

    Half of the kills come at a time drawn from how long the job takes, the others at a drawn change of a file: just
    before it, or with only a part of what was being written there.

    Returns:
        One for each job that was killed.

    Raises:
        AssertionError: a job has not ended as it should; what is said names the seed and the kills.
    """
    draw, undisturbed = random.Random(seed), UndisturbedRuns(folder / "undisturbed")
    jobs = [*JOBS, *BANKS]
    draw.shuffle(jobs)
    found = {job: _Tally() for job in jobs}
    for number, (job, tally) in enumerate(cycle(found.items())):
        left = count - sum(each.kills for each in found.values())
        if not left:
            break
        whole = undisturbed.of(job)
        ends = [_drawn(draw, whole) for _ in range(draw.randint(1, min(left, _MOST)))]
        ended = Ended.again_and_again(whole, folder / f"{number}", ends, f"seed {seed}, round {number}")
        tally.add(ended)
    return [tally.outcome(job) for job, tally in found.items() if tally.kills]


def _drawn(draw: random.Random, undisturbed: Undisturbed) -> End:
    if draw.random() < 0.5:
        return End(seconds=draw.uniform(0, undisturbed.seconds))
    return End(moment=draw.randint(1, undisturbed.moments))


@dataclass
class _Tally:
    """How often a job was killed, and how many batches or retrainings were begun again because of that."""

    kills: int = 0
    repeated: int = 0

    def add(self, ended: Ended) -> None:
        """Check one that has finished; of its processes, some were faster than their kill, which is not counted."""
        assert set(ended.codes) <= {0, -signal.SIGKILL}, f"{ended.case}: {ended.said}"
        kills = ended.codes.count(-signal.SIGKILL)
        self.kills += kills
        self.repeated += ended.check(kills, lost=kills * BANKS.get(ended.undisturbed.job, 1))

    def outcome(self, job: str) -> Outcome:
        if job in BANKS:
            again = f"{self.repeated} retrainings were begun again in all, never more than {BANKS[job]} for a kill"
        else:
            again = (
                f"{self.repeated} batches were begun again in all, never more than 1 for a kill, and resident query "
                "gradients were computed anew"
            )
        result = f"Started again, it ended with the files of an undisturbed run and no others, bit for bit. {again}."
        return Outcome(f"SIGKILL at a random moment of {job}", self.kills, result)
