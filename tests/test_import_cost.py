"""What imports bring with them: nothing that takes long and that most calls do not need."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from wherefrom.cli.main import COMMANDS, function
from wherefrom.version import VERSION

HEAVY = (
    "transformers",
    "datasets",
    "scipy",
    "matplotlib",
    "tyro",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
)
COMMAND = "import sys; sys.argv[0] = 'wherefrom'; from wherefrom.cli.main import main; main()"


def run(program: str, *arguments: str) -> tuple[str, set[str]]:
    """What a fresh process prints, and the modules that it has imported at its end."""
    told = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); " + program
    found = subprocess.run([sys.executable, "-c", told, *arguments], capture_output=True, text=True, check=True)
    return found.stdout, set(found.stderr.split())


def test_importing_the_library_imports_nothing_heavy() -> None:
    assert "torch" not in run("import wherefrom")[1]
    public = run("import wherefrom; wherefrom.evaluate, wherefrom.Study")[1]
    assert "wherefrom.study" in public
    assert not public.intersection(HEAVY)


@functools.cache
def help_text() -> tuple[str, set[str]]:
    return run(COMMAND, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_is_the_first_lines_of_their_docstrings(command: str) -> None:
    text = " ".join(help_text()[0].replace("│", " ").split())
    sentence = (function(command).__doc__ or "").partition("\n")[0]
    assert sentence.endswith(".")
    assert f"• {command} {sentence}" in text


def test_help_and_version_need_no_torch() -> None:
    for printed, modules in (help_text(), run(COMMAND, "--version")):
        assert printed.startswith(("usage: wherefrom", f"wherefrom {VERSION}\n"))
        assert not modules & {"torch", "numpy", *HEAVY} - {"tyro"}


def test_a_shell_completes_the_arguments_of_every_command() -> None:
    script, _ = run(COMMAND, "--tyro-print-completion", "bash")
    for flag in ("--queries", "--empirical", "--rerank", "--shard-model", "--output"):
        assert flag in script
