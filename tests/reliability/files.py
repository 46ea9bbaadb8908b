"""Damaged, forged and misplaced files: each is refused by name or does no harm, and none is used or overwritten.

A complete run and an interrupted one are copied, one thing in the copy is damaged, and everything is asked for again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import wherefrom as wf
from tests.models import mlp_case
from tests.reliability.outcomes import Outcome
from tests.retrain_worker import fill
from tests.runs import unprivileged
from wherefrom.report.figures import Figure, load_figures, save_evaluation
from wherefrom.runtime.errors import WherefromError
from wherefrom.store.artifacts import Artifact
from wherefrom.store.files import remove

Results = dict[str, Tensor]


class StopError(Exception):
    """Ends a run in the middle."""


class Stopping(wf.Classification):
    """Raises in a later batch, as a kill would end it; or never."""

    _left = 10**9

    def train_loss(self, *arguments: object) -> Tensor:
        self._left -= 1
        if self._left < 0:
            raise StopError
        return super().train_loss(*arguments)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Workplace:
    """A model with its data, and what can be asked of a run directory.

    Attributes:
        scale: of the weights; another scale is another study.
    """

    scale: float = 1.0

    def study(self, run: Path, batches: int = 10**9) -> tuple[wf.Study[Any], list[object]]:
        case, task = mlp_case(torch.float32), Stopping()
        task._left = batches
        for parameter in case.model.parameters():
            parameter.data *= self.scale
        execution = wf.Execution(checkpoint_seconds=0, train_batch_size=3, query_batch_size=2, progress=False)
        return wf.Study(run, case.model, task, train=case.train, execution=execution), case.queries

    def everything(self, run: Path, overwrite: bool = False) -> Results:
        """All that a study can be asked for, each under a name."""
        study, queries = self.study(run)
        found: Results = {}
        # Under given names, which another study's results have too: without, none of its files would be looked at.
        factors = study.fit(name="factors", overwrite=overwrite)
        for layer, basis in factors.bases.items():
            found |= {f"{layer}.{side}": getattr(basis, side) for side in ("activations", "gradients")}
        found |= factors.eigenvalues
        method = wf.EKFAC(factors=factors)
        found["scores"] = study.score(queries, method, name="all", overwrite=overwrite).values
        top = study.score(queries, method, keep=wf.Top(3), name="highest", overwrite=overwrite)
        found |= {"top": top.values, "top train": top.train}
        found["self-influence"] = study.self_influence(method, name="all", overwrite=overwrite)
        found["tokens"] = study.score(queries, method, keep=wf.Tokens(2), name="all", overwrite=overwrite).values
        found["bank"] = fill(run / "bank", run / "log", 1, overwrite=overwrite).losses
        found["figures"] = torch.tensor([len(load_figures(run, {}))])
        return found

    def complete(self, run: Path) -> None:
        self.everything(run)
        save_evaluation(run, "plot", Figure("A plot", "Of nothing.", b"png"), {"numbers": [1, 2]}, {})

    def interrupted(self, run: Path) -> None:
        """A fit in the middle of its covariances, and a score in the middle of the third of its five blocks."""
        study, _ = self.study(run, batches=3)
        try:
            study.fit(name="factors")
        except StopError:
            pass
        else:
            raise AssertionError("the fit was not interrupted")
        study, queries = self.study(run, batches=2 + 5 + 5 + 3)  # two to plan, and five a block
        try:
            study.score(queries, wf.Dot(), name="all", execution=self.little_memory(study))
        except StopError:
            pass
        else:
            raise AssertionError("the score was not interrupted")
        assert {path.name for path in (run / "scores").glob("all.blocks/*")} == {
            "0-1.0-12",
            "1-2.0-12",
            "2-3.0-12.partial.safetensors",
        }

    def resumed(self, run: Path, overwrite: bool = False) -> Results:
        """What an interrupted run ends with."""
        study, queries = self.study(run)
        factors = study.fit(name="factors", overwrite=overwrite)
        execution = self.little_memory(study)
        scores = study.score(queries, wf.Dot(), name="all", overwrite=overwrite, execution=execution)
        return {**factors.eigenvalues, "scores": scores.values}

    @staticmethod
    def little_memory(study: wf.Study[Any]) -> wf.Execution:
        """For one query at a time."""
        return replace(study.execution, memory_budget=1e-9)


Fault = Callable[[Path, Path, random.Random], None]
"""Damages the file or directory (first) of a run, given the same one of another study (second)."""


def truncated(path: Path, other: Path, draw: random.Random) -> None:
    """Cut off at a random place."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def emptied(path: Path, other: Path, draw: random.Random) -> None:
    """Emptied."""
    os.truncate(path, 0)


