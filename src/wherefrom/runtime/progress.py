"""What a user sees of a long stage: a progress bar (done of total, time taken, time remaining), and the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from wherefrom.runtime.errors import printable

Watch = Callable[[str, int, int], None]
"""Is told the name of a stage, how much of it is done, and how much there is."""

_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within it, a function is told of every stage's progress; what it raises ends the work."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


@contextmanager
def progress_bar(name: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar on the standard error; yields a function that is told how much is done by now.

    Args:
        shown: None shows the bar when the standard error is a terminal.
    """
    console = Console(stderr=True)
    if shown is None:
        shown = console.is_terminal
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # The remaining time follows the speed of the last hour: with rich's half a minute, a stage whose steps take longer
    # would show none.
    with Progress(*columns, console=console, disable=not shown, speed_estimate_period=3600) as progress:
        line, watch = progress.add_task(name, total=total), _WATCH.get()

        def show(done: int) -> None:
            progress.update(line, completed=done)
            if watch is not None:
                watch(name, done, total)

        yield show


class _Printable(logging.Formatter):
    """Messages quote names and values from files of strangers."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def show_log() -> None:
    """Print what the library logs on the standard error; for commands, a library's user decides that.

    Of several processes on one study, the first speaks for all; from the others come warnings.
    """
    logger = logging.getLogger("wherefrom")
    if logger.handlers:
        return
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_level=False, show_path=False)
    handler.setFormatter(_Printable("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
