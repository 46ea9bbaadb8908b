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

# The entries that are added to the caller's fingerprint.
_MACHINE, _EXAMPLES = "trained with", "training examples"
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


class FinishedRetrainings:
    """All finished retrainings of a folder.

    Args:
        folder: holds one folder for each.
        fingerprint: what the retrainings are made from.
        examples: how many training examples there are.

    Attributes:
        found: by `retraining_key`.

    Raises:
        MismatchError: what is stored was made from something else.
        DamagedError: a stored file is not what was written.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, examples: int) -> None:
        self._folder = folder
        self._fingerprint = {**fingerprint, _EXAMPLES: str(examples), _MACHINE: _machine()}
        self._artifacts = [
            Artifact(each, read_manifest(each)["fingerprint"]) for each in finished(folder) if each.suffix != ".part"
        ]
        self.found = {each.path.name: self._load(each) for each in self._artifacts}

    def check_machine(self) -> None:
        """Refuse to add to what was trained with another machine or version.

        Raises:
            MismatchError: names both.
        """
        for each in self._artifacts:
            check_same(each.path, each.fingerprint, self._fingerprint)

    def add(self, key: str, retraining: Finished) -> None:
        """Store a finished retraining.

        Raises:
            StorageError: it cannot be written.
        """
        with held_signals():
            Artifact(self._folder / key, self._fingerprint).save(vars(retraining))
        self.found[key] = retraining

    def _load(self, artifact: Artifact) -> Finished:
        check_same(artifact.path, {**artifact.fingerprint, _MACHINE: self._fingerprint[_MACHINE]}, self._fingerprint)
        tensors = artifact.load()
        check_layout(artifact.path, tensors, _LAYOUT)
        return Finished(**tensors)


def _machine() -> str:
    """What decides how results are rounded."""
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
        device = ", ".join(sorted(names))
    else:
        device = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"wherefrom {VERSION}, torch {torch.__version__}, {device}, 1 CPU thread"
