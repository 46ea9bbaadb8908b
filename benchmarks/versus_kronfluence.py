"""wherefrom and kronfluence 1.0.1 on the same weights and data, turn by turn, each turn a process of its own.

    python benchmarks/versus_kronfluence.py --repeats 3            # make bench sets up what it needs

Both fit ek-fac factors on all training sequences and score all pairs, in float32. Written to
`results/versus_kronfluence.json`: medians of wall and user CPU seconds of each stage, peak memory, the ratios, and the
relative difference of the two score matrices.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from workload import Stage, Stopwatch, Workload, medians, save_results

import wherefrom as wf
from wherefrom.planning.forms import BankForm

Library = Literal["wherefrom", "kronfluence"]


@dataclass
class Arguments:
    """Side by side with kronfluence."""

    work: Workload = field(default_factory=Workload)
    repeats: int = 3
    train_batch: int = 64
    query_batch: int = 32
    """As in kronfluence's example; wherefrom plans its own sizes."""
    sampled: bool = False
    """Draw the Fisher targets, which is the default of both; the scores then differ by the draws."""
    turn: Library | None = None
    """Run one library only, in this process (the benchmark starts itself with it)."""
    folder: Path | None = None
    """Where a turn works and writes its figures."""


def ours(work: Workload, folder: Path, watch: Stopwatch, empirical: bool) -> Tensor:
    """Fit and score with wherefrom."""
    model = work.model()
    train, queries = work.sequences(work.train, 1), work.sequences(work.queries, 2)
    study = wf.Study(folder, model, wf.CausalLM(), train=train)
    with watch.stage("covariances and eigenbasis"):
        study.fit(wf.KFAC(empirical=empirical))
    with watch.stage("eigenvalues"):
        factors = study.fit(wf.EKFAC(empirical=empirical))
    with watch.stage("pairwise scores"):
        scores = study.score(queries, wf.EKFAC(factors=factors))
    return scores.values


def take_turn(arguments: Arguments, library: Library, folder: Path) -> None:
    """One library, timed, in this process."""
    watch, empirical = Stopwatch(), not arguments.sampled
    if library == "wherefrom":
        values = ours(arguments.work, folder / "run", watch, empirical)
    else:
        import kronfluence_job  # noqa: PLC0415  (imports kronfluence, which ours must not pay for)

        sizes = (arguments.train_batch, arguments.query_batch)
        values = kronfluence_job.run(arguments.work, folder / "run", watch, empirical, *sizes, half=False)
    save_file({"values": values.float().contiguous()}, folder / "scores.safetensors")
    watch.write(folder / "figures.json")


def start_turn(library: Library, folder: Path) -> dict[str, object]:
    """The same command in a new process, for one library."""
    folder.mkdir()
    command = [sys.executable, *sys.argv, "--turn", library, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, object] = json.loads((folder / "figures.json").read_text())
    return found


def compare(arguments: Arguments, base: Path) -> dict[str, object]:
    """All turns, and what came out."""
    libraries: tuple[Library, ...] = ("wherefrom", "kronfluence")
    stages: dict[Library, list[dict[str, Stage]]] = {library: [] for library in libraries}
    peaks: dict[Library, list[int]] = {library: [] for library in libraries}
    for turn in range(arguments.repeats):
        for library in libraries:
            found = start_turn(library, base / f"{library}{turn}")
            stages[library].append({name: Stage(**each) for name, each in found["stages"].items()})  # type: ignore[attr-defined]
            peaks[library].append(found["peak_bytes"])  # type: ignore[arg-type]
            print(library, turn, {name: round(each.wall_seconds, 2) for name, each in stages[library][-1].items()})
    ours_, theirs = (load_file(base / f"{library}0" / "scores.safetensors")["values"] for library in libraries)
    middle = {library: with_total(medians(stages[library])) for library in libraries}
    return {
        "workload": asdict(arguments.work),
        "targets": "sampled" if arguments.sampled else "empirical",
        "repeats": arguments.repeats,
        **{library: {name: asdict(each) for name, each in middle[library].items()} for library in libraries},
        "times_faster": {
            name: {
                kind: getattr(middle["kronfluence"][name], kind) / getattr(middle["wherefrom"][name], kind)
                for kind in ("wall_seconds", "user_seconds")
            }
            for name in middle["wherefrom"]
        },
        "peak_bytes": {library: median(peaks[library]) for library in libraries},
        "resident_block_bytes": resident_bytes(arguments.work),
        "largest_relative_difference": float((ours_ - theirs).abs().max() / theirs.abs().max()),
    }


def with_total(stages: dict[str, Stage]) -> dict[str, Stage]:
    """The stages and their sum."""
    wall, user = (sum(getattr(each, kind) for each in stages.values()) for kind in ("wall_seconds", "user_seconds"))
    return {**stages, "in all": Stage(wall, user)}


def resident_bytes(work: Workload) -> int:
    """What the preconditioned gradients of all queries take."""
    study = wf.Study(Path(), work.model(), wf.CausalLM(), train=work.sequences(1, 1))
    return work.queries * BankForm(torch.float32, torch.device("cpu")).bytes_per_query(study.layers)


def main(arguments: Arguments) -> None:
    """Compare, or take one turn."""
    torch.manual_seed(0)
    if arguments.turn:
        assert arguments.folder is not None
        take_turn(arguments, arguments.turn, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as base:
        name = "versus_kronfluence" + ("_sampled" if arguments.sampled else "")
        save_results(name, compare(arguments, Path(base)))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
