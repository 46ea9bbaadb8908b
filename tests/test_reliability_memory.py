"""Memory that runs out costs no result, and a memory budget is held: measured in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability import memory
from tests.reliability.memory_child import factor_bytes, peak

MIB = 2**20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux tells it")


def test_memory_that_runs_out_costs_no_result(tmp_path: Path) -> None:
    outcomes = memory.measure(tmp_path, 4, seed=0)
    assert all(not each.result.startswith("0 ended") for each in outcomes)


@LINUX
@pytest.mark.parametrize("what", ["fit", "score", "parts", "self-influence"])
def test_a_memory_budget_is_held(tmp_path: Path, what: str) -> None:
    """It counts beyond the model and its factors; while they are made, a fit has these twice, as sums and means."""
    grown = int(memory.run_child(peak, tmp_path, what, 48 / 1024))
    assert grown <= 48 * MIB + 2 * factor_bytes() * (what == "fit")


@LINUX
def test_without_that_budget_more_is_taken(tmp_path: Path) -> None:
    assert int(memory.run_child(peak, tmp_path, "parts", 1)) > 64 * MIB
