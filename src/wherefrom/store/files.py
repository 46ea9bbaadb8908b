"""Files of a run directory: written whole or not at all, read with care, and never through a link.

Whoever made a file may have been killed, have had a full disk, or be a stranger.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.runtime.errors import DamagedError, StorageError, check_argument

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What to do with a file that is damaged, or in a directory that cannot be used.
_ADVICE = "Pass overwrite=True (--overwrite) to compute it again, or delete it."
_ELSEWHERE = "Check permissions, or choose another run directory."
# More than any of our manifests, lists and plots has; what is longer is not read into memory.
_MOST_BYTES = 2**24
# What safetensors needs to write a file, with some to spare.
_SAVING_BYTES = 2**22


def is_plain(name: str) -> bool:
    """Whether a name is one path component of letters that mean nothing to a shell, a terminal or a pattern."""
    return _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """A name that is one plain path component; refuses others."""
    expected = "at most 100 letters, digits, '.', '_' and '-', starting with a letter or digit"
    check_argument(is_plain(name), "name", name, expected)
    return name


def within(root: Path, *names: str) -> Path:
    """A path inside a run directory, which itself may be a link to another disk.

    A link on the way there is refused: what is written or deleted would lie elsewhere.
    """
    path = root
    for name in names:
        path = path / name
        with _trying(f"use {path}"):
            link = path.is_symlink()
        if link:
            raise damaged(path, "it is a symbolic link, and leads out of the run directory")
    return path


@contextlib.contextmanager
def _trying(what: str) -> Iterator[None]:
    """Say in our words that the system refuses what is done with a file or directory."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"Cannot {what}: {error.strerror}. {_ELSEWHERE}") from error


def read_json(file: Path, advice: str = _ADVICE) -> dict[str, Any]:
    """A JSON object from a file that somebody else may have written.

    Args:
        advice: what to do with one that is damaged.

    Raises:
        DamagedError: it is missing, too large, or anything but a JSON object.
        StorageError: there is no permission to read it.
    """
    try:
        found = parsed_object(read_bytes(file, advice))
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"it is not readable JSON ({type(error).__name__})", advice) from error
    if found is None:
        raise damaged(file, "it does not hold a JSON object", advice)
    return found


def read_bytes(file: Path, advice: str = _ADVICE) -> bytes:
    """The content of one of our small files, with the errors of `read_json`."""
    try:
        size = checked_file(file, advice).stat().st_size
        if size > _MOST_BYTES:
            raise damaged(file, f"it has {size:,} bytes, where {_MOST_BYTES:,} are the most", advice)
        return file.read_bytes()
    except PermissionError as error:
        raise unreadable(file, error) from error
    except OSError as error:
        raise damaged(file, f"it is not readable ({error.strerror})", advice) from error


def checked_file(file: Path, advice: str = _ADVICE) -> Path:
    """A file, if it is one of bytes: opening a pipe would wait for ever, and a link leads elsewhere."""
    if not within(file.parent, file.name).is_file():
        raise damaged(file, "it is not a file" if file.exists() else "it is not there", advice)
    return file


def parsed_object(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object; None where the text holds another value."""
    found = json.loads(text)
    return found if isinstance(found, dict) else None


def unreadable(file: Path, error: OSError) -> StorageError:
    """The error for a file that may not be read."""
    return StorageError(f"Cannot read {file}: {error.strerror}. Check its permissions; it was left as it is.")


def preallocated(file: Path, start: bytes, size: int) -> None:
    """Make a file of a size, with what it starts with; the rest is written later, in any order.

    Raises:
        StorageError: there is not enough space for it.
    """
    part = _part(file)  # without a start, a file of this name would be none of ours
    try:
        with _storing(part, size):
            with _opened(part) as stream:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size)
                else:
                    stream.truncate(size)
                stream.write(start)
            part.chmod(file.parent.stat().st_mode & 0o666)
            part.replace(file)
    except StorageError:
        with contextlib.suppress(OSError):
            file.parent.rmdir()  # where nothing else is in it
        raise


@contextlib.contextmanager
def writing(file: Path) -> Iterator[BinaryIO]:
    """Open a file that is there to write into; in the end all of it is on the disk.

    Raises:
        StorageError: it cannot be written.
    """
    with _trying(f"write {file}"), file.open("r+b") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """`write_bytes` for a text, in UTF-8."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename; a `StorageError` leaves nothing behind."""
    part = _part(file)
    with _storing(part, len(content)):
        if file.exists() and not file.is_file():
            raise OSError(errno.EEXIST, "it is no file but a directory or a device")
        with _opened(part) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)


