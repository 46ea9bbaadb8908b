"""How short the ways are: from a call to the product that it is about, and of a matrix's bytes through the digest."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import Tensor

import wherefrom as wf
from tests.models import gpt2_case, mlp_case
from tests.processes import start
from wherefrom.scoring.bank import GradientBank
from wherefrom.store import fingerprint

PACKAGE = str(Path(wf.__file__).parent)
MOST_FRAMES = 12


def frames_of_the_package() -> list[str]:
    """The package's functions that are being called where this is called, the innermost first."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return found


def test_few_frames_lie_between_a_call_and_its_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own; autograd calls its hooks in the same thread on a CPU, so that nothing is missed."""
    seen: list[list[str]] = []
    product = GradientBank.product

    def watched(self: GradientBank, *arguments: Any) -> Tensor:
        seen.append(frames_of_the_package())
        return product(self, *arguments)

    case = gpt2_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    study.fit()
    monkeypatch.setattr(GradientBank, "product", watched)
    study.score(case.queries)
    assert len(seen) == len(study.layers)
    for frames in seen:
        between = frames[: frames.index("Study.score")]
        assert len(between) <= MOST_FRAMES, " < ".join(between)


def watch_digests(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All bytes that digests of tensors are taken of from now on, piece by piece."""
    seen: list[bytes] = []
    sha256 = fingerprint._sha256

    def watched(data: bytes | memoryview) -> bytes:
        seen.append(bytes(data))
        return sha256(data)

    monkeypatch.setattr(fingerprint, "_sha256", watched)
    return seen


def looks_at_blocks(seen: list[bytes], scores: wf.Scores, rows: int) -> list[int]:
    """How often each block of so many rows was looked at; all are smaller than a piece."""
    return [seen.count(block.contiguous().numpy().tobytes()) for block in scores.values.split(rows)]


@pytest.mark.parametrize(("budget", "rows"), [(None, 5), (1e-9, 1)], ids=["one block", "five blocks"])
def test_a_matrix_goes_through_the_digest_when_it_is_written_and_when_another_process_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float | None, rows: int
) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=wf.Execution(memory_budget=budget))
    seen = watch_digests(monkeypatch)
    scores = study.score(case.queries, name="mine")
    assert looks_at_blocks(seen, scores, rows) == [1] * (5 // rows)
    done = start(load_elsewhere, tmp_path / "scores" / "mine", rows).finished()
    assert done.stdout.split() == ["1"] * (5 // rows), done.stderr


def load_elsewhere(folder: Path, rows: int) -> None:
    """Load scores, and print how often each of their blocks was looked at."""
    seen = watch_digests(pytest.MonkeyPatch())
    scores = wf.Scores.load(folder)
    print(*looks_at_blocks(seen, scores, rows))
