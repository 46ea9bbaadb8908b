"""What a stage is told and how it reports: part by part, each written at once, none keeping another from its turn.

Of the standard library alone, so that the process that starts the stages outlives whatever is broken in them. It
must not know what a stage measures.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Lines of a traceback, or of a stage's output, that are kept.
TAIL = 25

Figures = Mapping[str, object]


class UnavailableError(Exception):
    """A part that cannot be measured here, which is no failure: its message says why."""


@dataclass(frozen=True)
class Setting:
    """How the stages run.

    Attributes:
        device: as torch names it.
        rehearse: sizes so small that everything runs on a CPU.
        scratch: a directory for run directories, in memory where there is room.
        half: whether products of bfloat16 operands with float32 sums are right; without them, TF32.
        compiled: whether activation functions are compiled.
        less_memory: GiB that are left free beyond what is left anyway.
    """

    device: str = "cuda"
    rehearse: bool = False
    scratch: str = ""
    half: bool = True
    compiled: bool = True
    less_memory: float = 0.0


def write_json(file: Path, content: object) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


class Report:
    """What a stage has measured, by the names of its parts.

    Args:
        file: where it is written after every part; what it holds already is not measured again unless it failed.

    Attributes:
        parts: of each, its `seconds` and either `figures`, or `error` with the end of a traceback, or `unavailable`.
    """

    def __init__(self, file: Path, stage: str) -> None:
        self._file, self._stage = file, stage
        stored = json.loads(file.read_text()) if file.exists() else {}
        self.parts: dict[str, dict[str, object]] = stored["parts"] if stored.get("stage") == stage else {}

    def measure(self, name: str, function: Callable[[], Figures]) -> None:
        """Run a function and keep its figures, or the end of its traceback; a figure `passed` may be false."""
        if name in self.parts and not failed(self.parts[name]):
            return
        start, found = time.perf_counter(), dict[str, object]()
        try:
            found["figures"] = dict(function())
        except UnavailableError as reason:
            found["unavailable"] = str(reason)
        except Exception:
            found["error"] = tail(traceback.format_exc())
        found["seconds"] = time.perf_counter() - start
        self.parts[name] = found
        write_json(self._file, {"stage": self._stage, "parts": self.parts})
        print(f"{self._stage}, {name}: {json.dumps(found)}", flush=True)
        _release_memory()


def failed(part: Mapping[str, object]) -> bool:
    """Whether a part has raised an error or has not passed its own check."""
    figures = part.get("figures")
    return "error" in part or (isinstance(figures, Mapping) and figures.get("passed") is False)


def tail(text: str) -> str:
    """The last lines of a text."""
    return "\n".join(text.rstrip().splitlines()[-TAIL:])


def _release_memory() -> None:
    """Give back what a part has left on the GPU, so that the next finds it free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
