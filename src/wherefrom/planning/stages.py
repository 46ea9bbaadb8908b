"""What the stages of a run take, and the tables that say so, of a run that is planned and of one on paper.

This module does not know where the figures come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """What one stage takes.

    Attributes:
        passes: examples that go forward and backward through the model, over all ranks.
        flop: floating-point operations over all ranks, at least.
        memory: bytes on each rank's device, by what they are for.
        sent: bytes that each rank sends.
        copied: bytes between each device and its host.
        seconds: arithmetic at the speed that is expected, then everything that is sent and copied; 0 if not known.
        least_seconds: all at full speed and at the same time; a lower bound.
    """

    name: str
    passes: int
    flop: float
    memory: Mapping[str, float]
    sent: float = 0.0
    copied: float = 0.0
    seconds: float = 0.0
    least_seconds: float = 0.0

    @property
    def bytes(self) -> float:
        """All that it takes on a rank's device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Section:
    """A table: its first column is words, the others are figures.

    Attributes:
        note: a sentence on how to read it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


_FIGURES: dict[str, Callable[[Stage], str]] = {
    "Passes": lambda stage: f"{stage.passes:,}" if stage.passes else "-",
    "Operations": lambda stage: operations(stage.flop),
    "Memory, GiB": lambda stage: gib(stage.bytes),
    "Sent, GiB": lambda stage: gib(stage.sent),
    "Copied, GiB": lambda stage: gib(stage.copied),
    "Time": lambda stage: duration(stage.seconds),
    "At least": lambda stage: duration(stage.least_seconds),
}


def stage_table(title: str, stages: Sequence[Stage], figures: Sequence[str], note: str) -> Section:
    """A table of stages.

    Args:
        figures: which of them, by the headings of their columns.
    """
    rows = [[stage.name, *(_FIGURES[name](stage) for name in figures)] for stage in stages]
    return Section(title, ("Stage", *figures), rows, note)


def operations(flop: float) -> str:
    """Floating-point operations, with a prefix that leaves one to three digits before the point."""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if flop < 1000:
            return f"{flop:,.1f} {prefix}FLOP"
        flop /= 1000
    return f"{flop:,.1f} ZFLOP"


def duration(seconds: float) -> str:
    """Two digits or three, in the unit that gives them."""
    for unit, size in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 or not seconds else f"{1000 * seconds:,.1f} ms"


def gib(size: float) -> str:
    """Bytes in GiB, without the unit."""
    if not size:
        return "-"
    return f"{size / GIB:,.2f}" if size >= 0.005 * GIB else "<0.01"
