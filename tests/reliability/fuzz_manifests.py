"""Files of a run directory and of a recording with other bytes in them: read, or refused by an error of ours.

`check` takes any bytes and is what both kinds of fuzzing call: `measure` draws changes of good files at random, and run
as a program this module is an entry for atheris, which looks for bytes that reach new branches (`pip install atheris`):

    python -m tests.reliability.fuzz_manifests FOLDER -max_total_time=300
"""

from __future__ import annotations

import inspect
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from tests.reliability.outcomes import Outcome
from wherefrom.hf.blueprint import model_without_weights
from wherefrom.hf.preparation import Preparation
from wherefrom.jobs import sources as run_sources
from wherefrom.jobs.sources import SOURCES, DataSource, RunSources
from wherefrom.report import figures
from wherefrom.report.figures import load_figures
from wherefrom.runtime.errors import WherefromError
from wherefrom.runtime.profile import Profile
from wherefrom.scoring.results import Scores
from wherefrom.store import artifacts as store
from wherefrom.store import recording
from wherefrom.store.artifacts import Artifact, Partial, read_manifest
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.recording import RECORDING, read_recording

FINGERPRINT = {"library": "1", "model": "a", "method": "dot"}


def matrix(result: Unfinished) -> dict[str, torch.Tensor]:
    """Scores that are written in two blocks, with the part of a layer."""
    blocks = result.blocks(2, 3)
    for rows in (range(1), range(1, 2)):
        tensors = {"values": torch.ones(1, 3), "layers": torch.ones(1, 1, 3), "query_errors": torch.ones(1)}
        blocks.get_or_compute(rows, range(3), lambda _, tensors=tensors: tensors)  # type: ignore[misc]
    result.details["layers"] = ["first"]
    return {"query_errors": torch.ones(2)}


