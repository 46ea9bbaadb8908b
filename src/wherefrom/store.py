"""The run directory: tensors in safetensors, metadata in JSON, nothing unpickled, nothing half-written.

A finished artifact is a directory with `tensors.safetensors` and `manifest.json`; it appears under its name by one
rename, so presence means completion. The partial sums of a sweep are one safetensors file whose header says where
the sweep stood. A digest of tensors and header tells what has changed since it was written, by accident: whoever can
write the directory can also write a digest that fits. This module knows names, bytes and fingerprints; it does not know
what the tensors mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.errors import DamagedError, InputError, MismatchError, StorageError
from wherefrom.fingerprint import Fingerprint, differences, tensors_digest

FORMAT = 2
_HEADER, _DIGEST = "wherefrom", "sha256"  # metadata of a safetensors file
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ADVICE = "Pass overwrite=True (--overwrite) to compute it again, or delete it."
# More than any of our JSON files has; what is longer is not read into memory.
_JSON_BYTES = 2**24


def checked_name(name: str) -> str:
    """A name that is one plain path component.

    Raises:
        InputError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"name={name!r}: expected at most 100 letters, digits, '.', '_' and '-', starting with a letter or digit."
        )
    return name


def within(root: Path, *names: str) -> Path:
    """A place inside a run directory, which itself may be a link to another disk.

    Raises:
        DamagedError: something on the way there is a link: what is written or deleted would lie elsewhere.
    """
    path = root
    for name in names:
        path = path / name
        if path.is_symlink():
            raise _damaged(path, "it is a symbolic link, and leads out of the run directory")
    return path


@dataclass(frozen=True)
class Artifact:
    """One finished result on disk.

    Attributes:
        path: its directory.
        fingerprint: what it was computed from.
    """

    path: Path
    fingerprint: Fingerprint

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors under a temporary name, flush, then rename.

        Raises:
            StorageError: the directory cannot be written or the disk is full; nothing is left behind.
        """
        part = self.path.with_name(self.path.name + ".part")
        with _storing(part, tensors):
            remove(part)
            part.mkdir(parents=True)
            description = _description(self.path, self.fingerprint)
            metadata = _signed(tensors, description)
            _write_tensors(part / _TENSORS, tensors, metadata)
            manifest = {**description, "sha256": metadata[_DIGEST]}
            write_text(part / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            remove(self.path)
            part.rename(self.path)
            _flush(self.path.parent)

    def load(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Read the tensors and check them against their digest.

        Raises:
            DamagedError: the files are not what was written.
        """
        # Copies: the file may change or vanish later, and its tensors are not aligned as fresh ones are.
        return {name: tensor.to(device, copy=True) for name, tensor in self.mapped().items()}

    def mapped(self) -> dict[str, Tensor]:
        """As `load`, with tensors that stay on disk and are read, memory-mapped, where they are touched."""
        tensors, digest, _ = _read_tensors(self.path / _TENSORS)
        if digest != read_manifest(self.path)["sha256"]:
            raise _damaged(self.path / _TENSORS, "it belongs to another manifest")
        return tensors

    def available(self) -> bool:
        """Whether a result with this fingerprint is there to be loaded.

        Raises:
            MismatchError: a result made from something else has this name.
            DamagedError: what has this name is no result.
        """
        if not within(self.path.parent, self.path.name).exists():
            return False
        check_same(self.path, read_manifest(self.path)["fingerprint"], self.fingerprint)
        return True


