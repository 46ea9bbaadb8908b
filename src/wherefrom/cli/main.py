"""The command: finds the function of a subcommand, runs it, and makes one line and an exit status of its errors.

A subcommand's module is imported when it is its turn, since most of them need torch, which takes seconds to import;
until then, all that is known of it is what its source says.
"""

from __future__ import annotations

import ast
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import tyro

from wherefrom.cli.shared import command_line
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.progress import show_log
from wherefrom.version import VERSION

# Subcommands, and the module below this folder that has the function of that name.
COMMANDS = {
    "fit": "scoring",
    "score": "scoring",
    "self-influence": "scoring",
    "top": "showing",
    "report": "showing",
    "export": "showing",
    "card": "jobs.card",
    "index": "index",
    "query": "index",
    "ask": "jobs.asking",
    "serve": "jobs.asking",
    "audit": "jobs.auditing",
    "select": "jobs.selecting",
    "plan": "plan",
}
# Those that take a method, a subcommand of theirs.
_BY_METHOD = ("fit", "score", "self-influence", "index", "query", "ask", "audit", "select")


def main() -> None:
    """Run the command; exit statuses are those of `shared`."""
    show_log()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts and names that the terminal has no letters for
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries that load models and data
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first == "--version":
        print(f"wherefrom {VERSION}")
        return
    app, chosen = tyro.extras.SubcommandApp(), first.replace("_", "-")
    for name in COMMANDS:
        # What tyro writes for a shell to complete has the arguments of all.
        loaded = name == chosen or first.startswith("--tyro-")
        app.command(name=name)(function(name) if loaded else _described(name))
    arguments = sys.argv[1:]
    if chosen in _BY_METHOD:
        from wherefrom.cli.methods import with_method  # noqa: PLC0415  (needs torch)

        arguments = with_method(arguments)
    with command_line(lambda: _flags(chosen)):
        _refuse_repeated(chosen, arguments)
        app.cli(
            args=arguments,
            prog="wherefrom",
            description=f"wherefrom {VERSION}: which training examples made the model say that?",
            # A method's flags and the command's may be said in any order.
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs),
        )


def function(name: str) -> Callable[..., None]:
    """The function of a subcommand."""
    found: Callable[..., None] = getattr(import_module(f"wherefrom.cli.{COMMANDS[name]}"), name.replace("-", "_"))
    return found


def _refuse_repeated(command: str, arguments: Sequence[str]) -> None:
    """Refuse a flag of several values that is given again: the parser would drop the first ones in silence.

    Of a flag of one value the last counts, as people and scripts expect who add one to what is there.

    Raises:
        InputError: names it.
    """
    hints = get_type_hints(function(command)) if command in COMMANDS else {}
    given = Counter(each.partition("=")[0].replace("_", "-") for each in arguments)
    for name, kind in hints.items():
        flag = "--" + name.replace("_", "-")
        if get_origin(kind) is tuple and given[flag] > 1:
            raise InputError(
                f"{flag} is given {given[flag]} times: expected once, with all that belongs to it after it."
            )


def _described(name: str) -> Callable[[], None]:
    """What stands for a subcommand that is not called: a function with the first sentence of its docstring."""
    source = Path(__file__).parent.joinpath(*COMMANDS[name].split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    functions = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)}

    def described() -> None: ...

    described.__doc__ = (ast.get_docstring(functions[name.replace("-", "_")]) or "").partition("\n")[0]
    return described


# What the library calls an argument where a command has another word for it.
_OTHER_WORDS = {
    "fit": {"source": "train", "block_size": "max_length"},
    "score": {"source": "queries", "k": "top_only", "top": "tokens"},
    "query": {"source": "queries"},
}


def _flags(command: str) -> dict[str, str]:
    """The flags of all commands by the library's names for them, in the words of one command."""
    names: dict[str, str] = {}
    for each in COMMANDS:
        for name, kind in get_type_hints(function(each)).items():
            kinds = [part for part in (kind, *get_args(kind)) if is_dataclass(part)]
            flags = [field.name for part in kinds for field in fields(part)] if kinds else [name]
            names |= dict(zip(flags, flags, strict=True))
    for name in ("run", "return"):
        names.pop(name, None)
    return {**names, **_OTHER_WORDS.get(command, {})}
