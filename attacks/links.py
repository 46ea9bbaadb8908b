"""Symbolic links in a run directory, which lead what is written, read and deleted to somewhere else.

What happens: a link on the way to a result, a page or a plot is refused by name, and what it leads to stays as it is.
Temporary files are made anew, so that a link under their name is deleted and not followed; the lock does not follow
one either.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import wherefrom as wf
from attacks.common import Stop, check, command_refused, examples, linear_model, linear_study, main, text_run
from wherefrom.evaluate.retrain import Retraining, retrain
from wherefrom.report.figures import Figure, load_figures, save_evaluation
from wherefrom.report.html import PNG_SIGNATURE
from wherefrom.runtime.errors import WherefromError
from wherefrom.store.files import remove

PLOT = Figure("A plot", "of a victim", PNG_SIGNATURE)


def live(folder: Path) -> bool:
    victim, link = folder / "victim", folder / "link"
    victim.mkdir()
    link.symlink_to(victim)
    (link / "page.html").write_text("written elsewhere")
    return (victim / "page.html").exists()


def attack(folder: Path) -> Iterator[Stop]:
    run = folder / "clean"
    save_file(linear_model().state_dict(), folder / "weights.safetensors")
    _use(run)
    made = sorted(each.relative_to(run) for each in run.rglob("*"))
    check({each.parts[0] for each in made} >= {"factors", "scores", "checkpoints", "reports"}, f"a run has {made}")
    refusals = [each for path in made for each in _linked(folder, run, path)]
    yield Stop(
        f"a link in the place of each of the {len(made)} files and directories of a run",
        f"{len(refusals)} refusals, such as {refusals[0]}; the other links were replaced, or not needed",
    )
    results = [path.parent for path in made if path.name == "manifest.json"]
    temporary = [(path, ending) for path in results for ending in (".part", ".blocks", ".partial.safetensors")]
    refusals = [each for path, ending in temporary for each in _linked(folder, run, path, ending)]
    yield Stop(
        f"a link in the place of each of {len(temporary)} files and directories of results under way",
        f"{len(refusals)} refusals, such as {refusals[0]}; the other links were deleted, or not needed",
    )
    yield from _commands(folder)


def _use(run: Path, folder: str = "", overwrite: bool = True) -> None:
    """Make what is in a folder of a run directory, or in all of them; anew, or what is missing."""
    study = linear_study(run)
    method = wf.TracIn(checkpoints=[run.parent / "weights.safetensors"])
    uses: dict[str, Callable[[], object]] = {
        "factors": lambda: study.fit(wf.EKFAC(), overwrite=overwrite),
        "scores": lambda: study.score(examples(2), wf.Dot(), overwrite=overwrite),
        "checkpoints": lambda: study.score(examples(2), method, overwrite=overwrite),
        "self_influence": lambda: study.self_influence(wf.Dot(), overwrite=overwrite),
        "index": lambda: study.index(wf.Dot(), overwrite=overwrite),
        "reports": lambda: study.report(study.score(examples(2), wf.Dot())),
        "evaluation": lambda: (save_evaluation(run, "plot", PLOT, {}, {}), load_figures(run, {})),
        "retrainings": lambda: _retrain(run / "retrainings"),
    }
    for name in [folder] if folder in uses else uses:
        uses[name]()


def _retrain(path: Path) -> None:
    """One retraining, and one more where there is one."""

    def train(asked: Sequence[Retraining]) -> Tensor:
        return torch.zeros(len(asked), 2)

    seeds = (0, 1) if path.exists() else (0,)
    retrain(path, train, torch.ones(1, 6, dtype=torch.bool), seeds, fingerprint={}, workers=1, progress=False)


def _linked(folder: Path, run: Path, path: Path, ending: str = "") -> list[str]:
    """Put a link in the place of a file or directory of a run, and use the run; the error that it has ended with.

    Args:
        ending: of what a result is made of on the way; the result itself is then missing.
    """
    copy, victim = shutil.copytree(run, folder / "copy"), folder / "victim"
    if ending:
        shutil.rmtree(copy / path)
        victim.mkdir()
    else:
        (copy / path).rename(victim)
    (copy / path).with_name(path.name + ending).symlink_to(victim)
    before, refusals = _content(victim), []
    try:
        _use(copy, path.parts[0], overwrite=not ending)
    except WherefromError as error:
        refusals.append(f"{type(error).__name__}: {error}")
    check(_content(victim) == before, f"{path}{ending} of a run led what was written elsewhere")
    shutil.rmtree(copy)
    remove(victim)
    return refusals


def _content(path: Path) -> dict[Path, tuple[int, bytes]]:
    """All files of a directory, or one, with the times of their last change."""
    return {
        each: (each.stat().st_mtime_ns, each.read_bytes() if each.is_file() else b"")
        for each in (path, *sorted(path.rglob("*")))
    }


def _commands(folder: Path) -> Iterator[Stop]:
    run, victim = text_run(folder), folder / "elsewhere"
    victim.mkdir()
    (run / "reports").symlink_to(victim)
    yield command_refused("`wherefrom report` with a link for RUN/reports", "report", run)
    check(not any(victim.iterdir()), "`wherefrom report` wrote through a link")
    (run / "scores").rename(victim / "scores")
    (run / "scores").symlink_to(victim / "scores")
    yield command_refused("`wherefrom top` with a link for RUN/scores", "top", run)


if __name__ == "__main__":
    main(live, attack)
