"""Names that lead out of a directory: `..` and absolute paths where a file names a shard, a checkpoint or a result.

What happens: such a name is refused before a path is made of it, so that nothing is read or written there. A page is
called after its scores only where their name is a plain one. Folders with names for a shell or a terminal
(`[bold]`, escape sequences) are not taken for results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import wherefrom as wf
from attacks.common import Stop, check, command_refused, examples, linear_model, linear_study, main, refused, text_run
from wherefrom.report.figures import Figure, save_evaluation
from wherefrom.report.html import PNG_SIGNATURE


def live(folder: Path) -> bool:
    inner, outer = folder / "inner", folder / "outer.txt"
    inner.mkdir()
    (inner / ".." / "outer.txt").write_text("through ..")
    return outer.read_text() == "through .." and inner / str(outer) == outer  # an absolute name replaces the folder


def attack(folder: Path) -> Iterator[Stop]:
    for name in ("../outside", str(folder / "outside"), "..", "a/b", "a\0b", ".hidden"):
        yield from _names(folder, name)
    yield _page(folder)
    yield from _folders(folder)


def _names(folder: Path, name: str) -> Iterator[Stop]:
    """What reads or writes a name that a file gives, or that is asked for."""
    shown, checkpoint, study = name.replace(str(folder), "/FOLDER"), folder / "checkpoint", linear_study(folder / "run")
    checkpoint.mkdir(exist_ok=True)
    save_file(linear_model().state_dict(), folder / "outside.safetensors")
    index = {"weight_map": {"0.weight": f"{name}.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    yield refused(
        f"{shown!r} as a shard of weights", lambda: study.score(examples(2), wf.TracIn(checkpoints=[checkpoint]))
    )
    entry = {"name": name, "step": 1, "epoch": 1.0, "optimizer": "AdamW", "groups": [{"learning_rate": 0.1}]}
    (folder / "wherefrom.json").write_text(json.dumps({"format": 1, "checkpoints": [entry]}))
    yield refused(f"{shown!r} as a recorded checkpoint", lambda: wf.read_recording(folder))
    yield refused(f"{shown!r} as a name of factors", lambda: study.fit(wf.EKFAC(), name=name))
    figure = Figure("A plot", "of a stranger", PNG_SIGNATURE)
    yield refused(f"{shown!r} as a name of a plot", lambda: save_evaluation(folder / "run", name, figure, {}, {}))
    check({each.name for each in folder.iterdir()} == _OWN, f"{name!r} has led out of the run directory")


# What this attack itself has put beside the run directory.
_OWN = {"checkpoint", "outside.safetensors", "wherefrom.json", "run"}


def _page(folder: Path) -> Stop:
    """Scores from a stranger's file name the method that the page would be called after."""
    study = linear_study(folder / "run")
    scores = wf.Scores(torch.ones(2, 6), {"method": f"{folder}/outside"})
    pages = [study.report(each, examples(2)) for each in (scores, replace(scores, name="../../outside"))]
    check({each.parent for each in pages} == {folder / "run" / "reports"}, f"pages were written to {pages}")
    return Stop("a path as the method or the name of scores", "the page is called 'scores' and a digest")


def _folders(folder: Path) -> Iterator[Stop]:
    """Names that a terminal would obey, of folders with scores."""
    run = text_run(folder / "texts")
    (scores,) = (run / "scores").iterdir()
    for name in ("[link=https:stranger]x", "\x1b]0;stranger\x07"):
        manifest = json.loads((scores / "manifest.json").read_text())
        scores = scores.rename(scores.with_name(name))
        (scores / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
        yield command_refused(f"{name!r} as the folder of scores", "report", run)


if __name__ == "__main__":
    main(live, attack)