class Files:
    """Good files of every kind, and what reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        artifact = Artifact(folder / "scores" / "a", FINGERPRINT)
        artifact.save({"values": torch.arange(6.0).reshape(2, 3)})
        written = folder / "scores" / "b"
        Cache(written.parent, FINGERPRINT, Profile()).get_or_compute(written.name, matrix)
        self._partial = Partial(folder / "a.partial.safetensors", FINGERPRINT)
        self._partial.save(self._sums(), 3, 2)
        text = DataSource(("train.txt",), "train", Preparation(max_length=12))
        RunSources("model", None, text, False, 0).save(folder)
        RunSources("model", None, text, False, 0, queries=text).save(folder, artifact.path.name)
        (folder / "checkpoint-1").mkdir()
        entry = {"name": "checkpoint-1", "step": 1, "epoch": 0.5, "optimizer": "AdamW",
                 "groups": [{"learning_rate": 0.1, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0}]}  # fmt: skip
        (folder / RECORDING).write_text(json.dumps({"format": 1, "checkpoints": [entry]}))
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "a.json").write_text('{"title": "a", "caption": "b", "about": {}}')
        (folder / "evaluation" / "a.png").write_bytes(b"png")
        (folder / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}')
        self.readers: list[tuple[Path, Callable[[], object]]] = [
            (artifact.path / "manifest.json", lambda: (read_manifest(artifact.path), Scores.load(artifact.path))),
            (artifact.path / "tensors.safetensors", lambda: Scores.load(artifact.path)),
            (written / "manifest.json", lambda: Scores.load(written)),
            (written / "matrices.safetensors", lambda: Scores.load(written)),
            (self._partial.path, lambda: self._partial.load(self._sums())),
            (folder / SOURCES, lambda: RunSources.load(folder)),
            (artifact.path / SOURCES, lambda: RunSources.of_result(artifact.path)),
            (folder / RECORDING, lambda: read_recording(folder)),
            (folder / "evaluation" / "a.json", lambda: load_figures(folder, {})),
            (folder / "config.json", lambda: model_without_weights(str(folder / "config.json"), torch.float32)),
        ]
        self.good = [file.read_bytes() for file, _ in self.readers]
        for number, content in enumerate(self.good):
            assert self.check(number, content) == "read", self.readers[number][0]

    @staticmethod
    def _sums() -> dict[str, torch.Tensor]:
        return {"a": torch.ones(4), "b": torch.zeros(2, 2)}

    def check(self, number: int, content: bytes) -> str:
        """How reading a file with this content ends: "read" or "refused"; the file is put back."""
        file, read = self.readers[number]
        file.write_bytes(content)
        try:
            read()
        except WherefromError as error:
            assert str(error).strip(), content
            return "refused"
        finally:
            file.write_bytes(self.good[number])
        return "read"


def measure(folder: Path, count: int, number: int) -> list[Outcome]:
    """Change good files `count` times, as the seed `number` says: bits, bytes, cuts, and values inside the JSON."""
    files, draw = Files(folder / "files"), random.Random(number)
    ends: Counter[str] = Counter()
    for case in range(count):
        chosen = draw.randrange(len(files.readers))
        content = _changed(files.good[chosen], draw)
        try:
            ends[files.check(chosen, content)] += 1
        except Exception as error:
            raise AssertionError(f"seed {number}, case {case}, {files.readers[chosen][0].name}: {content!r}") from error
    return [
        Outcome(
            "manifests, headers, sources, recordings, evaluations and configurations with other bytes in them",
            count,
            f"{ends['refused']} were refused by an error that names the file, {ends['read']} were still valid.",
        )
    ]


ODD: list[object] = [None, True, -1, 0, 1, 2**70, 1e308, float("nan"), "", "a", "../..", "/", "\0", "\ud800", [], {},
       [[]], {"a": None}, [0, 0], "a" * 1000, ["a"] * 50]  # fmt: skip


def _changed(content: bytes, draw: random.Random) -> bytes:
    start = content.find(b"{")
    if draw.random() < 0.6:
        # JSON, also that in the header of a safetensors file, whose length its first eight bytes hold.
        try:
            value, end = json.JSONDecoder().raw_decode(content[start:].decode("latin-1"))
        except ValueError:
            value, end = {}, 0
        text = json.dumps(_replaced(value, draw)).encode()
        if draw.random() < 0.1:
            text = b'{"a":' * draw.randrange(3000) + text
        head = len(text).to_bytes(8, "little") if start == 8 else content[:start]
        return head + text + content[start + end :]
    found = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(found) + 1)
        match draw.randrange(4):
            case 0 if place < len(found):
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                del found[place : place + draw.choice([1, 4, 10**6])]
            case 2:
                found[place:place] = draw.choice([b"\0", b"\xff", b"[" * 2000, b"{}", b'"', b"NaN", draw.randbytes(5)])
            case _:
                found[place:place] = found[: draw.randrange(len(found) + 1)]
    return bytes(found)


def _replaced(value: object, draw: random.Random) -> object:
    """A JSON value with one of its parts replaced, removed or added."""
    if draw.random() < 0.15 or not value or not isinstance(value, dict | list):
        return draw.choice(ODD)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        return [*value[:place], _replaced(value[place], draw), *value[place + 1 :]]
    name = draw.choice(sorted(value))
    kept = {key: each for key, each in value.items() if key != name}
    match draw.randrange(6):
        case 0:
            return kept
        case 1:
            return {**value, draw.choice(["a", "__metadata__", ""]): draw.choice(ODD)}
        case _:
            return {**kept, name: _replaced(value[name], draw)}


def _fuzz() -> None:
    atheris = import_module("atheris")  # not among the packages that are installed for tests
    folder = Path(sys.argv.pop(1))
    files = Files(folder / "files")
    (folder / "corpus").mkdir(exist_ok=True)
    for number, content in enumerate(files.good):
        (folder / "corpus" / f"good{number}").write_bytes(bytes([number]) + content)
    for module in (store, recording, run_sources, figures, json.decoder):
        for each in vars(module).values():
            for function in [each, *(vars(each).values() if inspect.isclass(each) else ())]:
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)

    def one(content: bytes) -> None:
        if content:
            files.check(content[0] % len(files.readers), content[1:])

    atheris.Setup([*sys.argv, str(folder / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz()
