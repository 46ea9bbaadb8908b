"""The run directory: tensors in safetensors, metadata in JSON, nothing unpickled, nothing half-written.

A finished artifact is a directory with `tensors.safetensors` and `manifest.json`; it appears under its name by one
rename, so presence means completion. The partial sums of a sweep are one safetensors file whose header says where
the sweep stood. This module knows names, bytes and fingerprints; it does not know what the tensors mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wherefrom.errors import DamagedError, InputError, MismatchError, StorageError
from wherefrom.fingerprint import Fingerprint, differences, tensors_digest

FORMAT = 1
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def checked_name(name: str) -> str:
    """A name that is one plain path component."""
    if not _NAME.fullmatch(name):
        raise InputError(f"name={name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit.")
    return name


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
            digest = _write_tensors(part / _TENSORS, tensors, {})
            manifest = {"format": FORMAT, "fingerprint": dict(self.fingerprint), "sha256": digest}
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
        tensors, header = _read_tensors(self.path / _TENSORS)
        if header["sha256"] != read_manifest(self.path)["sha256"]:
            raise _damaged(self.path / _TENSORS, "it belongs to another manifest")
        return tensors

    def available(self, overwrite: bool = False) -> bool:
        """Whether a result with this fingerprint is there to be loaded.

        Raises:
            MismatchError: a result made from something else has this name, and `overwrite` is false.
        """
        if overwrite:
            remove(self.path)
        if not self.path.exists():
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
        part = self.path.with_name(self.path.name + ".part")
        header = {
            "position": position,
            "batch_size": batch_size,
            "fingerprint": dict(self.fingerprint),
        }
        with _storing(part, sums):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_tensors(part, sums, header)
            part.replace(self.path)

    def load(self, sums: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """Copy the stored sums into `sums`; (position, batch size), or None when nothing is stored.

        Raises:
            MismatchError: the stored sums belong to something else.
            DamagedError: the file cannot be read or does not fit `sums`.
        """
        if not self.path.exists():
            return None
        tensors, header = _read_tensors(self.path)
        check_same(self.path, header["fingerprint"], self.fingerprint)
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in sums.items()}:
            raise _damaged(self.path, "it does not hold the expected tensors")
        for name, tensor in tensors.items():
            sums[name].copy_(tensor)
        return header["position"], header["batch_size"]

    def discard(self) -> None:
        """Forget the stored sums."""
        self.path.unlink(missing_ok=True)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished artifact.

    Raises:
        DamagedError: it is missing, is not JSON, or is of another format.
    """
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if manifest["format"] != FORMAT:
            raise _damaged(file, f"format {manifest['format']} instead of {FORMAT}, from another version")
        if not isinstance(manifest["fingerprint"], dict) or not isinstance(manifest["sha256"], str):
            raise _damaged(file, "it does not have the expected entries")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"it is not a readable manifest ({type(error).__name__})") from error
    return cast(dict[str, Any], manifest)


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
        with file.open("wb") as stream:
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
        with part.open("wb") as stream:
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
    """Check the space, and turn a failed write into an error that leaves no temporary file."""
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


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> str:
    """Write and flush a safetensors file; its header holds `header` and the digest, which is returned."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = tensors_digest(host)
    save_file(host, file, metadata={"wherefrom": json.dumps({**header, "sha256": digest})})
    _flush(file)
    return digest


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The checked content of a safetensors file, memory-mapped, and what `_write_tensors` put into its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["wherefrom"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"it is not a readable safetensors file ({error})") from error
    if tensors_digest(tensors) != header.get("sha256"):
        raise _damaged(file, "its content has changed since it was written")
    return tensors, header


def _damaged(file: Path, reason: str) -> DamagedError:
    return DamagedError(
        f"{file} cannot be used: {reason}. Pass overwrite=True (--overwrite) to compute it again, or delete it."
    )


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there; a link is deleted, never followed.

    Raises:
        StorageError: it cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
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