def bits_flipped(path: Path, other: Path, draw: random.Random) -> None:
    """One to sixteen bits flipped."""
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 16])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def end_lost(path: Path, other: Path, draw: random.Random) -> None:
    """Zeros from some place on, as after a power cut."""
    content = path.read_bytes()
    kept = draw.randrange(len(content))
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def of_another_study(path: Path, other: Path, draw: random.Random) -> None:
    """Replaced by the same file of another study."""
    shutil.copyfile(other, path)


def folder_of_another_study(path: Path, other: Path, draw: random.Random) -> None:
    """A whole result replaced by the same one of another study."""
    shutil.rmtree(path)
    shutil.copytree(other, path)


def neighbour(path: Path, other: Path, draw: random.Random) -> None:
    """Replaced by a file of the same kind from another place of the run."""
    run = next(parent for parent in path.parents if parent.parent.name == "runs")
    others = [each for each in run.rglob(f"*{path.suffix}") if each.parent != path.parent and each.is_file()]
    shutil.copyfile(draw.choice(sorted(others)), path)


def exchanged(path: Path, other: Path, draw: random.Random) -> None:
    """Two whole results of one run change places."""
    run = next(parent for parent in path.parents if parent.parent.name == "runs")
    others = [each.parent for each in run.rglob("manifest.json") if each.parent != path]
    second, spare = draw.choice(sorted(others)), path.with_name("spare")
    path.rename(spare)
    second.rename(path)
    spare.rename(second)


def another_version(path: Path, other: Path, draw: random.Random) -> None:
    """Said to be of another version of the format."""
    version = draw.choice([1, 3, "4", None])
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "format": version}))
        return
    with safe_open(path, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    header = {**json.loads(metadata["wherefrom"]), "format": version}
    save_file(
        {name: each.clone() for name, each in tensors.items()}, path, {**metadata, "wherefrom": json.dumps(header)}
    )


def json_bomb(path: Path, other: Path, draw: random.Random) -> None:
    """JSON nested a hundred thousand deep, of 32 MiB, with a number of 100,000 digits, or of another kind."""
    bombs = [
        "[" * 10**6,
        '{"a":' * 10**5,
        '{"format": ' + "9" * 10**5 + "}",
        '{"a": "' + "x" * 2**25 + '"}',
        "[1]",
        '""',
    ]
    path.write_text(draw.choice(bombs))


def header_bomb(path: Path, other: Path, draw: random.Random) -> None:
    """A safetensors header that says it is huge, or holds nested JSON."""
    if draw.random() < 0.5:
        path.write_bytes(draw.choice([2**40, 2**63, 99_999_999]).to_bytes(8, "little") + path.read_bytes()[8:])
    else:
        save_file({"values": torch.zeros(1)}, path, {"wherefrom": "[" * 10**5, "sha256": "0" * 64})


def moved_behind_a_link(path: Path, other: Path, draw: random.Random) -> None:
    """A file or directory moved elsewhere, with a symbolic link in its place."""
    runs = next(parent for parent in path.parents if parent.name == "runs")
    elsewhere = runs.with_name("elsewhere") / path.name
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def pipe(path: Path, other: Path, draw: random.Random) -> None:
    """A pipe in its place."""
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path, other: Path, draw: random.Random) -> None:
    """A directory in its place."""
    path.unlink()
    path.mkdir()


def deleted(path: Path, other: Path, draw: random.Random) -> None:
    """Deleted."""
    path.unlink()


def unreadable(path: Path, other: Path, draw: random.Random) -> None:
    """Without permission to be read."""
    path.chmod(0)


def forged(path: Path, other: Path, draw: random.Random) -> None:
    """Tensors of another shape or type, one too many or one too few, with a digest that fits."""
    artifact = Artifact(path, json.loads((path / "manifest.json").read_text())["fingerprint"])
    tensors = artifact.load()
    name = draw.choice(sorted(tensors)) if tensors else ""
    change = draw.randrange(4) if tensors else 3
    if change == 0:
        tensors[name] = tensors[name].double() if tensors[name].dtype != torch.float64 else tensors[name].int()
    elif change == 1:
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif change == 2:
        del tensors[name]
    else:
        tensors["more"] = torch.zeros(3)
    artifact.save(tensors)


