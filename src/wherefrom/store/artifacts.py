"""The run directory: tensors in safetensors, metadata in JSON, nothing unpickled, nothing half-written.

A finished artifact is a directory with `manifest.json`, `tensors.safetensors` and, where matrices were computed block
by block, `matrices.safetensors`; it appears under its name by one rename, so presence means completion. The partial
sums of a sweep are one safetensors file whose header says where the sweep stood. A digest of tensors and header tells
what has changed since it was written, by accident: whoever can write the directory can also write a digest that fits.
This module knows names, bytes and fingerprints; it does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wherefrom.runtime.errors import DamagedError, MismatchError
from wherefrom.runtime.precision import type_name
from wherefrom.store.files import (
    checked_file,
    clear,
    damaged,
    flush,
    on_host,
    parsed_object,
    preallocated,
    read_json,
    remove,
    save_tensors,
    storing,
    unreadable,
    within,
    write_tensors,
    write_text,
    writing,
)
from wherefrom.store.fingerprint import Fingerprint, differences, tensors_digest

ARTIFACT_FORMAT = 4
_HEADER, _DIGEST = "wherefrom", "sha256"  # metadata of a safetensors file
_TENSORS, _MANIFEST = "tensors.safetensors", "manifest.json"
_MATRICES = "matrices.safetensors"
_TYPES = {torch.float32: "F32", torch.float64: "F64"}

Block = tuple[range, range]
"""Rows and columns of a matrix."""


@dataclass(frozen=True)
class Artifact:
    """One finished result on disk.

    Attributes:
        path: its directory.
        fingerprint: what it was computed from.
    """

    path: Path
    fingerprint: Fingerprint

    @property
    def part(self) -> Path:
        """Where it is written before it has its name."""
        return within(self.path.parent, f"{self.path.name}.part")

    def save(
        self, tensors: Mapping[str, Tensor], details: Mapping[str, object] | None = None, matrices: str = ""
    ) -> None:
        """Write the tensors under a temporary name, flush, then rename.

        Args:
            details: what the manifest says beside the fingerprint.
            matrices: the digest of matrices that are in `part` already; empty where there are none.

        Raises:
            StorageError: the directory cannot be written or the disk is full; nothing is left behind but matrices.
        """
        part, details = self.part, dict(details or {})
        finished = _MATRICES if matrices else ""
        with storing(part, tensors, finished):
            clear(part, finished)
            part.mkdir(parents=True, exist_ok=True)
            description, host = _description(self.path, self.fingerprint), on_host(tensors)
            description |= {"details": details, "matrices": matrices}
            metadata = _signed(host, description)
            save_tensors(part / _TENSORS, host, metadata)
            manifest = {**description, "sha256": metadata[_DIGEST]}
            write_text(part / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
            flush(part)
            remove(self.path)
            part.rename(self.path)
            flush(self.path.parent)

    def load(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Read the tensors and check them against their digest.

        Raises:
            DamagedError: the files are not what was written.
        """
        # Copies: the file may change or vanish later, and its tensors are not aligned as fresh ones are.
        return {name: tensor.to(device, copy=True) for name, tensor in self.mapped().items()}

    def mapped(self, fresh: bool = False) -> dict[str, Tensor]:
        """As `load`, with tensors that stay on disk and are read, memory-mapped, where they are touched.

        Args:
            fresh: this process has just written them, and knows their digest.
        """
        manifest = read_manifest(self.path)
        tensors, digest, header = _read_tensors(self.path / _TENSORS, fresh)
        if manifest != {**header, _DIGEST: digest}:
            raise damaged(self.path / _TENSORS, "it belongs to another manifest")
        if manifest["matrices"]:
            found = stored_matrices(self.path)
            blocks = _stored_blocks(self.path, manifest)
            if not fresh and _matrices_digest(_block_digests(found, blocks)) != manifest["matrices"]:
                raise damaged(self.path / _MATRICES, "its content has changed since it was written")
            tensors |= found
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


