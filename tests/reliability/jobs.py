"""Jobs in processes that are ended on the way, and what they leave held against a run that nothing came in between.

This module knows how processes are started and ended, and what has to be true of a run directory afterwards; it must
not know what a job does, nor when it is ended.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.processes import forking_context
from tests.reliability.kill_worker import BANKS, QUERIES_AGAIN, End, work
from tests.runs import begun, results

FIT = "a fit"
_WHOLE = End()
# Seconds that no job takes.
_LONGEST = 300.0
# Sweeps over queries are not saved: what they give is needed in memory, and is made again.
_NOT_SAVED = "query"


def run_job(job: str, run: Path, log: Path, end: End = _WHOLE, checkpoint_seconds: float = 0.0) -> int:
    """Do a job in a process of its own, and end it as told; how it ended, as `subprocess` says it."""
    process = forking_context().Process(target=work, args=(job, run, log, end, checkpoint_seconds))
    process.start()
    process.join(_LONGEST if end.seconds is None else end.seconds)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@dataclass(frozen=True)
class Undisturbed:
    """A finished job that nothing came in between.

    Attributes:
        before: the run directory that it began with, if any.
    """

    job: str
    folder: Path
    before: Path | None

    @property
    def run(self) -> Path:
        """Its run directory."""
        return self.folder / "run"

    @cached_property
    def begun(self) -> Counter[str]:
        """Every batch or retraining; some have the same name."""
        return Counter(begun(self.folder / "log"))

    @cached_property
    def bits(self) -> dict[str, bytes]:
        """See `_bits`."""
        return _bits(self.run)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return float(self._counted["seconds"])

    @property
    def moments(self) -> int:
        """How many `Moments` it had."""
        return int(self._counted["moments"])

    @cached_property
    def _counted(self) -> dict[str, float]:
        counted: dict[str, float] = json.loads((self.folder / "log.json").read_text())
        return counted


class UndisturbedRuns:
    """One of each job, done when it is first asked for; those of a study begin with factors that are there.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Undisturbed] = {}

    def of(self, job: str) -> Undisturbed:
        """The one of this job."""
        if job not in self._made:
            made = Undisturbed(job, self._folder / job, None if job == FIT or job in BANKS else self.of(FIT).run)
            ended = _Try(made, made.folder).go_on()
            assert ended == 0, f"{job} ended with {ended}: {(made.folder / 'log.errors').read_text()}"
            self._made[job] = made
        return self._made[job]


class _Try:
    """A job in a folder of its own."""

    def __init__(self, undisturbed: Undisturbed, folder: Path) -> None:
        self._job, self.run, self.log = undisturbed.job, folder / "run", folder / "log"
        folder.mkdir(parents=True)
        if undisturbed.before:
            shutil.copytree(undisturbed.before, self.run)

    def go_on(self, end: End = _WHOLE, checkpoint_seconds: float = 0.0) -> int:
        return run_job(self._job, self.run, self.log, end, checkpoint_seconds)


@dataclass(frozen=True)
class Ended:
    """A job that was ended again and again, and then finished.

    Attributes:
        folder: with its run directory; deleted after a check that all is well.
        codes: how each but the last process ended.
        case: what is said when something is wrong.
    """

    undisturbed: Undisturbed
    folder: Path
    codes: list[int]
    case: str

    @classmethod
    def again_and_again(
        cls, undisturbed: Undisturbed, folder: Path, ends: Sequence[End], case: str, checkpoint_seconds: float = 0.0
    ) -> Ended:
        """Do a job in a folder, ended in these ways, and at last undisturbed."""
        each = _Try(undisturbed, folder)
        codes = [each.go_on(end, checkpoint_seconds) for end in ends]
        found = cls(undisturbed, folder, codes, f"{case}, {undisturbed.job}, {ends} ended with {codes}")
        last = each.go_on(checkpoint_seconds=checkpoint_seconds)
        assert last == 0, f"{found.case}; the last with {last}: {found.said}"
        return found

    @property
    def said(self) -> str:
        """What all processes wrote on their standard error."""
        return (self.folder / "log.errors").read_text()

    def check(self, interruptions: int, lost: int) -> int:
        """Hold what is left against the undisturbed run.

        Args:
            interruptions: each may have cost what was in memory of queries.
            lost: how many batches of saved sweeps, or retrainings, may have been begun again.

        Returns:
            How many were.
        """
        done, expected = Counter(begun(self.folder / "log")), self.undisturbed.begun
        assert not expected - done, f"{self.case}: never done: {expected - done}"
        more = done - expected
        queries = sum(times for line, times in more.items() if line.startswith(_NOT_SAVED))
        repeated = more.total() - queries
        assert repeated <= lost, f"{self.case}: done again: {more}"
        assert queries <= interruptions * QUERIES_AGAIN.get(self.undisturbed.job, 1), f"{self.case}: done again: {more}"
        self._check_files()
        shutil.rmtree(self.folder)
        return repeated

    def _check_files(self) -> None:
        run = self.folder / "run"
        left, missing = _names(run) - _names(self.undisturbed.run), _names(self.undisturbed.run) - _names(run)
        assert not left and not missing, f"{self.case}: left over {sorted(left)}, missing {sorted(missing)}"
        changed = [name for name, content in _bits(run).items() if content != self.undisturbed.bits[name]]
        assert not changed, f"{self.case}: other bits in {changed}"


def _names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def _bits(run: Path) -> dict[str, bytes]:
    """Every finished tensor."""
    found = results(run)
    return {name: f"{each.dtype} {list(each.shape)} ".encode() + each.numpy().tobytes() for name, each in found.items()}
