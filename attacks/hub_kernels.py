"""A configuration that names code on the hub: `"_attn_implementation": "stranger/kernel"`.

Where the package `kernels` is installed, transformers fetches such code and runs it, and not every version that is
allowed here asks whom it trusts. What happens: the model is refused before transformers sees the name, also where it
stands in a part of the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlavaConfig

import wherefrom as wf
from attacks.common import Stop, main, refused, save_language_model
from wherefrom.hf.blueprint import model_without_weights
from wherefrom.hf.text import load_config, load_model

KERNEL = "stranger/kernel"


def live(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(_model(folder / "model"))
    except Exception as error:  # of the missing package, or of the hub that is not reached
        return "kernel" in str(error)
    return False


def attack(folder: Path) -> Iterator[Stop]:
    model = _model(folder / "model")
    yield refused("load_model of such a model", lambda: load_model(str(model)))
    yield refused("study_from_pretrained of it", lambda: wf.study_from_pretrained(model, ["a b"]))
    yield refused("a plan for it", lambda: model_without_weights(str(model), torch.float32))
    LlavaConfig().save_pretrained(folder / "parts")
    _name_kernel(folder / "parts", {"text_config": KERNEL})
    yield refused("a kernel of one part of a model", lambda: load_config(str(folder / "parts")))


def _model(model: Path) -> Path:
    save_language_model(model)
    _name_kernel(model, KERNEL)
    return model


def _name_kernel(model: Path, kernel: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_attn_implementation": kernel}))


if __name__ == "__main__":
    main(live, attack)
