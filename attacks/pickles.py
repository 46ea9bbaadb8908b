"""Code in a pickle: checkpoints, models, adapters and ground truth whose bytes run a command when they are unpickled.

What happens: torch files are read with `weights_only=True`, `.npz` without objects, and nothing else is unpickled at
all. The command is not run; the file is refused by name. Every file of a run directory is replaced by such a pickle,
too: those are refused, or were not needed.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import wherefrom as wf
from attacks.common import (
    Payload,
    Stop,
    check,
    command_refused,
    examples,
    linear_study,
    main,
    refused,
    save_language_model,
)
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.hf.text import load_model
from wherefrom.runtime.errors import WherefromError


def live(folder: Path) -> bool:
    torch.save({"0.weight": Payload(folder / "executed")}, folder / "weights.pt")
    torch.load(folder / "weights.pt", weights_only=False)
    return (folder / "executed").exists()


def attack(folder: Path) -> Iterator[Stop]:
    mark = folder / "executed"
    yield from _checkpoints(folder, mark)
    yield from _model(folder / "model", mark)
    yield _adapter(folder / "adapter", folder / "base", mark)
    np.savez(folder / "truth.npz", masks=np.array([Payload(mark)], dtype=object), losses=np.zeros((1, 1)))
    yield refused("ground truth, truth.npz", lambda: GroundTruth.load(folder / "truth.npz"), mark)
    yield _results(folder, mark)


def _checkpoints(folder: Path, mark: Path) -> Iterator[Stop]:
    study = linear_study(folder / "run-of-checkpoints")
    for name in ("weights.pt", "pytorch_model.bin", "adapter_model.bin", "model.safetensors"):
        checkpoint = folder / "checkpoints" / name.replace(".", "-")
        checkpoint.mkdir(parents=True)
        torch.save({"0.weight": Payload(mark)}, checkpoint / name)
        given = checkpoint / name if name == "weights.pt" else checkpoint
        yield refused(f"a checkpoint, {name}", partial(study.score, examples(2), wf.TracIn(checkpoints=[given])), mark)


def _model(model: Path, mark: Path) -> Iterator[Stop]:
    save_language_model(model)
    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(mark)}, model / "pytorch_model.bin")
    yield refused("a model, pytorch_model.bin", lambda: load_model(str(model)), mark)
    texts, run = model / "train.txt", model / "run"
    texts.write_text("a line\n\nanother")
    yield command_refused("the same: `wherefrom fit`", "fit", run, "--model", model, "--train", texts, mark=mark)


def _adapter(adapter: Path, base: Path, mark: Path) -> Stop:
    save_language_model(base)
    adapted = get_peft_model(load_model(str(base)), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.a.lora_A.weight": Payload(mark)}, adapter / "adapter_model.bin")
    return refused("an adapter, adapter_model.bin", lambda: wf.study_from_pretrained(adapter, ["a b c"]), mark)


def _results(folder: Path, mark: Path) -> Stop:
    run = folder / "run"
    study = linear_study(run)
    study.score(examples(2), wf.EKFAC())
    files = sorted(each for each in run.rglob("*") if each.suffix in (".json", ".safetensors"))
    refusals = 0
    for file in files:
        copy = shutil.copytree(run, folder / "copy")
        (copy / file.relative_to(run)).write_bytes(pickle.dumps(Payload(mark)))
        again = linear_study(copy)
        try:
            again.score(examples(2), wf.EKFAC())
        except WherefromError as error:
            check(str(copy) in str(error), f"{error} does not name the file")
            refusals += 1
        check(not mark.exists(), f"{file} was unpickled")
        shutil.rmtree(copy)
    return Stop(f"the {len(files)} files of a run", f"DamagedError, {refusals} times; the others were not needed")


if __name__ == "__main__":
    main(live, attack)
