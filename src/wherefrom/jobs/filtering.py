"""Training files with some of their examples alone, and where in a file an example is.

This module knows files and positions; it must not know scores, nor why an example is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from wherefrom.hf.preparation import Source
from wherefrom.jobs.sources import DataSource
from wherefrom.runtime.errors import InputError, check_argument

# What stands between two examples of a file, as it is read, and as it is written.
_BETWEEN = {".jsonl": (rb"\n", b"\n"), ".txt": (rb"\n(?:[^\S\n]*\n)+", b"\n\n")}


class _Part(NamedTuple):
    """The bytes of one example in a file, and the line that they begin on, from 1."""

    content: bytes
    line: int


def filtered(source: Source, name: str, chosen: Collection[int]) -> tuple[str, bytes]:
    """Some of a source's training examples, in their order there and in the format that they came in.

    Lines of .jsonl and texts of .txt stay as they are, byte by byte; what came otherwise is written as .jsonl.

    Args:
        source: the examples as they were read.
        name: the file, saved dataset or hub name that they were read from.
        chosen: positions in it.

    Returns:
        A name for the file, and what is in it.

    Raises:
        InputError: the file is not what was read any more, or its columns cannot be written.
    """
    parts, count = _parts(name), len(source.examples)
    called = re.sub(r"[^\w.-]+", "-", Path(name).stem) or "train"
    suffix = written_as(name)
    if len(parts) == count:
        written = (part.content for position, part in enumerate(parts) if position in chosen)
        return f"{called}-filtered{suffix}", b"".join(part + _BETWEEN[suffix][1] for part in written)
    if suffix == ".txt":
        raise InputError(f"{name} has {len(parts)} texts, and had {count} when it was read: read it again.")
    examples = (source.examples[position] for position in range(count) if position in chosen)
    try:
        lines = [json.dumps(dict(each), ensure_ascii=False, allow_nan=False) + "\n" for each in examples]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} has columns that JSON cannot hold ({error}): leave them out by hand.") from error
    return f"{called}-filtered.jsonl", "".join(lines).encode()


def written_as(*names: str) -> str:
    """The ending of what `filtered` makes of sources: .txt of such files, else .jsonl.

    Raises:
        InputError: some of several are texts and others are not.
    """
    files = [Path(name).expanduser() for name in names]
    endings = {".txt" if file.suffix == ".txt" and file.is_file() else ".jsonl" for file in files}
    if len(endings) > 1:
        raise InputError(f"{', '.join(names)}: texts and examples with columns, which are not put into one file.")
    return endings.pop()


def check_filtered(argument: str, file: Path, train: DataSource, overwrite: bool) -> None:
    """Refuse a file that some training examples cannot be written to, before it is known which.

    Raises:
        InputError: as `check_new`; or the file is one that they come from, or they are no parts of files.
    """
    if train.preparation.unit != "documents":
        raise InputError(f"{argument}={str(file)!r} of joined and cut text: its blocks are no part of a file.")
    check_new(argument, file, written_as(*train.names), overwrite)
    if file.resolve() in {Path(name).expanduser().resolve() for name in train.names}:
        raise InputError(f"{argument}={str(file)!r} is what the run was trained on: choose another name.")


def check_new(argument: str, file: Path, ending: str, overwrite: bool) -> None:
    """Refuse a file before there is anything to write.

    Raises:
        InputError: names the argument; the name ends otherwise or cannot be one, or something is there.
    """
    check_argument(file.suffix == ending, argument, str(file), f"a file that ends in {ending}")
    try:
        there = file.resolve().exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{argument}={str(file)!r} cannot be the name of a file ({error}).") from error
    if there and not (overwrite and file.is_file()):
        advice = "choose another name" if overwrite else "choose another name, or pass overwrite=True"
        raise InputError(f"{file} is there already: {advice}.")


def filtered_together(sources: Sequence[Source], names: Sequence[str], chosen: Collection[int]) -> bytes:
    """Some examples of all sources, as one file; positions are counted over all of them.

    Raises:
        InputError: as `filtered`; or some of several are texts and others are not.
    """
    written_as(*names)
    each = zip(sources, names, positions_of_each(sources, chosen), strict=True)
    return b"".join(filtered(*found)[1] for found in each)


def positions_of_each(sources: Sequence[Source], chosen: Collection[int]) -> list[set[int]]:
    """Positions in each source, counted from its own beginning; the sources follow one another."""
    found, start = [], 0
    for source in sources:
        stop = start + len(source.examples)
        found.append({each - start for each in chosen if start <= each < stop})
        start = stop
    return found


def origins(sources: Sequence[Source], names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Where each example comes from: what its source is called, and the line there, from 1, where that is known."""
    found: list[tuple[str, int | None]] = []
    for source, name in zip(sources, names, strict=True):
        parts, count = _parts(name), len(source.examples)
        lines = [part.line for part in parts] if len(parts) == count else [None] * count
        found += [(name, line) for line in lines]
    return found


def _parts(name: str) -> list[_Part]:
    """The examples of a .jsonl or .txt file as they stand there; none of what is something else."""
    file = Path(name).expanduser()
    if not (file.is_file() and file.suffix in _BETWEEN):
        return []
    found, line = [], 1
    content = file.read_bytes()
    start = 0
    for gap in [*re.finditer(_BETWEEN[file.suffix][0], content), None]:
        stop, following = (gap.start(), gap.end()) if gap else (len(content), len(content))
        part = content[start:stop]
        if part.strip():
            blank = len(part) - len(part.lstrip(b"\r\n"))
            found.append(_Part(part.strip(b"\r\n"), line + part[:blank].count(b"\n")))
        line += content[start:following].count(b"\n")
        start = following
    return found
