"""Finished retrainings on disk, a folder for each, so that an interrupted call goes on and a longer one adds to them.

This module knows subsets, seeds and losses; it must not know how the losses came about.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wherefrom.runtime.signals import held_signals
from wherefrom.store.artifacts import Artifact, Layout, check_layout, check_same, read_manifest
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.store.names import finished
from wherefrom.version import VERSION

_MACHINE = "trained with"
_LAYOUT: Layout = {
    "mask": (torch.bool, ("train",)),
    "losses": (torch.float64, ("query",)),
    "seconds": (torch.float64, ()),
}


@dataclass(frozen=True)
class Finished:
    """A finished retraining: its subset, bool [train], the measured losses, float64 [queries], and the time it took."""

    mask: Tensor
    losses: Tensor
    seconds: Tensor


def retraining_key(mask: Tensor, seed: int) -> str:
    """A name for a retraining, which says what it is whatever else is trained: mask is bool [train] on the CPU."""
    return f"{hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:24]}-{seed}"


def retraining_fingerprint(fingerprint: Fingerprint, examples: int) -> dict[str, str]:
    """What results depend on: what the caller says, the number of examples, and what decides the rounding."""
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        device = ", ".join(sorted(names))
    else:
        device = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    machine = f"wherefrom {VERSION}, torch {torch.__version__}, {device}, 1 CPU thread"
    return {**fingerprint, "training examples": str(examples), _MACHINE: machine}


def store_retraining(folder: Path, fingerprint: Fingerprint, key: str, retraining: Finished) -> None:
    """Store a finished retraining.

    Raises:
        StorageError: it cannot be written.
    """
    with held_signals():
        Artifact(folder / key, fingerprint).save(vars(retraining))


def stored_retrainings(folder: Path, fingerprint: Fingerprint, adding: bool) -> dict[str, Finished]:
    """All finished retrainings of a folder, by `retraining_key`.

    Args:
        adding: refuse to add to what was trained with another machine or version.

    Raises:
        MismatchError: what is stored was made from something else.
        DamagedError: a stored file is not what was written.
    """
    found = {}
    for path in (each for each in finished(folder) if each.suffix != ".part"):
        artifact = Artifact(path, read_manifest(path)["fingerprint"])
        same_machine = {} if adding else {_MACHINE: fingerprint[_MACHINE]}
        check_same(path, {**artifact.fingerprint, **same_machine}, fingerprint)
        tensors = artifact.load()
        check_layout(path, tensors, _LAYOUT)
        found[path.name] = Finished(**tensors)
    return found
