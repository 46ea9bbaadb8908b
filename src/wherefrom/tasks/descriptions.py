"""Values, functions and classes as texts that are the same in every process, and of no other value.

A function is what it does: its code, the constants and defaults in it, and what it takes from around it. Its name alone
is that of another one too, of every lambda of the same scope, or of what stood there before an edit. Code of installed
libraries goes by its name.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError
from wherefrom.store.fingerprint import model_digest, tensors_digest

# Where code lies that goes by its name: installed libraries and this one.
_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_LIBRARIES = tuple(folder + os.sep for folder in {*_INSTALLED, str(Path(__file__).parents[1])})
# What a function takes from around it, of these types, cannot change without its name being bound anew.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def described(what: str, value: object) -> str:
    """A value as a text.

    Args:
        what: names the value in an error, such as "The task's attribute 'loss'".

    Raises:
        InputError: Python prints it with an address, so that nothing tells it from another.
    """
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if isinstance(value, list | tuple | set | frozenset):
        parts = [described(what, each) for each in value]
        return f"{type(value).__name__}({', '.join(sorted(parts) if isinstance(value, set | frozenset) else parts)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(what, each)}' for key, each in value.items())}}}"
    if isinstance(value, nn.Module):
        return f"{described_class(type(value))} {model_digest(value)}"
    found = described_class(value) if isinstance(value, type) else _described_function(what, value) or repr(value)
    if re.search(r" at 0x[0-9a-fA-F]+", found):
        raise InputError(
            f"{what} is {found[:80]}, and nothing tells it from another: results could be taken for those of another, "
            "or not be found again. Give its class a __repr__ that says what it holds, or, of a task's attribute on "
            "which results do not depend, begin its name with an underscore."
        )
    return found


def described_class(kind: type) -> str:
    """A class by its name, and by the code of its methods and of those it inherits, but for installed libraries'."""
    code = hashlib.sha256()
    for each in kind.__mro__:
        for name, member in sorted(vars(each).items()) if not _goes_by_name(each) else ():
            # Behind class methods, cached properties and properties.
            behind = (getattr(member, attribute, None) for attribute in ("__func__", "func", "fget", "fset"))
            for function in (member, *behind):
                if isinstance(function, FunctionType):
                    code.update(f"{name} {_described_code(function, frozenset())}".encode())
    named = f"{kind.__module__}.{kind.__qualname__}"
    return named if _goes_by_name(kind) else f"{named} {code.hexdigest()[:24]}"


def _described_tensor(value: Tensor) -> str:
    return f"Tensor {tensors_digest({'value': value})}"  # Python prints it rounded, and without its middle


def _described_function(what: str, value: object) -> str | None:
    """A function, method or partial call; None for anything else."""
    if isinstance(value, functools.partial):
        parts = ", ".join(described(what, each) for each in (value.func, value.args, value.keywords))
        return f"partial({parts})"
    if isinstance(value, MethodType):
        return f"{_described_function(what, value.__func__)} of {described(what, value.__self__)}"
    if isinstance(value, FunctionType):
        closed = [] if _goes_by_name(value) else [described(what, each) for each in _closure(value).values()]
        digest = hashlib.sha256(f"{_described_code(value, frozenset())} {closed}".encode()).hexdigest()
        return f"{value.__module__}.{value.__qualname__}{'' if _goes_by_name(value) else ' ' + digest[:24]}"
    name, owner = getattr(value, "__qualname__", ""), getattr(value, "__self__", None)
    if not callable(value) or not re.fullmatch(r"[\w.]+", name):
        return None
    if isinstance(owner, ModuleType | None):  # one that is built in
        return f"{getattr(value, '__module__', '')}.{name}"
    return f"{name} of {described(what, owner)}"


def _goes_by_name(value: type | FunctionType) -> bool:
    """Whether a class or function is built in, or of an installed library or of this one."""
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(_LIBRARIES)
    file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""  # nothing where it is typed in
    return value.__module__ in sys.builtin_module_names or file.startswith(_LIBRARIES)


def _described_code(function: FunctionType, seen: frozenset[CodeType]) -> str:
    """What a function does, as far as it can change without its name: code, defaults, and constants around it.

    Of other objects around it, only the kind counts, since what they hold may change from call to call.
    """
    if function.__code__ in seen:
        return "itself"
    seen = seen | {function.__code__}
    around = {**_closure(function), **_globals(function)}
    parts = [f"{name}={_around(value, seen)}" for name, value in sorted(around.items())]
    given = [*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())]
    parts += [_around(each, seen) for each in given]
    return f"{_code(function.__code__, function.__doc__)} {parts}"


def _code(code: CodeType, documentation: str | None) -> str:
    """Instructions, names and constants of a code object and of those within it; not where it stands."""
    constants = []
    for each in code.co_consts:
        if isinstance(each, CodeType):
            constants.append(_code(each, None))
        elif documentation is None or each != documentation:
            constants.append(str(sorted(map(repr, each))) if isinstance(each, frozenset) else repr(each))
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _closure(function: FunctionType) -> dict[str, object]:
    """What a function has taken along from the function around it; None for what is not bound yet."""
    found: dict[str, object] = dict.fromkeys(function.__code__.co_freevars)
    for name, cell in zip(found, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _globals(function: FunctionType) -> dict[str, object]:
    """What a function, and those within it, read of their module."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _around(value: object, seen: frozenset[CodeType]) -> str:
    """What stands around a function: constants by their value, functions by their code, and all else by its kind."""
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, tuple):
        return f"({', '.join(_around(each, seen) for each in value)})"
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if isinstance(value, FunctionType):
        named = f"{value.__module__}.{value.__qualname__}"
        return named if _goes_by_name(value) else f"{named} {_described_code(value, seen)}"
    if isinstance(value, ModuleType | type):
        return value.__name__
    return f"a {type(value).__qualname__}"
