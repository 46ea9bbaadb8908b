"""A few of the wrong inputs of which docs/reliability.md counts many."""

from __future__ import annotations

from pathlib import Path

from tests.reliability import inputs


def test_wrong_inputs_end_in_a_result_or_in_an_error_that_says_what(tmp_path: Path) -> None:
    outcomes = inputs.measure(tmp_path, 180, 0)
    assert len(outcomes) == 4
    assert sum(outcome.times for outcome in outcomes) >= 170
