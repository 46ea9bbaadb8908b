"""Weights of checkpoints: read from files of others, put into a model, and taken out again.

This module knows files and state dicts; it does not know what a checkpoint is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wherefrom.runtime.errors import DamagedError, InputError, first_line, require
from wherefrom.runtime.placement import is_sharded_tensor, read_tensor
from wherefrom.store.files import checked_name, read_json
from wherefrom.store.fingerprint import model_digest

# What a checkpoint directory may hold, the first that is there; an index names the shards.
_WEIGHT_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a checkpoint's weights into a model, in the model's own types.

    Args:
        path: a directory that `save_pretrained` or a Trainer wrote (of a whole model, or of the model's adapter), or a
            single file of weights (safetensors or torch).

    Raises:
        InputError: there are no weights, or they are not those of this model.
        DamagedError: a file cannot be read.
    """
    path = Path(path)
    file = _weight_file(path)
    if file is None:
        raise InputError(
            f"{path}: no weights there; expected a file, or a directory with one of {', '.join(_WEIGHT_FILES)}."
        )
    state = _read_state(file)
    if file.name.startswith("adapter_model"):
        _load_adapter(model, state, path)
        return
    own = model.state_dict()
    addresses = {tensor.data_ptr() for name, tensor in own.items() if name in state}
    # A tied weight is stored once, under one of its names.
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in addresses]
    _check_names(path, missing, [name for name in state if name not in own])
    _check_shapes(path, own, state)
    model.load_state_dict(state, strict=False)


def _weight_file(path: Path) -> Path | None:
    return path if path.is_file() else next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)


def _read_state(file: Path) -> dict[str, Tensor]:
    return _read_shards(file) if file.name.endswith(".index.json") else read_weights(file)


def _load_adapter(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    if not hasattr(model, "peft_config"):
        raise InputError(f"{path}: holds an adapter, and the study's model has none; make it with peft first.")
    peft = require("peft", "lora")
    own = peft.get_peft_model_state_dict(model)
    _check_names(path, [name for name in own if name not in state], [name for name in state if name not in own])
    _check_shapes(path, own, state)
    peft.set_peft_model_state_dict(model, dict(state))


def _check_names(path: Path, missing: Sequence[str], unknown: Sequence[str]) -> None:
    if missing or unknown:
        raise InputError(
            f"{path}: not a checkpoint of this model. It lacks {len(missing)} of the model's tensors "
            f"({', '.join(missing[:3])}) and has {len(unknown)} that the model lacks ({', '.join(unknown[:3])})."
        )


def _check_shapes(path: Path, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise InputError(
                f"{path}: not a checkpoint of this model: {name} has the shape {list(tensor.shape)} there and "
                f"{list(own[name].shape)} in the model."
            )


class ModelStates:
    """The weights that a model can have: its own, and those of checkpoints, which are entered and left.

    Args:
        model: holds its own again after each, also after an error.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entered: list[Path | None] = [None]
        self._own: dict[str, Tensor] = {}
        self._digests: dict[Path | None, str] = {}

    @contextmanager
    def entered(self, checkpoint: Path | None) -> Iterator[None]:
        """Within it, the model has a checkpoint's weights; with None, its own.

        Raises:
            InputError: there are no weights, or they are not those of this model.
            DamagedError: a file cannot be read.
        """
        if not self._own and checkpoint is not None:
            state = self._model.state_dict().items()
            self._own = {name: each.detach().to("cpu", copy=True) for name, each in state if isinstance(each, Tensor)}
        before = self._entered[-1]
        self._entered.append(checkpoint)
        try:
            self._load(checkpoint, before)
            yield
        finally:
            self._entered.pop()
            self._load(before, checkpoint)

    def _load(self, wanted: Path | None, present: Path | None) -> None:
        if wanted == present:
            return
        if wanted is None:
            self._model.load_state_dict(self._own, strict=False)
        else:
            load_weights(self._model, wanted)

    def differing(self, checkpoint: Path) -> str | None:
        """The first tensor of a checkpoint that the model itself has otherwise.

        None where all are the same, and where that cannot be told: without weights there, or within another's.
        """
        file = _weight_file(checkpoint)
        if file is None or self._entered[-1] is not None:
            return None
        adapter = file.name.startswith("adapter_model") and hasattr(self._model, "peft_config")
        own = require("peft", "lora").get_peft_model_state_dict(self._model) if adapter else self._model.state_dict()
        for name, tensor in sorted(_read_state(file).items()):
            if name not in own or own[name].shape != tensor.shape:
                return name
            mine = read_tensor(self._model, name, own[name])
            mine = mine.full_tensor() if is_sharded_tensor(mine) else mine
            if not torch.equal(mine.cpu(), tensor.to(mine.dtype)):
                return name
        return None

    def digest(self, checkpoint: Path | None) -> str:
        """What tells a model with these weights from others."""
        if checkpoint not in self._digests:
            with self.entered(checkpoint):
                self._digests[checkpoint] = model_digest(self._model)
        return self._digests[checkpoint]


def _read_shards(index: Path) -> dict[str, Tensor]:
    table = read_json(index, "Save the checkpoint again.").get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise DamagedError(f"{index} is not an index of weights: it has no weight_map of parameters to files.")
    shards = sorted({checked_name(shard) for shard in table.values()})
    return {name: tensor for shard in shards for name, tensor in read_weights(index.parent / shard).items()}


def read_weights(file: Path) -> dict[str, Tensor]:
    """One file; a torch file may hold nothing but tensors, and nothing of it is executed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise DamagedError(f"{file} cannot be read as weights ({first_line(error)}).") from error
    except Exception as error:  # torch wraps pickle's errors in types of several modules
        raise InputError(f"{file}: not a plain state dict of tensors ({first_line(error)}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{file}: expected a state dict of tensors, found {found}. Save model.state_dict() alone.")
    return state
