"""Several processes give what one gives, stop together, and go on where they were."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import wherefrom as wf
from tests import rank_worker
from tests.models import TRANSFORMERS, mlp_case, relative_error
from tests.processes import Running, start_ranks
from tests.runs import results
from wherefrom.runtime.distributed import Ranks


def start(job: str, run: Path, count: int, **variables: str) -> list[Running]:
    """Start processes that do a job together."""
    return start_ranks(rank_worker.main, job, run, count=count, variables=variables)


def finished(processes: list[Running]) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    ends = [process.finished(timeout=300) for process in processes]
    return [(end.returncode, end.stderr) for end in ends]


# With a digest of the factors that it is made with, which are alike, and not to the last bit.
INDEXED = re.compile(r"(index/.*)-[0-9a-f]{8}/(\d+)-[0-9a-f]+/")


def comparable(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without eigenvectors, which have no sign, and what an index sketches in their coordinates."""
    unlike = ("eigenbasis/", "/codes", "/scales")
    return {INDEXED.sub(r"\1/\2/", name): each for name, each in found.items() if not any(map(name.count, unlike))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What one process finds."""
    found = {}
    for job in ("mlp", "gpt2", "experts")[: 3 if TRANSFORMERS >= (5,) else 2]:
        run = tmp_path_factory.mktemp(job)
        rank_worker.JOBS[job](run)
        found[job] = results(run)
    return found


@pytest.mark.parametrize(("job", "count"), [("mlp", 2), ("gpt2", 3), ("sharded", 2), ("sharded_experts", 2)])
def test_several_processes_give_what_one_gives(
    tmp_path: Path, alone: dict[str, dict[str, Tensor]], job: str, count: int
) -> None:
    if job == "sharded_experts" and TRANSFORMERS < (5,):
        pytest.skip("experts are lists of linear layers, routed by their owner")
    assert [status for status, _ in finished(start(job, tmp_path, count))] == [0] * count
    found, expected = results(tmp_path), alone["gpt2" if job == "sharded" else job.removeprefix("sharded_")]
    found, expected = comparable(found), comparable(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-9, name
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What three processes find."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert all(status == 0 for status, _ in finished(start("slow", run, 3)))
    return results(run)


@pytest.mark.parametrize("kill", ["1:2", "0:9"])
def test_a_killed_process_stops_the_others_and_the_run_goes_on(
    tmp_path: Path, undisturbed: dict[str, Tensor], kill: str
) -> None:
    ends = finished(start("slow", tmp_path, 3, KILL=kill))
    victim = int(kill[0])
    assert ends[victim][0] == -signal.SIGKILL
    for rank, (status, message) in enumerate(ends):
        assert rank == victim or (status == 1 and "Another process of this run has stopped" in message)
    assert all(status == 0 for status, _ in finished(start("slow", tmp_path, 3)))
    found = results(tmp_path)
    assert found.keys() == undisturbed.keys()
    assert all((found[name] == tensor).all() for name, tensor in undisturbed.items())  # bit for bit
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]


def test_an_error_in_one_process_is_everyone_s(tmp_path: Path) -> None:
    ends = finished(start("poisoned", tmp_path, 2))
    assert [status for status, _ in ends] == [1, 1]
    assert "LossError: Process 1 of 2: eigenvalues: the loss of examples 6 to 11 is nan" in ends[0][1]
    assert "LossError: eigenvalues: the loss of examples 6 to 11 is nan" in ends[1][1]
    assert not results(tmp_path)


def test_processes_with_different_models_are_refused(tmp_path: Path) -> None:
    for status, message in finished(start("unlike", tmp_path, 2)):
        assert status == 1
        assert "RankError: model: process 0 of 2 has" in message
    assert not results(tmp_path)


def test_processes_with_different_queries_are_refused(tmp_path: Path) -> None:
    for status, message in finished(start("unlike_queries", tmp_path, 2)):
        assert status == 1
        assert "RankError: queries: process 0 of 2 has" in message
    assert not results(tmp_path)


def test_a_process_that_shares_weights_and_runs_out_of_memory_ends(tmp_path: Path) -> None:
    """Rather than go on with fewer queries, while the others wait for it in the middle of a pass."""
    ends = finished(start("sharded_full", tmp_path, 2))
    assert [status for status, _ in ends] == [1, 1]
    assert "MemoryLimitError: pairwise scores: a batch of 2 examples does not fit" in ends[1][1]


def test_a_process_that_runs_out_of_memory_takes_the_others_to_fewer_queries(tmp_path: Path) -> None:
    for status, output in finished(start("full", tmp_path / "run", 2)):
        assert status == 0, output
        assert "resident query gradients instead of 5" in " ".join(output.split())
    case = mlp_case()
    study = wf.Study(tmp_path / "alone", case.model, case.task, train=case.train[: rank_worker.TRAIN])
    expected = study.score(case.queries[: rank_worker.QUERIES], wf.Dot())
    found = wf.Scores.load(tmp_path / "run" / "scores" / "dot")
    assert torch.allclose(found.values, expected.values, rtol=1e-12)


def test_a_slower_process_is_waited_for(tmp_path: Path) -> None:
    assert [status for status, _ in finished(start("impatient", tmp_path, 2))] == [0, 0]


def test_processes_may_join_after_a_study_was_made(tmp_path: Path) -> None:
    assert [status for status, _ in finished(start("joined_later", tmp_path, 2))] == [0, 0]


def test_each_process_keeps_query_gradients_on_its_own_device(tmp_path: Path) -> None:
    assert [status for status, _ in finished(start("elsewhere", tmp_path, 2))] == [0, 0]


@given(total=st.integers(0, 50), count=st.integers(1, 9))
def test_shares_are_runs_of_about_equal_length(total: int, count: int) -> None:
    shares = [Ranks(index, count).share(total) for index in range(count)]
    assert [row for share in shares for row in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(costs=st.lists(st.integers(1, 10**12), min_size=1, max_size=20), count=st.integers(1, 9))
def test_unequal_costs_are_shared_in_runs(costs: list[int], count: int) -> None:
    named: dict[str, float] = {str(place): cost for place, cost in enumerate(costs)}
    shares = [Ranks(index, count).share_of(named) for index in range(count)]
    assert [name for share in shares for name in share] == list(named)
    largest = max(sum(named[name] for name in share) for share in shares)
    assert largest <= sum(costs) / count + 1.0001 * max(costs)
