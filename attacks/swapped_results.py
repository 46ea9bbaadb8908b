"""Results that are not what they are taken for: other scores under a name, changed bytes, a manifest of another result.

What happens: a result says its name and what it was made from, and the digest of its tensors covers both. What does not
fit is refused by name, neither used nor overwritten, and is not shown beside other texts. Whoever writes all of it anew
can forge a consistent result: that is not stopped, and `docs/threat-model.md` says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import wherefrom as wf
from attacks.common import Stop, check, command_refused, examples, linear_study, main, refused, text_run
from wherefrom.scoring.results import Scores

MATRICES, TENSORS = "matrices.safetensors", "tensors.safetensors"
QUERIES, OTHERS = examples(2, seed=1), examples(2, seed=2)


def live(folder: Path) -> bool:
    """Tensors without a digest are read as they are: one bit makes other scores of them."""
    mine, _ = _two_results(folder / "run")
    file = mine / MATRICES
    before = load_file(file)["values"].clone()
    _flip_last_byte(file)
    return not torch.equal(load_file(file)["values"], before)


def attack(folder: Path) -> Iterator[Stop]:
    run = folder / "run"
    mine, other = _two_results(run)
    kept = shutil.copytree(mine, folder / "kept")
    tampering: dict[str, Callable[[], object]] = {
        "other scores moved under this name": lambda: shutil.copytree(other, mine, dirs_exist_ok=True),
        "the manifest of other scores": lambda: shutil.copy(other / "manifest.json", mine),
        "the matrices of other scores": lambda: shutil.copy(other / MATRICES, mine),
        "the same with their digest in the manifest": lambda: _swap_matrices(mine, other),
        "the other tensors of other scores": lambda: shutil.copy(other / TENSORS, mine),
        "one byte of the matrices": lambda: _flip_last_byte(mine / MATRICES),
        "one byte of the other tensors": lambda: _flip_last_byte(mine / TENSORS),
        "the end cut off": lambda: _cut(mine / MATRICES),
        "other queries in the manifest": lambda: _edit_queries(mine / "manifest.json"),
        "no matrices": (mine / MATRICES).unlink,
        "no other tensors": (mine / TENSORS).unlink,
    }
    for what, tamper in tampering.items():
        tamper()
        before = _content(mine)
        yield refused(f"{what}: loaded", lambda: Scores.load(mine))
        yield refused(f"{what}: scored again", lambda: _scored(run, QUERIES, "mine"))
        check(_content(mine) == before, f"{what}: what was refused has been overwritten")
        shutil.rmtree(mine)
        shutil.copytree(kept, mine)
    study, scores = linear_study(run), Scores.load(other)
    yield refused("scores beside other queries", lambda: study.report(scores, QUERIES))
    yield from _texts(folder)


def _texts(folder: Path) -> Iterator[Stop]:
    run = text_run(folder / "texts")
    (folder / "texts" / "queries.txt").write_text("c c\n\na a")
    for words in (("top", run), ("report", run)):
        yield command_refused(f"`wherefrom {words[0]}` when the queries are other texts", *words)


def _two_results(run: Path) -> tuple[Path, Path]:
    for queries, name in ((QUERIES, "mine"), (OTHERS, "other")):
        _scored(run, queries, name)
    return run / "scores" / "mine", run / "scores" / "other"


def _scored(run: Path, queries: list[tuple[torch.Tensor, torch.Tensor]], name: str) -> wf.Scores:
    study = linear_study(run)
    return study.score(queries, wf.Dot(), keep=wf.Pairs(self_influence=True), name=name)


def _flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _swap_matrices(mine: Path, other: Path) -> None:
    shutil.copy(other / MATRICES, mine)
    found, others = (json.loads((each / "manifest.json").read_text()) for each in (mine, other))
    (mine / "manifest.json").write_text(json.dumps({**found, "matrices": others["matrices"]}))


def _edit_queries(manifest: Path) -> None:
    found = json.loads(manifest.read_text())
    found["fingerprint"]["queries"] = "2 examples 0123456789abcdef01234567"
    manifest.write_text(json.dumps(found))


def _content(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


if __name__ == "__main__":
    main(live, attack)