class Matrices:
    """Matrices of one size [..., rows, columns] that are written block by block into the file that they stay in.

    Args:
        folder: of the file.
        shapes: their sizes and types, by name.

    Raises:
        StorageError: there is not enough space for them.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._file, self._shapes = folder / _MATRICES, shapes
        header, offset = dict[str, object](), 0
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _TYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        described = json.dumps(header).encode()
        described += b" " * (-len(described) % 8)
        self._start = 8 + len(described)
        if not self.there(folder):
            preallocated(self._file, struct.pack("<Q", len(described)) + described, self._start + offset)

    @staticmethod
    def there(folder: Path) -> bool:
        """Whether a folder has such a file, begun or finished."""
        return within(folder.parent, folder.name, _MATRICES).exists()

    def write(self, block: Block, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Put a block [..., rows, columns] of every matrix where it belongs, on the disk itself.

        Returns:
            A digest of each.
        """
        (rows, columns), offset = block, self._start
        digests = {}
        with writing(self._file) as stream:
            for name, (shape, dtype) in self._shapes.items():
                values = tensors[name].detach().cpu().contiguous()
                for index, part in enumerate(values.reshape(-1, len(rows), len(columns))):
                    for row, numbers in zip(rows, part, strict=True):
                        stream.seek(offset + ((index * shape[-2] + row) * shape[-1] + columns.start) * dtype.itemsize)
                        stream.write(numbers.view(torch.uint8).numpy().data)
                digests[name] = tensors_digest({name: values})
                offset += math.prod(shape) * dtype.itemsize
        return digests


def stored_matrices(folder: Path) -> dict[str, Tensor]:
    """The matrices of a folder, memory-mapped, as they are now.

    Raises:
        DamagedError: there are none.
    """
    found = _opened(folder / _MATRICES)[0]
    if not all(each.dim() >= 2 for each in found.values()):
        raise damaged(folder / _MATRICES, "it does not hold matrices")
    return found


def _block_digests(matrices: Mapping[str, Tensor], blocks: Sequence[Block]) -> list[dict[str, str]]:
    """The digests of each block of stored matrices, as `Matrices.write` gives them."""

    def part(matrix: Tensor, block: Block) -> Tensor:
        rows, columns = block
        return matrix[..., rows.start : rows.stop, columns.start : columns.stop].contiguous()

    return [{name: tensors_digest({name: part(each, block)}) for name, each in matrices.items()} for block in blocks]


