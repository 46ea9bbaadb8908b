"""Tensor files whose header lies: sizes that are not there, tensors that overlap, a header without end.

What happens: safetensors checks the header against the file before anything is mapped, and the file is refused by name;
in a run directory the digest would not fit either.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import wherefrom as wf
from attacks.common import Stop, examples, linear_model, linear_study, main, refused
from wherefrom.scoring.results import Scores


def live(folder: Path) -> bool:
    """A reader that believes the header: it gets the bytes of another tensor, and room for what is not there."""
    file = folder / "weights.safetensors"
    save_file({"first": torch.zeros(2), "second": torch.ones(2)}, file)
    overlapping = _believed(_lying(file, "overlap"))
    far = _believed(_lying(file, "far"))
    return overlapping["first"] == overlapping["second"] and far["first"] == b""


def attack(folder: Path) -> Iterator[Stop]:
    weights = folder / "weights.safetensors"
    save_file(linear_model().state_dict(), weights)
    run = folder / "run"
    study = linear_study(run)
    result = run / "scores" / study.score(examples(2), wf.Dot(), keep=wf.Pairs(layers=True, self_influence=True)).name
    for lie in ("overlap", "far", "shape", "type", "negative", "header"):
        copy = folder / f"{lie}.safetensors"
        copy.write_bytes(_lying(weights, lie))
        yield refused(f"{lie}: a checkpoint", partial(study.score, examples(2), wf.TracIn(checkpoints=[copy])))
        for stored in (result / "tensors.safetensors", result / "matrices.safetensors"):
            kept = shutil.copy(stored, folder / "kept")
            stored.write_bytes(_lying(stored, lie))
            yield refused(f"{lie}: {stored.name} of a result", lambda: Scores.load(result))
            shutil.copy(kept, stored)


def _lying(file: Path, lie: str) -> bytes:
    """The bytes of a safetensors file with another header: eight bytes for its length, JSON, the tensors."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    entry = header[first]
    match lie:
        case "overlap":
            header[second] = entry
        case "far":
            entry["data_offsets"] = [2**40, 2**40 + 8]
        case "shape":
            entry["shape"] = [2**62, 4]
        case "type":
            entry["dtype"] = "PICKLE"
        case "negative":
            entry["data_offsets"] = [-8, 0]
    text = json.dumps(header).encode()
    said = 2**62 if lie == "header" else len(text)
    return said.to_bytes(8, "little") + text + content[8 + length :]


def _believed(content: bytes) -> dict[str, bytes]:
    """The bytes of each tensor, as the header has them."""
    length = int.from_bytes(content[:8], "little")
    data = content[8 + length :]
    header = json.loads(content[8 : 8 + length])
    return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}


if __name__ == "__main__":
    main(live, attack)