def _part(file: Path) -> Path:
    """What is written before it gets its name."""
    return file.with_name(f"{file.name}.part")


def _opened(part: Path) -> BinaryIO:
    """A new file to write into."""
    part.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    return part.open("xb")


def storing(part: Path, tensors: Mapping[str, Tensor], finished: str = "") -> contextlib.AbstractContextManager[None]:
    """Check the space, and turn a failed write into an error that leaves no temporary file.

    Args:
        part: what is written before it gets its name, which is the same without the ending.
        finished: what was in it before, and stays.

    Raises:
        StorageError: says how much was needed, and how much is free.
    """
    return _storing(part, sum(tensor.nbytes for tensor in tensors.values()), finished)


@contextlib.contextmanager
def _storing(part: Path, needed: int, finished: str = "") -> Iterator[None]:
    try:
        if needed > free_space(part):
            raise OSError(errno.ENOSPC, "not enough space")
        yield
    except (OSError, SafetensorError, StorageError) as error:  # the last from a manifest
        with contextlib.suppress(StorageError, OSError):
            clear(part, finished)
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"Cannot write {part.with_suffix('')} ({needed / 2**20:,.2f} MiB needed, {free_space(part) / 2**20:,.2f} "
            f"MiB free): {reason}. Free some space, check quota and permissions, or choose another run directory; "
            "what is finished is safe."
        ) from error


def clear(part: Path, finished: str = "") -> None:
    """Delete what was being written, but for one file of it that is finished."""
    for path in part.iterdir() if finished else (part,):
        if path.name != finished:
            remove(path)


def free_space(path: Path) -> int:
    """Bytes that can be written where a file or directory is to lie, which need not be there yet."""
    return shutil.disk_usage(next(each for each in (path.absolute(), *path.absolute().parents) if is_there(each))).free


def is_there(path: Path) -> bool:
    """Whether something is there; of a name that is too long, for instance, the system does not say so."""
    try:
        return path.exists()
    except OSError:
        return False


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The same as `write_bytes` for a safetensors file."""
    # safetensors itself begins with a file of a random name, which a kill leaves there: in a directory to be deleted.
    part = _part(file)
    with storing(part, tensors):
        remove(part)
        part.mkdir(parents=True)
        save_tensors(part / file.name, tensors, metadata)
        (part / file.name).replace(file)
        part.rmdir()


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write and flush a safetensors file under its name, in a directory that is deleted as a whole after a kill."""
    bytearray(_SAVING_BYTES)  # where this raises MemoryError, safetensors would end the process
    save_file(on_host(tensors), file, dict(metadata))
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    flush(file)


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are stored; those that lie so already are not copied."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def damaged(file: Path, reason: str, advice: str = _ADVICE) -> DamagedError:
    """The error for a file that is not what it should be."""
    return DamagedError(f"{file} cannot be used: {reason}. {advice}")


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; a link is deleted, never followed."""
    aside = path.with_name(f"{path.name}.removed.part")
    with _trying(f"delete {path}"):
        if aside.exists():  # left by a kill
            shutil.rmtree(aside)
        if path.is_dir() and not path.is_symlink():
            path.rename(aside)  # or a kill would leave half of a result under its name
            shutil.rmtree(aside)
        elif path.exists() or path.is_symlink():  # a read-only file system refuses to delete even what is not there
            path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Give a file or directory another path."""
    with _trying(f"move {path} to {target}"):
        path.rename(target)


def flush(path: Path) -> None:
    """Have a file or directory on the disk rather than in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
