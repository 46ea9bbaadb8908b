"""What every command does around its work: our errors in one line, signals that end it in an orderly way; and the
types of arguments that several have.

Exit statuses: 0 done; 1 one of our errors; 2 a wrong argument (from tyro); 128 plus the number of a signal: 130 after
Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. This module must not know any command.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from wherefrom.runtime.errors import WherefromError

StrategyName = Literal["identity", "diagonal", "kfac", "ekfac", "shampoo"]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


# A value after `name=`: quoted, a list, or a word.
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[^\s,;:()'"]*[^\s,;:()'".]"""


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """An error of the library in the words of a command: `query_rank=4` is `--query-rank 4`, `overwrite=True` a flag.

    What stands in the parentheses of a call, such as a solver's own settings, stays as it is.

    Args:
        flags: what an argument of the library is called by the command, with underscores, by its name.
    """

    def flag(name: str) -> str:
        return "--" + flags[name].replace("_", "-")

    def translated(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if name not in flags:
            return found[0]
        if value in ("None", "False"):
            return f"no {flag(name)}"
        return flag(name) if value == "True" else f"{flag(name)} {value}"

    message = re.sub(rf"\w\([^()]*\)|(?<![\w.-])(?P<name>[a-z_][a-z_0-9]*)=(?P<value>{_VALUE})", translated, message)
    several = "|".join(name for name in flags if "_" in name) or "(?!)"
    message = re.sub(rf"(?<![\w/.'\"-])({several})(?![\w/'\"(=-]|\.\w)", lambda found: flag(found[1]), message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)


@contextmanager
def command_line(flags: Callable[[], Mapping[str, str]] = dict) -> Iterator[None]:
    """Run the work of a command; it leaves with the exit statuses of this module.

    Args:
        flags: gives those of the command, for `in_flags`; without, errors stay in the words of the library.
    """
    numbers = [signal.SIGTERM, signal.SIGHUP]
    # What is ignored stays so, as under nohup.
    before = {each: signal.signal(each, _leave) for each in numbers if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    except WherefromError as error:
        _say(f"[bold red]error:[/bold red] {escape(in_flags(str(error), flags()))}")
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
