"""A model that brings Python code: `auto_map` in its configurations names a module beside them.

What happens: the code is not imported, since `trust_remote_code` is off wherever a configuration, a model or a
tokenizer is loaded; the model is refused, and the error says how to run its code all the same. A run directory of
somebody else's cannot switch it on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import wherefrom as wf
from attacks.common import Stop, main, refused, save_language_model
from wherefrom.engine.execution import Execution
from wherefrom.hf.blueprint import model_without_weights
from wherefrom.hf.preparation import Preparation
from wherefrom.hf.text import load_config, load_model, load_tokenizer
from wherefrom.jobs.sources import SOURCES, DataSource, RunSources

TRUSTING = "import sys, transformers; transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"


def live(folder: Path) -> bool:
    model, mark = _malicious(folder)
    # In a process of its own, since transformers copies the code into its cache and imports it from there.
    subprocess.run(
        [sys.executable, "-c", TRUSTING, model],
        env={**os.environ, "HF_HOME": str(folder / "cache")},
        capture_output=True,
        check=False,
    )
    return mark.exists()


def attack(folder: Path) -> Iterator[Stop]:
    model, mark = _malicious(folder)
    for load in (load_config, load_model, load_tokenizer):
        yield refused(f"{load.__name__} of such a model", partial(load, str(model)), mark)
    yield refused("study_from_pretrained of it", lambda: wf.study_from_pretrained(model, ["a b"]), mark)
    yield refused("a run directory that trusts it", lambda: _run(folder, model).study(folder, "cpu", Execution()), mark)
    yield refused("a plan for it", lambda: model_without_weights(str(model), torch.float32), mark)


def _run(folder: Path, model: Path) -> RunSources:
    """What a run of such a model says, with an entry that no command writes."""
    train = DataSource(("train.txt",), "train", Preparation())
    RunSources(str(model), None, train, False, 0).save(folder)
    written = json.loads((folder / SOURCES).read_text())
    written["loading"]["trust_remote_code"] = True
    (folder / SOURCES).write_text(json.dumps(written))
    return RunSources.load(folder)


def _malicious(folder: Path) -> tuple[Path, Path]:
    """A model directory with code, and what is there once the code has run."""
    model, mark = folder / "model", folder / "executed"
    save_language_model(model)
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": own}))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    return model, mark


if __name__ == "__main__":
    main(live, attack)