def _matrices_digest(digests: Sequence[Mapping[str, str]]) -> str:
    """Of the digests of all blocks, in order."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def block_details(digests: Mapping[Block, Mapping[str, str]]) -> tuple[dict[str, object], str]:
    """What `Artifact.save` needs of blocks that were written: details, and the digest of all."""
    ordered = sorted(digests, key=lambda block: (block[0].start, block[1].start))
    bounds = [[rows.start, rows.stop, columns.start, columns.stop] for rows, columns in ordered]
    return {"blocks": bounds}, _matrices_digest([digests[block] for block in ordered])


def block_digests(path: Path) -> dict[str, str]:
    """Those of the numbers that a finished block tells of.

    Raises:
        DamagedError: it tells of none.
    """
    found = read_manifest(path)["details"].get("digests")
    if not isinstance(found, dict):
        raise damaged(path / _MANIFEST, "it does not say which numbers its block has")
    return found


def check_blocks(folder: Path, digests: Mapping[Block, Mapping[str, str]]) -> None:
    """Look at all numbers of some blocks.

    Raises:
        DamagedError: they are not what was written.
    """
    if _block_digests(stored_matrices(folder), list(digests)) != list(digests.values()):
        raise damaged(folder / _MATRICES, "its content has changed since it was written")


def _stored_blocks(path: Path, manifest: Mapping[str, Any]) -> list[Block]:
    bounds = manifest["details"].get("blocks")
    try:
        return [(range(first, last), range(left, right)) for first, last, left, right in bounds]
    except (TypeError, ValueError) as error:
        raise damaged(path / _MANIFEST, "it does not say which blocks its matrices have") from error


@dataclass(frozen=True)
class Partial:
    """The sums of a sweep that is under way, so that a killed one continues where it was."""

    path: Path
    fingerprint: Fingerprint

    def save(self, sums: Mapping[str, Tensor], position: int, batch_size: int) -> None:
        """Replace the stored sums by `sums`, which cover the examples before `position`."""
        description = _description(self.path, self.fingerprint)
        header = {**description, "position": position, "batch_size": batch_size}
        host = on_host(sums)
        write_tensors(self.path, host, _signed(host, header))

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
            raise damaged(self.path, f"it stands at example {position!r} with batches of {batch_size!r}")
        check_same(self.path, header["fingerprint"], self.fingerprint)
        if _layout(tensors) != _layout(sums):
            raise damaged(self.path, "it does not hold the expected tensors")
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
    if not isinstance(manifest.get("sha256"), str) or not isinstance(manifest.get("matrices"), str):
        raise damaged(file, "it has no digest")
    if not isinstance(manifest.get("details"), dict):
        raise damaged(file, "it has no details")
    return manifest


def _description(path: Path, fingerprint: Fingerprint) -> dict[str, object]:
    """What is written beside tensors: they must not be taken for others of the same shapes."""
    return {"format": ARTIFACT_FORMAT, "name": path.name, "fingerprint": dict(fingerprint)}


def _check_described(path: Path, entries: Mapping[str, Any]) -> None:
    """Check what a manifest or header says of its own name and version."""
    if entries.get("format") != ARTIFACT_FORMAT:
        raise damaged(path, f"its format is {entries.get('format')!r}, and this version reads format {ARTIFACT_FORMAT}")
    if entries.get("name") != path.name:
        raise damaged(path, f"it was written as {entries.get('name')!r}. Give it that name again")
    fingerprint = entries.get("fingerprint")
    if not isinstance(fingerprint, dict) or not all(isinstance(each, str) for each in fingerprint.values()):
        raise damaged(path, "it does not say what it was made from")


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


def _signed(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> dict[str, str]:
    """The metadata of a safetensors file: a header, and the digest of it and the tensors."""
    described = json.dumps(header, sort_keys=True)
    return {_HEADER: described, _DIGEST: _digest(tensors, described)}


def _read_tensors(file: Path, fresh: bool = False) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The checked content of a file with `_signed` metadata: tensors, memory-mapped, the digest and the header."""
    tensors, metadata = _opened(file)
    described, digest = metadata.get(_HEADER, ""), metadata.get(_DIGEST, "")
    try:
        header = parsed_object(described)
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"it is not a safetensors file of this version ({error})") from error
    if header is None or (not fresh and _digest(tensors, described) != digest):
        raise damaged(file, "its content has changed since it was written")
    return tensors, digest, header


def _opened(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, memory-mapped, and its metadata."""
    within(file.parent.parent, file.parent.name)
    try:
        checked_file(file).open("rb").close()  # safe_open says "not found" where a permission is missing
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except PermissionError as error:
        raise unreadable(file, error) from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(file, f"it is not a safetensors file of this version ({error})") from error


def _digest(tensors: Mapping[str, Tensor], described: str) -> str:
    return hashlib.sha256(f"{tensors_digest(tensors)} {described}".encode()).hexdigest()


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


Layout = Mapping[str, tuple[torch.dtype | None, tuple[int | str, ...]]]
"""By name: the type, None for float32 or float64, and the shape; equal words in shapes stand for equal sizes."""


_FLOATS = (torch.float32, torch.float64)


def check_layout(path: Path, tensors: Mapping[str, Tensor], required: Layout, optional: Layout | None = None) -> None:
    """Refuse tensors that are not those of a result.

    Raises:
        DamagedError: one is missing, unknown, or of another type or shape; it is named.
    """
    known = {**required, **(optional or {})}
    sizes: dict[str, int] = {}
    for name in sorted({*required, *tensors}):
        if name not in tensors or name not in known:
            problem = "is missing" if name not in tensors else "is not expected"
            raise DamagedError(f"{path} cannot be used: {name!r} {problem}. Delete it, and compute it again.")
        tensor, (dtype, shape) = tensors[name], known[name]
        pairs = zip(shape, tensor.shape, strict=False)  # their number is compared below
        expected = [sizes.setdefault(size, found) if isinstance(size, str) else size for size, found in pairs]
        right_type = tensor.dtype in _FLOATS if dtype is None else tensor.dtype == dtype
        if not right_type or len(shape) != tensor.dim() or expected != list(tensor.shape):
            wanted = "float" if dtype is None else type_name(dtype)
            raise DamagedError(
                f"{path} cannot be used: {name!r} is {type_name(tensor.dtype)} {list(tensor.shape)}, "
                f"expected {wanted} [{', '.join(map(str, shape))}]. Delete it, and compute it again."
            )
