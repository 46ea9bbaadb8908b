"""Every attack of the threat model is one, and is stopped; and the page says what stops it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from attacks.__main__ import NAMES
from attacks.common import HarmlessError, Stop, SucceededError, main, refused, stops

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stopped(name: str, tmp_path: Path) -> None:
    module = import_module(f"attacks.{name}")
    for stop in stops(module.live, module.attack, tmp_path):
        assert stop.tried
        assert stop.by


def test_the_page_goes_through_all_of_them() -> None:
    page = (REPOSITORY / "docs" / "threat-model.md").read_text()
    headings = [line.split("`")[1] for line in page.splitlines() if line.startswith("### ") and "`" in line]
    assert sorted(headings) == NAMES


def harmful(folder: Path) -> bool:
    (folder / "harm").mkdir()
    return (folder / "harm").exists()


def succeeding(folder: Path) -> Iterator[Stop]:
    yield refused("harm", lambda: harmful(folder))


def nothing(folder: Path) -> Iterator[Stop]:
    yield from ()


def stopped(folder: Path) -> Iterator[Stop]:
    yield Stop("harm", "nobody")


def test_an_attack_that_succeeds_or_tries_nothing_is_no_pass(tmp_path: Path) -> None:
    for number, attack in enumerate((succeeding, nothing)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(SucceededError, match="nothing was"):
            stops(harmful, attack, folder)


def test_an_attack_that_has_become_harmless_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(HarmlessError):
        stops(lambda folder: False, stopped, tmp_path)


def test_one_attack_ends_with_an_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    main(harmful, stopped)
    assert capsys.readouterr().out == "harm\n    stopped by nobody\n"
    with pytest.raises(SystemExit, match="SucceededError: harm: nothing was refused"):
        main(harmful, succeeding)
