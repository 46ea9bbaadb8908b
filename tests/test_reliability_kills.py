"""Processes killed at random moments and started again; docs/reliability.md has many more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.kills import measure

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the files of a process in /proc")


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    assert sum(outcome.times for outcome in measure(tmp_path, count=16, seed=0)) == 16
