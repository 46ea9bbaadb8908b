"""What every command does around its work: our errors in one line, signals that end it in an orderly way; and the
types of arguments that several have.

Exit statuses: 0 done; 1 one of our errors; 2 a wrong argument (from tyro); 128 plus the number of a signal: 130 after
Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. This module must not know any command.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from wherefrom.errors import WherefromError

StrategyName = Literal["identity", "diagonal", "kfac", "ekfac", "shampoo"]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@contextmanager
def command_line() -> Iterator[None]:
    """Run the work of a command; it leaves with the exit statuses of this module."""
    numbers = [signal.SIGTERM, signal.SIGHUP]
    # What is ignored stays so, as under nohup.
    before = {each: signal.signal(each, _leave) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    except WherefromError as error:
        _say(f"[bold red]error:[/bold red] {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("Interrupted. The same command (without --overwrite) goes on from what is saved.")
        sys.exit(128 + signal.SIGINT)
    except _Signalled as stop:
        _say(f"Ended by {stop.number.name}. The same command (without --overwrite) goes on from what is saved.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Signalled(SystemExit):
    def __init__(self, number: signal.Signals) -> None:
        super().__init__(128 + number)
        self.number = number


def _leave(number: int, frame: FrameType | None) -> None:
    raise _Signalled(signal.Signals(number))


def _say(line: str) -> None:
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)
