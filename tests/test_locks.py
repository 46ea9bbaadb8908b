"""Two processes on one run directory: one waits, and no result is made of both."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

import wherefrom as wf
from tests import lock_worker, resume_worker
from tests.models import mlp_case
from tests.processes import Running, start
from tests.runs import lines, results, unprivileged
from wherefrom.runtime.errors import StorageError
from wherefrom.runtime.signals import held_signals
from wherefrom.store.locks import run_lock


def wait_for(log: Path, count: int) -> None:
    while lines(log) < count:
        time.sleep(0.01)


def test_the_second_process_waits_and_says_for_whom(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    first = start(lock_worker.main, run, log, 600.0)
    wait_for(log, 1)
    others = [start(lock_worker.main, run, log, 0.1) for _ in range(2)]
    told = [read_until(other, "Waiting for its end.") for other in others]
    assert all(f"is in use by process {first.process.pid} on " in message for message in told)
    assert lines(log) == 1
    first.process.kill()
    ends = [other.finished() for other in others]
    assert [end.returncode for end in ends] == [0, 0]
    messages = " ".join(" ".join(end.stderr.split()) for end in ends)
    assert f"was in use by process {first.process.pid} on" in messages
    assert messages.count("ended without finishing") == 1  # the other finds a lock that was given up
    words = [line.split() for line in log.read_text().splitlines()][1:]
    assert [word for word, _ in words] == ["begin", "end"] * 2
    assert all(begin[1] == end[1] for begin, end in zip(words[::2], words[1::2], strict=True))
    assert [path.name for path in run.iterdir()] == [".lock"]


def read_until(process: Running, words: str) -> str:
    """What a process says up to these words, on one line."""
    while words not in (said := " ".join(process.said("stderr").split())):
        assert process.process.is_alive(), said
        time.sleep(0.01)
    return said


def test_two_fits_at_once_are_one_fit_and_one_reuse(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert start(resume_worker.main, str(alone), str(tmp_path / "alone.log")).finished().returncode == 0
    pair = [start(resume_worker.main, str(both), str(tmp_path / f"{number}.log")) for number in range(2)]
    assert [process.finished().returncode for process in pair] == [0, 0]
    expected, found = results(alone), results(both)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # Each batch was done by one of them; only planning, two examples, may be done by both.
    done = [lines(tmp_path / f"{number}.log") for number in range(2)]
    assert sum(done) <= lines(tmp_path / "alone.log") + 2


def test_finished_results_are_read_where_nothing_can_be_written() -> None:
    case = mlp_case()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        run = Path(folder) / "run"
        study = wf.Study(run, case.model, case.task, train=case.train)
        expected = study.score(case.queries, wf.EKFAC())
        for path in (run / ".lock", run):
            path.chmod(0o555)
        with unprivileged():
            again = wf.Study(run, case.model, case.task, train=case.train)
            found = again.score(case.queries, wf.EKFAC())
            assert torch.equal(found.values, expected.values)
            with pytest.raises(StorageError, match="Cannot write .*Permission denied"):
                again.fit(wf.Diagonal())
        run.chmod(0o755)


def test_a_lock_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(StorageError, match="Cannot lock"), run_lock(tmp_path):
        pass


def test_a_lock_may_be_entered_again_by_another_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_lock(tmp_path / "run"), run_lock(Path("run")):
        assert (tmp_path / "run" / ".lock.json").exists()
    assert not (tmp_path / "run" / ".lock.json").exists()


@pytest.mark.parametrize("since", ["1" + 400 * "0", "[]", "1e999"])
def test_a_forged_record_of_the_owner_keeps_nobody_out(tmp_path: Path, since: str) -> None:
    (tmp_path / ".lock.json").write_text(f'{{"process": 1, "host": "other", "since": {since}}}')
    with run_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_forked_process_ends_at_the_first_signal() -> None:
    with held_signals():
        ready, started = os.pipe()
        child = os.fork()
        if not child:
            os.write(started, b".")  # Python forgets signals that come before it has forked
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
