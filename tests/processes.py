"""Processes that begin with everything imported, which takes each new interpreter some seconds of processor time.

They are forks of one server, which has imported what they need and done nothing else. This module knows how processes
are started and what is left of them; it must not know what they do.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# Modules that take seconds to import, and those that import most of the others.
_IMPORTED = (
    *("torch._dynamo", "torch._decomp.decompositions_for_jvp"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.tokenization_auto", "datasets"),
    *("wherefrom.cli.main", "wherefrom.cli.index", "wherefrom.cli.scoring", "wherefrom.cli.showing"),
    *("tests.reliability.kill_worker", "tests.rank_worker", "tests.contract.worker"),
)


def forking_context() -> ForkServerContext:
    """The context of processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


@dataclass
class Running:
    """A process that was started, and where its output goes."""

    process: ForkServerProcess
    output: tempfile.TemporaryDirectory[str]

    def finished(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Wait for its end; `returncode`, `stdout` and `stderr` are as those of `subprocess`.

        Raises:
            TimeoutError: it has not ended after so many seconds; it is killed.
        """
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        said = [self.said(name) for name in ("stdout", "stderr")]
        self.output.cleanup()
        if code is None:
            raise TimeoutError(f"A process has not ended after {timeout} seconds. It said: {said}")
        return subprocess.CompletedProcess([], code, *said)

    def said(self, name: str) -> str:
        """What it has written so far on its "stdout" or "stderr"."""
        return (Path(self.output.name) / name).read_text()


def start(
    work: Callable[..., object],
    *arguments: object,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Running:
    """Call a function of a module in a process of its own.

    Args:
        folder: the process's working directory; None is this process's.
        variables: of the environment, beside those of this process.
    """
    output = tempfile.TemporaryDirectory()
    for name in ("stdout", "stderr"):
        (Path(output.name) / name).touch()
    environment = {**os.environ, **(variables or {})}
    # Pickled here: multiprocessing would share the memory of tensors, and a process change those of another.
    given = (work, pickle.dumps(arguments), str(folder or Path.cwd()), environment, output.name)
    process = forking_context().Process(target=_work, args=given)
    process.start()
    return Running(process, output)


def start_ranks(
    work: Callable[..., object],
    *arguments: object,
    count: int,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> list[Running]:
    """Start processes as torchrun does, without its supervision; see `start`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared.update(variables or {})
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(work, *arguments, folder=folder, variables=each) for each in ranks]


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Do what the command `wherefrom ARGUMENTS` does in a directory."""
    return start(wherefrom_command, arguments, folder=folder).finished()


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Do what `python SCRIPT ARGUMENTS` does."""
    return start(_script, script, arguments).finished(timeout=600)


def detach_resource_tracker() -> None:
    """Give this process a tracker of its own, which mourns a killed process's semaphores where nobody sees it."""
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]


def _work(
    work: Callable[..., object],
    arguments: bytes,
    folder: str,
    environment: dict[str, str],
    output: str,
) -> None:
    detach_resource_tracker()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with (Path(output) / name).open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    work(*pickle.loads(arguments))


def wherefrom_command(arguments: tuple[str, ...]) -> None:
    """Do what `wherefrom ARGUMENTS` does, in this process."""
    from wherefrom.cli.main import main

    sys.argv = ["wherefrom", *arguments]
    main()


def command_in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that does the same and gives what was printed on either stream, with a blank for a break of a line."""
    from wherefrom.cli.main import main

    monkeypatch.setenv("COLUMNS", "1000")  # for tables; the log may have been opened before, for a narrower terminal

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
        main()
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return run


def _script(script: Path, arguments: tuple[str, ...]) -> None:
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
