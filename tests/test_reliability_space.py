"""A disk that fills up, quotas, read-only directories; and that what a run takes on disk is known before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import space


def test_a_disk_that_fails_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    outcomes = space.measure(tmp_path, 4, seed=0)
    assert all(not each.result.startswith("0 ended") for each in outcomes)


@pytest.mark.skipif(not space.can_mount(), reason="cannot mount a small file system here (unshare, setpriv, tmpfs)")
def test_what_a_run_takes_on_disk_is_estimated_before_it_begins(tmp_path: Path) -> None:
    """On a disk as large as what was used at most, a run ends; on one a few per cent smaller, it does not begin."""
    command = [*space.UNSHARED, sys.executable, "-m", "tests.reliability.space_estimates", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
