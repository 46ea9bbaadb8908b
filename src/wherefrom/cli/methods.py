"""The library's dataclasses as arguments: their fields are flags, with the words of their docstrings; methods are
subcommands.

What a shell cannot say, such as tensors or a training, is left out. This module knows dataclasses, not what they do.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

import docstring_parser
import tyro

from wherefrom.curvature.solvers.astra import Astra
from wherefrom.curvature.solvers.conjugate_gradients import ConjugateGradients
from wherefrom.curvature.solvers.gradient_flow import GradientFlow
from wherefrom.curvature.solvers.solver import Solver
from wherefrom.engine.execution import Execution
from wherefrom.hf.preparation import Preparation
from wherefrom.methods import METHODS
from wherefrom.methods.factored import Factored
from wherefrom.methods.method import Method
from wherefrom.runtime.errors import InputError

FACTORED = {name: kind for name, kind in METHODS.items() if issubclass(kind, Factored)}
# A training cannot be said in a shell.
ALL = {name: kind for name, kind in METHODS.items() if "training" not in kind.__dataclass_fields__}

SOLVERS = {each.label: each for each in (ConjugateGradients, GradientFlow, Astra)}

# Fields that are other objects, and the words for these; and fields of methods that a shell cannot say, or need not:
# what the command makes of texts has their column.
_WORDS: dict[str, Mapping[str, Callable[..., object]]] = {
    "solver": SOLVERS,
    "scored": FACTORED,
    "then": FACTORED,
    "first": {name: kind for name, kind in ALL.items() if name != "two-stage"},
}
_SOLVER, _EXAMPLE = "solver", "cg,iterations=8,examples=100,block-size=32"  # which is said with its settings
_UNSPEAKABLE = ("conditioning", "factors", "training", "checkpoints", "column")
# What the run's factors were fitted with stands for these, where they are not given.
_OF_THE_FIT = ("empirical", "seed")


@dataclass(frozen=True)
class Chosen:
    """A method, or another dataclass of the library, as it was said on the command line; subclasses have its flags.

    Not the dataclass itself, whose errors tyro would report in words of its own.

    Attributes:
        kind: the class.
    """

    kind: ClassVar[type[Any]]

    def made(self, fitted: Mapping[str, object] | None = None) -> Any:
        """What was said.

        Args:
            fitted: what the run's factors were fitted with.

        Raises:
            InputError: a field is impossible.
        """
        said: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        if issubclass(self.kind, Factored) or "empirical" in said:
            said |= {name: each for name, each in (fitted or {}).items() if said.get(name) is None}
        said |= {name: _meant(name, each, fitted or {}) for name, each in said.items() if name in _WORDS and each}
        # None says nothing, but where it is not what stands for nothing said.
        silent = {each.name for each in fields(self) if each.default is None}
        return self.kind(**{name: each for name, each in said.items() if each is not None or name not in silent})


def _meant(name: str, word: str, fitted: Mapping[str, object]) -> object:
    """The object that a word stands for; a method with factors takes those of the run."""
    if name == _SOLVER:
        return _solver(word)
    kind = _WORDS[name][word]
    return kind(**fitted) if word in FACTORED else kind()


def _solver(said: str) -> Solver:
    """The solver that `cg` or `cg,iterations=8,block-size=32` stands for; settings are read as flags are.

    Raises:
        InputError: there is no such solver, or a setting is impossible.
    """
    name, *settings = said.split(",")
    if name not in SOLVERS:
        raise InputError(f"solver={said!r}: expected {' or '.join(SOLVERS)}, or one with settings, such as {_EXAMPLE}.")
    arguments = [part for each in settings for part in f"--{each.strip()}".split("=", 1)]
    made: Solver = tyro.cli(flags(SOLVERS[name]), prog=f"--solver {name}", args=arguments).made()
    return made


def with_method(arguments: Sequence[str]) -> list[str]:
    """What was said on the command line, with the first method where none is named, so that its flags are known.

    Args:
        arguments: the subcommand and what follows it.
    """
    command, *rest = arguments
    named = any(each in ALL or each in ("-h", "--help") for each in rest)
    return [command, *([] if named else [next(iter(ALL))]), *rest]


def subcommands(kinds: Mapping[str, type[Method]], only: Collection[str] = (), of_the_fit: bool = False) -> Any:
    """The type of an argument that is one of these methods, of which tyro makes subcommands.

    Args:
        only: the fields that are flags; all that a shell can say unless given.
        of_the_fit: whether what the run was fitted with stands for flags that are not given.
    """
    chosen = [
        Annotated[
            flags(kind, only, of_the_fit),
            tyro.conf.subcommand(name=name, prefix_name=False, description=_summary(kind)),
        ]
        for name, kind in kinds.items()
    ]
    return Union[tuple(chosen)]  # noqa: UP007  (known when it runs)


def default(kinds: Any) -> Any:
    """The first of `subcommands`, with no flag given."""
    return typing.get_args(typing.get_args(kinds)[0])[0]()


def flags(kind: type[Any], only: Collection[str] = (), of_the_fit: bool = False) -> Any:
    """The type of an argument that is this dataclass; as for `subcommands`."""
    inherits = of_the_fit and "empirical" in kind.__dataclass_fields__
    hints = typing.get_type_hints(kind, localns={"Checkpoint": str})  # which only type checkers import
    words, found = _documented(kind), []
    for each in fields(kind):
        if (each.name in _UNSPEAKABLE and issubclass(kind, Method)) or (only and each.name not in only):
            continue
        hint, start = hints[each.name], each.default
        help_text = words.get(each.name, "")
        if each.name == _SOLVER:
            hint, start = str | None, None
            help_text += f" One of {', '.join(SOLVERS)}, with settings after commas: {_EXAMPLE}; cg,help lists them."
        elif each.name in _WORDS:
            hint = Literal[tuple(_WORDS[each.name])] | None
            start = None if each.default is None else each.default_factory().name  # type: ignore[operator]
        elif inherits and each.name in _OF_THE_FIT:
            hint, start = hint | None, None
        elif start is MISSING:
            start = None
        flag = Annotated[hint, tyro.conf.arg(help=help_text[:1].upper() + help_text[1:])]  # type: ignore[valid-type]
        found.append((each.name, flag, field(default=start)))
    made = make_dataclass(kind.__name__, found, bases=(Chosen,), namespace={"kind": kind}, frozen=True, kw_only=True)
    made.__doc__ = _summary(kind)
    return made


def _summary(kind: type[Any]) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0]


def _documented(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a method and its bases say of each field."""
    return {
        name.strip(): " ".join((each.description or "").split())
        for base in reversed(kind.__mro__)
        if is_dataclass(base)
        for each in docstring_parser.parse(base.__doc__ or "").params
        for name in each.arg_name.split(",")
    }


# What several commands take: how to compute, and how queries are read.
EXECUTED: Any = flags(Execution)
READ: Any = flags(Preparation, only=("format", "column", "count"))
