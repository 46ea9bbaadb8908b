"""Damaged and forged files, a few of each kind; docs/reliability.md has many."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.reliability.files import measure


def test_damaged_files_are_refused_or_do_no_harm() -> None:
    # Not in pytest's folders: one of the faults is to be without permissions, also for those.
    with tempfile.TemporaryDirectory() as folder:
        outcomes = measure(Path(folder), count=2, seed=0)
    assert all(outcome.times == 2 for outcome in outcomes)
