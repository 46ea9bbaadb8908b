"""Names of results in a run directory: LABEL-DIGEST8 unless one is given, and how a result is found by its label.

The label says the method and its settings, in words; the digest, of the whole fingerprint, keeps what was made from
other data, another model, seed or damping apart, side by side.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

from wherefrom.runtime.errors import InputError, WherefromError
from wherefrom.store.artifacts import read_manifest
from wherefrom.store.files import checked_name, is_plain
from wherefrom.store.fingerprint import BY_QUERIES, Fingerprint, differences

logger = logging.getLogger("wherefrom")

_DIGITS = 8
# Endings of what lies beside a result while it is made, and is then deleted.
_BESIDE = re.compile(r"\.(blocks|part|partial.*)$")
_LABELLED = re.compile(rf"(.+)-([0-9a-f]{{{_DIGITS}}})")


def check_result_name(name: str | None) -> None:
    """Refuse a name that a result cannot have; None is one that is made.

    Raises:
        InputError: it is no plain path component, or has the ending of something that is deleted.
    """
    if name is not None and _BESIDE.search(checked_name(name)):
        raise InputError(f"name={name!r}: expected another ending, this one is for parts of results.")


def result_name(label: str, fingerprint: Fingerprint, name: str | None = None) -> str:
    """The name that a result has in its folder: the one given, or LABEL-DIGEST8.

    Where two fingerprints share the digits, the second result is refused.
    """
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()
    return name or f"{label}-{digest[:_DIGITS]}"


def labelled(name: str) -> tuple[str, str]:
    """Label and digest of a name that nobody has given; a given one is its own label, without a digest."""
    found = _LABELLED.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def finished(folder: Path) -> list[Path]:
    """The finished results of a folder, by name; what has a name that no result is given is none of ours."""
    return sorted(file.parent for file in folder.glob("*/manifest.json") if is_plain(file.parent.name))


def found_result(path: Path) -> Path:
    """A result by FOLDER/NAME, FOLDER/LABEL or FOLDER/LABEL-DIG, the beginning of its digest; refuses if several match.

    The path is returned as it is where no result matches.
    """
    try:
        if path.exists():
            return path
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{path}: cannot be looked at ({error.strerror}). Check the name.") from error
    matching = [each for each in finished(path.parent) if _means(path.name, *labelled(each.name))]
    if len(matching) > 1:
        names = ", ".join(each.name for each in matching)
        raise InputError(f"{path}: {len(matching)} results are called so: {names}. Give one of these names.")
    return matching[0] if matching else path


def _means(name: str, label: str, digest: str) -> bool:
    """Whether somebody who says `name` may mean LABEL-DIGEST: only a whole label, since others begin alike."""
    return bool(digest) and (name == label or (name.startswith(f"{label}-") and f"{label}-{digest}".startswith(name)))


def known_fingerprint(folder: Path) -> Fingerprint | None:
    """What a finished result was made from; None where that cannot be read, which concerns whoever uses the result."""
    try:
        found: Fingerprint = read_manifest(folder)["fingerprint"]
    except WherefromError:
        return None
    return found


def log_others(path: Path, fingerprint: Fingerprint) -> None:
    """Say what stays beside a result that is about to be made, and what the latest of it was made from instead.

    Nothing is said where these are other queries alone, of which there may be many.

    Args:
        path: of a result, or of a folder of results of one fingerprint; nothing is said where it is there already.
    """
    label = labelled(path.name)[0]
    manifests = [
        file
        for folder in path.parent.glob(f"{label}-*")
        if labelled(folder.name)[0] == label
        for file in (folder / "manifest.json", *folder.glob("*/manifest.json"))
        if file.is_file()
    ]
    if path.exists() or not manifests:
        return
    latest = max(manifests, key=lambda file: file.stat().st_mtime_ns).parent
    stored = known_fingerprint(latest)
    found = [] if stored is None else differences(stored, fingerprint)
    if found and all(each.startswith(tuple(f"{name}: " for name in BY_QUERIES)) for each in found):
        return
    changed = f" Against {latest}: {'; '.join(found)}." if found else ""
    others = ", ".join(sorted({file.relative_to(path.parent).parts[0] for file in manifests}))
    logger.info(f"{path} is new; what is beside it stays: {others}.{changed}")