FILE_FAULTS: tuple[Fault, ...] = (
    truncated, emptied, bits_flipped, end_lost, of_another_study, neighbour, another_version, json_bomb, header_bomb,
    moved_behind_a_link, pipe, folder_instead, deleted, unreadable,
)  # fmt: skip
FOLDER_FAULTS: tuple[Fault, ...] = (folder_of_another_study, exchanged, moved_behind_a_link, forged)


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Damage `count` files or directories with each of the faults.

    Raises:
        AssertionError: damage was used, or what is no error of ours was raised; the case is named.
    """
    folder.chmod(0o755)
    one, other = Workplace(), Workplace(scale=2.0)
    for kind in ("complete", "interrupted"):
        for place, name in ((one, "original"), (other, "other")):
            getattr(place, kind)(folder / name / kind)
    expected = {"complete": one.everything(folder / "original" / "complete")}
    shutil.copytree(folder / "original" / "interrupted", folder / "finished")
    expected["interrupted"] = one.resumed(folder / "finished")
    outcomes = []
    for fault in dict.fromkeys((*FILE_FAULTS, *FOLDER_FAULTS)):
        refused = 0
        for number in range(count):
            draw = random.Random(f"{seed}/{fault.__name__}/{number}")
            kind = draw.choice(["complete", "complete", "interrupted"])
            refused += _try(folder, kind, fault, expected[kind], draw)
        what = (fault.__doc__ or "").strip(".")
        outcomes.append(Outcome(what, count, f"{refused} refused by name, {count - refused} without effect"))
    return outcomes


def _try(folder: Path, kind: str, fault: Fault, expected: Results, draw: random.Random) -> bool:
    """Damage one thing; whether it was then refused."""
    work = folder / "work"
    remove(work)
    run = work / "runs" / kind
    shutil.copytree(folder / "original" / kind, run, symlinks=True)
    places = _places(run, fault)
    elsewhere = folder / "other" / kind
    if fault in (of_another_study, folder_of_another_study):
        places = [path for path in places if (elsewhere / path.relative_to(run)).exists()]
    path = draw.choice(places)
    case = f"{fault.__name__} of {path.relative_to(run)} in the {kind} run"
    fault(path, elsewhere / path.relative_to(run), draw)
    damage = _content(run)
    use = Workplace().everything if kind == "complete" else Workplace().resumed
    try:
        with unprivileged() if fault is unreadable else nullcontext():
            found = use(run)
    except WherefromError as error:
        assert str(run) in str(error), f"{case}: {error} names no file of the run"
        after = _content(run)
        # An interrupted run goes on until it comes to the damage.
        kept = damage if kind == "complete" else {each: damage[each] for each in damage if run / each == path}
        changed = [str(each) for each, content in kept.items() if after.get(each) != content]
        assert not changed, f"{case}: {changed} was changed"
        _recover(use, run, path, case, expected)
        return True
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    _compare(found, expected, case)
    return False


def _places(run: Path, fault: Fault) -> list[Path]:
    """What a fault can be done to."""
    if fault in FOLDER_FAULTS and fault is not moved_behind_a_link:
        return sorted(file.parent for file in run.rglob("manifest.json"))
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "log", "..lock")]
    files = [path for path in files if not path.name.endswith(".lock")]
    suffixes = {".json", ".safetensors"} if fault is neighbour else {".json", ".safetensors", ".png"}
    if fault in (json_bomb, header_bomb):
        suffixes = {".json"} if fault is json_bomb else {".safetensors"}
    if fault is another_version:
        versioned = {".json": "manifest", ".safetensors": "tensors"}  # matrices have that of their result
        files = [path for path in files if path.stem == versioned.get(path.suffix) or ".partial" in path.name]
    folders = [path for path in run.rglob("*") if path.is_dir()] if fault is moved_behind_a_link else []
    return sorted([path for path in files if path.suffix in suffixes] + folders)


def _content(run: Path) -> dict[Path, bytes]:
    """Every result on disk; what a call adds to the log is none, nor are locks."""
    return {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != "log" and ".lock" not in path.name
    }


def _recover(use: Callable[..., Results], run: Path, path: Path, case: str, expected: Results) -> None:
    """Follow the message: delete what it names, and compute it again."""
    artifact = path.parent if (path.parent / "manifest.json").exists() or path.name == "manifest.json" else path
    remove(artifact)
    if path.suffix in (".png", ".json") and path.parent.name == "evaluation":
        remove(path.with_suffix(".json"))
    try:
        found = use(run)
    except WherefromError:
        found = use(run, overwrite=True)
    _compare({**expected, **found} if "evaluation" in case else found, expected, f"{case}, recovered")


def _compare(found: Results, expected: Results, case: str) -> None:
    for name, tensor in expected.items():
        if name != "figures":
            assert torch.equal(found[name], tensor), f"{case}: {name} differs"