@dataclass(frozen=True)
class Partial:
    """The sums of a sweep that is under way, so that a killed one continues where it was."""

    path: Path
    fingerprint: Fingerprint

    def save(self, sums: Mapping[str, Tensor], position: int, batch_size: int) -> None:
        """Replace the stored sums by `sums`, which cover the examples before `position`."""
        description = _description(self.path, self.fingerprint)
        header = {**description, "position": position, "batch_size": batch_size}
        write_tensors(self.path, sums, _signed(sums, header))

    def load(self, sums: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Copy the stored sums into `sums`; (position, batch size), or None when nothing is stored.

        Raises:
            MismatchError: the stored sums belong to something else.
            DamagedError: the file cannot be read or does not fit `sums`.
        """
        if not within(self.path.parent, self.path.name).exists():
            return None
        tensors, _, header = _read_tensors(self.path)
        _check_described(self.path, header)
        position, batch_size = header.get("position"), header.get("batch_size")
        if not isinstance(position, int) or not isinstance(batch_size, int) or min(position, batch_size - 1) < 0:
            raise _damaged(self.path, f"it stands at example {position!r} with batches of {batch_size!r}")
        check_same(self.path, header["fingerprint"], self.fingerprint)
        if _layout(tensors) != _layout(sums):
            raise _damaged(self.path, "it does not hold the expected tensors")
        for name, tensor in tensors.items():
            sums[name].copy_(tensor)
        return position, batch_size


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        DamagedError: it is missing, is not JSON, or is of another format.
        StorageError: it cannot be read.
    """
    file = path / _MANIFEST
    manifest = read_json(file)
    _check_described(path, manifest)
    if not isinstance(manifest.get("sha256"), str):
        raise _damaged(file, "it has no digest")
    return manifest


def _description(path: Path, fingerprint: Fingerprint) -> dict[str, object]:
    """What is written beside tensors: they must not be taken for others of the same shapes."""
    return {"format": FORMAT, "name": path.name, "fingerprint": dict(fingerprint)}


def _check_described(path: Path, entries: Mapping[str, Any]) -> None:
    """Check what a manifest or header says of its own place and version."""
    if entries.get("format") != FORMAT:
        raise _damaged(path, f"its format is {entries.get('format')!r}, and this version reads format {FORMAT}")
    if entries.get("name") != path.name:
        raise _damaged(path, f"it was written as {entries.get('name')!r}. Give it that name again")
    fingerprint = entries.get("fingerprint")
    if not isinstance(fingerprint, dict) or not all(isinstance(each, str) for each in fingerprint.values()):
        raise _damaged(path, "it does not say what it was made from")


def read_json(file: Path, advice: str = _ADVICE) -> dict[str, Any]:
    """A JSON object from a file that somebody else may have written.

    Args:
        advice: what to do with one that is damaged.

    Raises:
        DamagedError: it is missing, too large, or anything but a JSON object.
        StorageError: there is no permission to read it.
    """
    try:
        size = _checked_file(file, advice).stat().st_size
        if size > _JSON_BYTES:
            raise _damaged(
                file, f"it has {size / 2**20:,.0f} MiB, where {_JSON_BYTES / 2**20:,.0f} are the most", advice
            )
        found = _parsed(file.read_bytes())
    except PermissionError as error:
        raise _unreadable(file, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"it is not readable JSON ({type(error).__name__})", advice) from error
    if found is None:
        raise _damaged(file, "it does not hold a JSON object", advice)
    return found


def _checked_file(file: Path, advice: str = _ADVICE) -> Path:
    """A file of bytes: opening a pipe would wait for ever, and a link leads elsewhere.

    Raises:
        DamagedError: it is something else.
    """
    if not within(file.parent, file.name).is_file():
        raise _damaged(file, "it is not a file" if file.exists() else "it is not there", advice)
    return file


def _parsed(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object; None where the text holds another value."""
    found = json.loads(text)
    return found if isinstance(found, dict) else None


def _unreadable(file: Path, error: OSError) -> StorageError:
    return StorageError(f"Cannot read {file}: {error.strerror}. Check its permissions; it was left as it is.")


def scratch_matrix(file: Path, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A new matrix that lies in a file, so that it takes no memory of its own.

    The file has no name, and goes with the matrix, however the process ends.

    Raises:
        StorageError: there is not enough space for it.
    """
    count = rows * columns
    size = count * dtype.itemsize
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove(file)
        with file.open("xb") as stream:
            # Writing into a mapped file that the disk has no room for would kill the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
        matrix = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(rows, columns)
        remove(file)
    except OSError as error:
        with contextlib.suppress(StorageError):
            remove(file)
        raise _cannot_write(file, size, str(error.strerror)) from error
    return matrix


def write_text(file: Path, text: str) -> None:
    """`write_bytes` for a text, in UTF-8."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, then rename.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
    """
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        with part.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise _cannot_write(file, len(content), str(error.strerror)) from error


def check_same(path: Path, stored: Fingerprint, current: Fingerprint) -> None:
    """Refuse a stored result that was made from something else.

    Raises:
        MismatchError: names every difference and the ways out.
    """
    changed = differences(stored, current)
    if changed:
        raise MismatchError(
            f"{path} was made from something else. " + "; ".join(changed) + ". "
            "Pass overwrite=True (--overwrite) to replace it, or give the new result another name or directory."
        )


@contextlib.contextmanager
def _storing(part: Path, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Check the space, and turn a failed write into an error that leaves no temporary file.

    Args:
        part: what is written before it gets its name, which is the same without the ending.

    Raises:
        StorageError: says how much was needed, and how much is free.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > _free_space(part):
        raise _cannot_write(part.with_suffix(""), needed, "not enough space")
    try:
        yield
    except (OSError, SafetensorError, StorageError) as error:  # the last from a manifest
        with contextlib.suppress(StorageError):
            remove(part)
        raise _cannot_write(part.with_suffix(""), needed, str(error)) from error


def _cannot_write(file: Path, needed: int, reason: str) -> StorageError:
    return StorageError(
        f"Cannot write {file} ({needed / 2**20:,.2f} MiB needed, {_free_space(file) / 2**20:,.2f} MiB free): {reason}. "
        "Free some space, check quota and permissions, or choose another run directory; what is finished is safe."
    )


def _free_space(file: Path) -> int:
    """Bytes that can be written where a file is to lie; its directory need not be there yet."""
    return shutil.disk_usage(next(parent for parent in file.absolute().parents if parent.exists())).free


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk, then rename.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
    """
    # safetensors itself begins with a file of a random name, which a kill leaves there: in a directory to be deleted.
    part = file.with_name(file.name + ".part")
    with _storing(part, tensors):
        remove(part)
        part.mkdir(parents=True)
        _write_tensors(part / _TENSORS, tensors, metadata)
        (part / _TENSORS).replace(file)
        part.rmdir()


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file({name: _on_host(tensor) for name, tensor in tensors.items()}, file, dict(metadata))
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets nobody else read it
    _flush(file)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _signed(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> dict[str, str]:
    """The metadata of a safetensors file: a header, and the digest of it and the tensors."""
    described = json.dumps(header, sort_keys=True)
    return {_HEADER: described, _DIGEST: _digest(tensors, described)}


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The checked content of a file with `_signed` metadata: tensors, memory-mapped, the digest and the header."""
    within(file.parent.parent, file.parent.name)
    try:
        _checked_file(file).open("rb").close()  # safe_open says "not found" where a permission is missing
        with safe_open(file, framework="pt") as opened:
            described, digest = (opened.metadata()[name] for name in (_HEADER, _DIGEST))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = _parsed(described)
    except PermissionError as error:
        raise _unreadable(file, error) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, f"it is not a safetensors file of this version ({error})") from error
    if header is None or _digest(tensors, described) != digest:
        raise _damaged(file, "its content has changed since it was written")
    return tensors, digest, header


def _digest(tensors: Mapping[str, Tensor], described: str) -> str:
    return hashlib.sha256(f"{tensors_digest(tensors)} {described}".encode()).hexdigest()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _damaged(file: Path, reason: str, advice: str = _ADVICE) -> DamagedError:
    return DamagedError(f"{file} cannot be used: {reason}. {advice}")


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; a link is deleted, never followed.

    Raises:
        StorageError: it cannot be deleted.
    """
    aside = path.with_name(f"{path.name}.removed.part")
    try:
        if aside.exists():  # left by a kill
            shutil.rmtree(aside)
        if path.is_dir() and not path.is_symlink():
            path.rename(aside)  # or a kill would leave half of a result under its name
            shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"Cannot delete {path}: {error.strerror}. Check permissions, or choose another run directory."
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
