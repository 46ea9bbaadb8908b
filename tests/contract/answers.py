"""Answers of the ways of scoring, each found once for all tests, in a run directory of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import Tensor

from tests.contract.methods import METHODS, Property, values
from tests.contract.settings import Setting, Settings, Variation


def able(*wanted: Property) -> pytest.MarkDecorator:
    """The test for every way of scoring that has these properties."""
    return pytest.mark.parametrize(
        "name", [name for name, each in METHODS.items() if not {*wanted} & {*each.unsupported}]
    )


@dataclass(frozen=True)
class Answer:
    """What a way of scoring has found, and the run directory that it was found in, which others must not change."""

    values: Tensor
    run: Path


class Answers:
    """Answers to settings, each found when it is first asked for.

    Args:
        folder: an empty one, for run directories.
    """

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(folder / "checkpoints")
        self._folder = folder
        self._found: dict[str, Answer] = {}

    def usual(self, name: str, empirical: bool = False) -> Answer:
        """To the usual setting, with drawn targets or the dataset's own."""
        return self._of(name, f"empirical={empirical}", replace(self.settings.usual(), empirical=empirical))

    def other(self, name: str, what: Variation) -> Answer:
        """To a setting that differs in one thing."""
        return self._of(name, what, self.settings.other(what))

    def _of(self, name: str, called: str, setting: Setting) -> Answer:
        run = self._folder / f"{name}, {called}".replace(" ", "-")
        if run.name not in self._found:
            self._found[run.name] = Answer(values(METHODS[name].score(run, setting)), run)
        return self._found[run.name]
