"""An adapter that has a module imported: `megatron_core` in its configuration, which peft before 0.20 imports by name.

Python looks for modules in the present directory, too: an adapter whose folder holds `stranger.py` runs it when the
folder is opened from within. What happens: the adapter is refused before peft reads it, alone and beside a model,
where transformers would load it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from peft import LoraConfig, get_peft_model

import wherefrom as wf
from attacks.common import Stop, main, refused, save_language_model
from wherefrom.hf.text import load_model

MODULE = "stranger_of_wherefrom"


def live(folder: Path) -> bool:
    with _within(_malicious(folder)):
        import_module(json.loads(Path("adapter_config.json").read_text())["megatron_core"])  # as peft 0.18 does
    return (folder / "executed").exists()


def attack(folder: Path) -> Iterator[Stop]:
    mark = folder / "executed"
    with _within(_malicious(folder)):
        yield refused("an adapter that names a module", lambda: wf.study_from_pretrained(".", ["a b c"]), mark)
        save_language_model(Path())
        yield refused("the same beside a model", lambda: load_model("."), mark)


def _malicious(folder: Path) -> Path:
    """An adapter's directory, and that of its model."""
    save_language_model(folder / "base")
    adapter = folder / "adapter"
    adapted = get_peft_model(
        load_model(str(folder / "base")), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    )
    adapted.save_pretrained(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_config": {"hidden_size": 1}, "megatron_core": MODULE}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / f"{MODULE}.py").write_text(f"import os\nos.mkdir({str(folder / 'executed')!r})\n")
    return adapter


@contextlib.contextmanager
def _within(adapter: Path) -> Iterator[None]:
    """In a directory, with Python as it is started there."""
    with contextlib.chdir(adapter):
        sys.path.insert(0, "")
        try:
            yield
        finally:
            sys.path.remove("")
            sys.modules.pop(MODULE, None)


if __name__ == "__main__":
    main(live, attack)
