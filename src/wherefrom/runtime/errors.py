"""Everything that wherefrom raises on purpose: one family, so that a caller can catch it whole.

A message names the argument or file, the value found, what was expected and the next step.
"""

from importlib import import_module
from typing import Any

# A terminal obeys control characters; these stand for them instead. Unicode has pictures of the first 33 only.
CONTROL_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: pictures for control characters but tabs and line ends."""
    return text.translate(CONTROL_PICTURES)


class WherefromError(Exception):
    """The base of every error that wherefrom raises on purpose."""

    def __str__(self) -> str:
        # Messages quote names and values from files of strangers.
        return printable(super().__str__())


class InputError(WherefromError, ValueError):
    """An argument, a dataset or a task cannot be used as it is."""


class LayerError(WherefromError):
    """A layer cannot be tracked, or was not seen in a pass."""


class LossError(WherefromError):
    """A loss, an activation, a gradient or a curvature is not finite, or not what it has to be; the layer is named."""


class MismatchError(WherefromError):
    """A stored result belongs to another model, dataset, task or set of options."""


class DamagedError(WherefromError):
    """A stored file is truncated, altered or not what its manifest says."""


class StorageError(WherefromError):
    """A file cannot be written or read: no space, no permission."""


class MemoryLimitError(WherefromError):
    """The work does not fit into memory even at the smallest batch."""


class TrainingError(WherefromError):
    """A training function failed, or a process that ran it died."""


class RankError(WherefromError):
    """Another process of a run on several has stopped, or has another model or other data."""


def check_argument(fine: bool, name: str, value: object, expected: str) -> None:
    """Raise an `InputError` unless an argument is fine; it names the argument, its value and what was expected."""
    if not fine:
        raise InputError(f"{name}={value!r}: expected {expected}.")


def first_line(error: BaseException) -> str:
    """What another library says, without the pages that may follow."""
    return str(error).strip().partition("\n")[0]


def require(module: str, extra: str = "text") -> Any:
    """Import a library of one of our extras."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{module} is needed here and not installed: pip install 'wherefrom[{extra}]'.") from error
