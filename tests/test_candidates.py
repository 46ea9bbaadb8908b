"""Exact scores of given candidates alone, against the matrix of all pairs and against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import labels
from wherefrom.runtime.errors import DamagedError, InputError, MismatchError

ALL = wf.Top(100)  # more than there are candidates


def some_candidates(case: Case, count: int = 4) -> Tensor:
    """Others for each query, in no order."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randperm(len(case.train), generator=generator)[:count] for _ in case.queries]
    return torch.stack(rows)


def test_candidates_have_the_scores_of_the_whole_matrix(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    candidates = some_candidates(case)
    found = study.score(case.queries, wf.TwoStage(first=candidates, then=wf.EKFAC(damping=1e-3)), keep=ALL)
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries, seed=0)
    whole = brute.scores("ekfac", 1e-3)
    assert torch.equal(found.train.sort(1).values, candidates.sort(1).values)
    assert relative_error(found.values, whole.gather(1, found.train)) < 1e-9
    assert torch.equal(found.values, found.values.sort(1, descending=True).values)
    assert torch.equal(found.lowest_train, found.train.flip(1))
    assert [hit.train for hit in found.top(1)] == found.train[:, 0].tolist()


def test_batches_and_blocks_of_queries_change_nothing_but_rounding(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = wf.TwoStage(first=some_candidates(case), then=wf.KFAC())
    one = study.score(case.queries, method, keep=ALL)
    execution = wf.Execution(memory_budget=1e-4, train_batch_size=3, query_batch_size=2)
    small = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    assert small.plan(case.queries, wf.KFAC()).block < len(case.queries)
    other = small.score(case.queries, method, keep=ALL, name="other")
    assert relative_error(other.values, one.values) < 1e-12
    assert torch.equal(other.train, one.train)


def test_all_examples_as_candidates_are_the_top_scores(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    count = len(case.train)
    everything = torch.arange(count).expand(len(case.queries), count)
    found = study.score(case.queries, wf.TwoStage(first=everything, then=wf.EKFAC()), keep=ALL)
    expected = study.score(case.queries, wf.EKFAC(), keep=wf.Top(count))
    assert torch.equal(found.train, expected.train)
    assert relative_error(found.values, expected.values) < 1e-12


def test_candidates_are_stored_and_others_refused(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    candidates = some_candidates(case)

    def scored(first: Tensor, name: str | None = None) -> wf.TopScores:
        return study.score(case.queries, wf.TwoStage(first=first, then=wf.Dot()), keep=ALL, name=name)

    found = scored(candidates)
    swept = study.profile.text()
    again = scored(candidates.flip(1))
    assert "pairwise" in swept
    assert torch.equal(again.values, found.values)
    assert torch.equal(wf.TopScores.load(tmp_path / "scores" / "dot-candidates-top100").train, found.train)
    assert labels(tmp_path / "scores") == ["dot-candidates-top100"]
    with pytest.raises(MismatchError, match="candidates: stored 4 of each query"):
        scored(candidates[:, :3], found.name)
    file = tmp_path / "scores" / found.name / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="has changed"):
        scored(candidates)


def test_impossible_candidates_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    five = len(case.queries)
    wrong: list[tuple[Any, str]] = [
        ([[1, 2], [3]], "first: no tensor .*; expected a method, or training positions"),
        (None, "first: no tensor"),
        (torch.zeros(five, 1, dtype=torch.bool), r"first: bool \[5, 1\]"),
        (torch.zeros(five, 2), r"first: float32 \[5, 2\]"),
        (torch.arange(5), r"first: int64 \[5\]"),
        (torch.zeros(4, 1, dtype=torch.int64), r"first: int64 \[4, 1\]"),
        (torch.zeros(five, 0, dtype=torch.int64), "expected a method, or training positions"),
        (torch.full((five, 1), len(case.train)), "positions from 12 to 12; expected 0 to 11"),
        (torch.full((five, 1), -1), "positions from -1 to -1"),
        (torch.zeros(five, 2, dtype=torch.int64), "twice"),
    ]
    for first, message in wrong:
        with pytest.raises(InputError, match=message):
            study.score(case.queries, wf.TwoStage(first=first, then=wf.Dot()), keep=ALL)
    with pytest.raises(InputError, match="query_rank=2.*: candidates are scored with whole gradients"):
        wf.TwoStage(first=torch.zeros(five, 1, dtype=torch.int64), then=wf.Dot(query_rank=2))
    assert not (tmp_path / "scores").exists()
