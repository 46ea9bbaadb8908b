"""Finished retrainings: together as a ground truth, and one by one in a folder, where interrupted calls go on.

This module knows subsets, seeds and losses; it must not know how the losses came about.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.runtime.precision import type_name
from wherefrom.runtime.signals import held_signals
from wherefrom.store.artifacts import Artifact, Layout, check_layout, check_same, read_manifest
from wherefrom.store.fingerprint import Fingerprint
from wherefrom.version import VERSION

logger = logging.getLogger("wherefrom")

_MACHINE = "trained with"
_LAYOUT: Layout = {"mask": (torch.bool, ("train",)), "losses": (torch.float64, ("query",))}


@dataclass(frozen=True)
class GroundTruth:
    """What retraining on subsets of the training set did to each query's loss.

    Attributes:
        masks: [subsets, train] bool: true for the examples of each subset.
        losses: [subsets, repeats, queries] float64: each query's measured loss after retraining on the subset with
            each of `repeats` seeds; any unit, the same throughout.

    Raises:
        InputError: the shapes or types do not fit, or a loss is not finite.
    """

    masks: Tensor
    losses: Tensor

    def __post_init__(self) -> None:
        if self.masks.ndim != 2 or self.masks.dtype != torch.bool:
            raise InputError(
                f"masks: {_described(self.masks)}; expected bool [subsets, train], true where an example was kept."
            )
        if self.losses.ndim != 3 or self.losses.dtype != torch.float64 or 0 in self.losses.shape:
            raise InputError(
                f"losses: {_described(self.losses)}; expected float64 [subsets, repeats, queries], none of them empty."
            )
        if len(self.losses) != len(self.masks):
            raise InputError(
                f"losses: {len(self.losses)} subsets, but {len(self.masks)} in masks; give a retraining for each mask."
            )
        if not self.losses.isfinite().all():
            subset, repeat, query = (~self.losses.isfinite()).nonzero()[0].tolist()
            raise InputError(
                f"losses[{subset}, {repeat}, {query}] is {self.losses[subset, repeat, query].item()}; expected finite "
                "losses. Leave out the retrainings that diverged."
            )

    @classmethod
    def load(cls, file: str | Path) -> GroundTruth:
        """Read `masks` (bool [subsets, train]) and `losses` from a .npz or .safetensors file; nothing is unpickled.

        `losses` is [subsets, repeats, queries], or [subsets, queries] where there is only the mean over repeats. Of a
        folder that `retrain` writes, all finished retrainings; subsets that lack seeds of others are left out, and
        the log says how many.

        Raises:
            InputError: there is no such file, its ending is another, or its arrays are not those described.
            DamagedError: it cannot be read.
            MismatchError: a folder holds retrainings of different trainings or data.
        """
        file = Path(file)
        arrays = _finished(file) if file.is_dir() else _read(file)
        missing = {"masks", "losses"} - arrays.keys()
        if missing:
            raise InputError(
                f"{file}: no {' and no '.join(sorted(missing))}; it holds {', '.join(sorted(arrays)) or 'nothing'}. "
                "Expected masks [subsets, train] and losses [subsets, repeats, queries]."
            )
        losses = arrays["losses"].double()
        try:
            return cls(arrays["masks"], losses[:, None] if losses.ndim == 2 else losses)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error

    @property
    def outcomes(self) -> Tensor:
        """Minus the mean loss over repeats, [queries, subsets]: what the summed scores of the subset should predict."""
        return -self.losses.mean(1).T


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix not in {".npz", ".safetensors"}:
        raise InputError(f"{file}: ends in {file.suffix or 'nothing'!r}; expected a .npz or a .safetensors file.")
    if not file.exists():
        raise InputError(f"{file}: no such file. Check the path.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise DamagedError(f"{file} cannot be read: {error}. Get it again, or write it anew.") from error


def _finished(folder: Path) -> dict[str, Tensor]:
    """The masks and losses of a folder's finished retrainings, the subsets in the order of their names."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    fingerprint: Fingerprint = {}
    for path in sorted(each for each in folder.glob("*-*") if each.suffix != ".part"):
        mine = read_manifest(path)["fingerprint"]
        fingerprint = fingerprint or mine
        check_same(path, mine, fingerprint)
        tensors = Artifact(path, mine).load()
        check_layout(path, tensors, _LAYOUT)
        subset, _, seed = path.name.rpartition("-")
        found.setdefault(subset, {})[int(seed)] = tensors
    seeds = sorted({seed for each in found.values() for seed in each})
    whole = [each for each in found.values() if len(each) == len(seeds)]
    if not whole:
        raise InputError(f"{folder}: no finished retrainings there with all of the seeds {seeds}. Retrain first.")
    if len(whole) < len(found):
        logger.warning(f"{folder}: {len(found) - len(whole)} of {len(found)} subsets lack seeds, and are left out.")
    losses = [torch.stack([each[seed]["losses"] for seed in seeds]) for each in whole]
    return {"masks": torch.stack([each[seeds[0]]["mask"] for each in whole]), "losses": torch.stack(losses)}


def _described(tensor: Tensor) -> str:
    return f"{type_name(tensor.dtype)} {list(tensor.shape)}"


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


def store_retraining(folder: Path, fingerprint: Fingerprint, key: str, mask: Tensor, losses: Tensor) -> None:
    """Store a finished retraining: its subset, bool [train], and the measured losses, float64 [queries].

    Raises:
        StorageError: it cannot be written.
    """
    with held_signals():
        Artifact(folder / key, fingerprint).save({"mask": mask, "losses": losses})


def stored_losses(folder: Path, fingerprint: Fingerprint, adding: bool) -> dict[str, Tensor]:
    """The losses, float64 [queries], of all finished retrainings of a folder, by `retraining_key`.

    Args:
        adding: refuse to add to what was trained with another machine or version.

    Raises:
        MismatchError: what is stored was made from something else.
        DamagedError: a stored file is not what was written.
    """
    found = {}
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.suffix == ".part":  # a kill came while it was written
            continue
        artifact = Artifact(path, read_manifest(path)["fingerprint"])
        same_machine = {} if adding else {_MACHINE: fingerprint[_MACHINE]}
        check_same(path, {**artifact.fingerprint, **same_machine}, fingerprint)
        tensors = artifact.load()
        check_layout(path, tensors, _LAYOUT)
        found[path.name] = tensors["losses"]
    return found
