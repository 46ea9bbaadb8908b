"""Fits, scores and banks of retrainings killed at random moments, and started again until they finish.

`python -m tests.reliability.kills FOLDER COUNT SEED` prints what it found. This module knows how processes are started
and ended, and what has to be true of a run directory afterwards; it must not know what a job does.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

from tests.reliability.kill_worker import BANKS, JOBS, QUERIES_AGAIN, work
from tests.reliability.outcomes import Outcome
from tests.runs import begun, results

# Sweeps over queries are not saved: what they give is needed in memory, and is made again.
_NOT_SAVED = "query"
_MOST_KILLS = 4
_SAME = "Continued, the run ended with the files of an undisturbed one and no others, bit for bit"


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Kill jobs with SIGKILL until `count` of them were under way when it came, and let each finish.

    Half of the kills come at a time drawn from how long the job takes, the others at a drawn change of a file: just
    before it, or with only a part of what was being written there.

    Returns:
        One for each job that was killed.

    Raises:
        AssertionError: a job has not ended as it should; what is said names the seed and the kills.
    """
    draw = random.Random(seed)
    fitted = Undisturbed.made("a fit", folder / "fitted").run
    undisturbed = {
        job: Undisturbed.made(job, folder / "undisturbed", fitted if job in JOBS and job != "a fit" else None)
        for job in (*JOBS, *BANKS)
    }
    found = {job: Tally() for job in undisturbed}
    for number, (job, tally) in enumerate(cycle(found.items())):
        left = count - sum(each.kills for each in found.values())
        if not left:
            break
        tries = [_drawn_kill(draw, undisturbed[job]) for _ in range(draw.randint(1, min(left, _MOST_KILLS)))]
        _killed(undisturbed[job], folder / f"{number}", tries, f"seed {seed}, round {number}, {job}", tally)
    return [tally.outcome(job) for job, tally in found.items() if tally.kills]


@dataclass(frozen=True)
class Kill:
    """When a process is killed: after some seconds, or at one of its `Moments`; infinite seconds and 0 are never."""

    seconds: float = float("inf")
    moment: int = 0


@dataclass
class Tally:
    """How often a job was killed, and how many batches (or retrainings) were begun more than once in all."""

    kills: int = 0
    repeated: int = 0

    def outcome(self, job: str) -> Outcome:
        what = "retrainings" if job in BANKS else "batches"
        most = BANKS.get(job, 1)
        return Outcome(
            f"SIGKILL at a random moment of {job}",
            self.kills,
            f"{_SAME}. {self.repeated} {what} under way were done again in all, never more than {most} for a kill"
            + ("." if job in BANKS else ", not counting the one that makes a query's gradient anew."),
        )


@dataclass(frozen=True)
class Undisturbed:
    """A job that nothing came in between of, and what another one is held against.

    Attributes:
        before: the run directory that it began with, if any.
        seconds: how long it took.
    """

    job: str
    run: Path
    before: Path | None
    seconds: float
    log: Path = field(repr=False)

    @classmethod
    def made(cls, job: str, folder: Path, before: Path | None = None) -> Undisturbed:
        """Do the job in a folder."""
        run, log = folder / job / "run", folder / job / "log.txt"
        run.parent.mkdir(parents=True)
        if before:
            shutil.copytree(before, run)
        start = time.perf_counter()
        ended = run_job(job, run, log)
        seconds = time.perf_counter() - start
        assert ended == 0, f"{job}: {log.with_suffix('.errors').read_text()}"
        return cls(job, run, before, seconds, log)

    @cached_property
    def begun(self) -> Counter[str]:
        """Every batch, once."""
        return Counter(begun(self.log))

    @cached_property
    def moments(self) -> int:
        """How many moments there were to be killed at."""
        return int(self.log.with_suffix(".moments").read_text())

    @cached_property
    def bits(self) -> dict[str, bytes]:
        """See `_bits`."""
        return _bits(self.run)


def run_job(job: str, run: Path, log: Path, kill: Kill | None = None, seconds: float = 0.0) -> int:
    """Do a job in a process of its own, and end it as told; how it ended, as `subprocess` says it.

    Args:
        seconds: between saves.
    """
    kill = kill or Kill()
    context = get_context("forkserver")
    # What takes seconds to import is there when a process begins.
    context.set_forkserver_preload(["tests.reliability.kill_worker", "torch._dynamo"])
    process = context.Process(target=work, args=(job, run, log, kill.moment, seconds))
    process.start()
    process.join(min(kill.seconds, 300))  # none takes that long
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _drawn_kill(draw: random.Random, undisturbed: Undisturbed) -> Kill:
    if draw.random() < 0.5:
        return Kill(seconds=draw.uniform(0, undisturbed.seconds))
    return Kill(moment=draw.randint(1, undisturbed.moments))


def _killed(undisturbed: Undisturbed, folder: Path, tries: list[Kill], case: str, tally: Tally) -> None:
    """Kill a job again and again, let it finish, and look at what it left; one that was faster is not counted."""
    run, log = folder / "run", folder / "log.txt"
    folder.mkdir(parents=True)
    if undisturbed.before:
        shutil.copytree(undisturbed.before, run)
    ends = [run_job(undisturbed.job, run, log, kill) for kill in tries]
    case = f"{case}, {tries} ended {ends}"
    ends.append(run_job(undisturbed.job, run, log))
    errors = log.with_suffix(".errors")
    assert ends[-1] == 0 and set(ends) <= {0, -signal.SIGKILL}, f"{case}: {errors.read_text()}"
    kills = ends.count(-signal.SIGKILL)
    tally.kills += kills
    tally.repeated += check(undisturbed, run, log, kills, case)
    shutil.rmtree(folder)


def check(undisturbed: Undisturbed, run: Path, log: Path, kills: int, case: str) -> int:
    """Hold a finished run against an undisturbed one.

    Args:
        kills: how many may have cost the batch that was under way, and what was in memory of queries.
        case: what is said when something is wrong.

    Returns:
        How many batches of sweeps that are saved were begun more than once.
    """
    done = Counter(begun(log))
    missing = undisturbed.begun - done
    assert not missing, f"{case}: never done: {missing}"
    more = done - undisturbed.begun
    queries = sum(times for line, times in more.items() if line.startswith(_NOT_SAVED))
    repeated = more.total() - queries
    assert repeated <= kills * BANKS.get(undisturbed.job, 1), f"{case}: done again: {more}"
    assert queries <= kills * QUERIES_AGAIN.get(undisturbed.job, 1), f"{case}: done again: {more}"
    found = _names(run)
    expected = _names(undisturbed.run)
    assert found == expected, f"{case}: left over {sorted(found - expected)}, missing {sorted(expected - found)}"
    changed = [name for name, content in _bits(run).items() if content != undisturbed.bits[name]]
    assert not changed, f"{case}: other bits in {changed}"
    return repeated


def _names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def _bits(run: Path) -> dict[str, bytes]:
    """Every finished tensor; a bank's rows in one order, and without the seconds that each has taken."""
    found = results(run)
    if "bank/seconds" in found:
        del found["bank/seconds"]
        masks, seeds = found["bank/masks"].tolist(), found["bank/seeds"].tolist()
        order = sorted(range(len(seeds)), key=lambda row: (masks[row], seeds[row]))
        found = {name: tensor[order] for name, tensor in found.items()}
    return {name: f"{each.dtype} {list(each.shape)} ".encode() + each.numpy().tobytes() for name, each in found.items()}


if __name__ == "__main__":
    for outcome in measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        print(f"{outcome.times:4} x {outcome.what}: {outcome.result}")
