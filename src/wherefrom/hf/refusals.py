"""What the files of a model or an adapter may not ask for: code from elsewhere, which other libraries would run.

This module knows configurations; it does not know what is loaded with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wherefrom.runtime.errors import InputError
from wherefrom.store.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ADAPTER = "adapter_config.json"


def refuse_kernels(name: str, config: PreTrainedConfig) -> None:
    """Refuse a configuration that names attention code on the hub, which transformers fetches and runs with `kernels`.

    Args:
        name: of the model, for the message.

    Raises:
        InputError: says which code.
    """
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str) and "/" in attention:
        raise InputError(
            f"{name}: its configuration names attention code on the hub ({attention}), which is not run. If you trust "
            "it, load the model yourself and give it to wherefrom.Study; otherwise delete attn_implementation there."
        )
    for part in config.sub_configs:
        of_part = getattr(config, part, None)
        if of_part is not None:
            refuse_kernels(name, of_part)


def refuse_imports(folder: Path) -> None:
    """Refuse an adapter whose configuration names a Python module, which peft before 0.20 imports, whatever it is.

    Args:
        folder: of a model or an adapter; one without an adapter's configuration is fine.

    Raises:
        InputError: says which module.
        DamagedError: the configuration cannot be read.
    """
    file = folder / ADAPTER
    if not file.is_file():
        return
    found = read_json(file.resolve(), "Save the adapter again.")  # the hub's cache is made of links
    if found.get("megatron_config"):
        raise InputError(
            f"{file}: names a Python module to import (megatron_core={found.get('megatron_core')!r}), which is not "
            "done. If you trust it, load the model with its adapter yourself and give it to wherefrom.Study."
        )
