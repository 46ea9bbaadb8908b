"""Run every method of attribution against the same retrainings, and write `docs/leaderboard.md`.

    python benchmarks/run_leaderboard.py                    # a few hours on two cores; it can be stopped and continued
    python benchmarks/run_leaderboard.py --size.model smollm2 --size.tokens 256 ...     # larger, on a GPU
    python benchmarks/run_leaderboard.py --size.board 2     # texts, queries and a training that nobody tuned on
    python benchmarks/run_leaderboard.py --size.board 3 --size.train 1447 --size.queries 16     # and all of the texts
    python benchmarks/run_leaderboard.py --methods ekfac magic      # these rows; the others stay as they are
    python benchmarks/run_leaderboard.py --only_page        # only write the page again

What is finished, in `run_dir`, is not done again: retrainings, and methods (delete its folder to repeat one). A run of
another size takes another `run_dir`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from leaderboard.calibration import calibration
from leaderboard.measure import Cost, measured
from leaderboard.methods import METHODS
from leaderboard.page import write_page
from leaderboard.ranking import REFERENCE, ranking
from leaderboard.retrainings import protocol_a, protocol_b, without_top
from leaderboard.setting import Setting, Size, record
from leaderboard.subject import Subject
from workload import RESULTS, ROOT, save_results

from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.store.files import read_json, write_text

BOARDS = ("leaderboard", "leaderboard-2", "leaderboard-3")


@dataclass
class Arguments:
    """What is run."""

    size: Size = field(default_factory=Size)
    run_dir: Path | None = None
    """By default runs/leaderboard, and of the other boards runs/leaderboard-2 and -3."""
    cache_dir: Path = ROOT / "cache"
    """Keeps the pre-trained small model."""
    masks: int = 100
    """Random subsets of each protocol."""
    repeats: int = 3
    """Seeds of each half in protocol A."""
    share: float = 0.01
    """Of the training set, left out in protocol B and by each method's own removal."""
    removal_queries: int = 16
    """The first queries, each without what a method puts on top of it."""
    workers: int = 2
    methods: tuple[str, ...] = tuple(METHODS)
    removed: tuple[str, ...] | None = None
    """The methods whose own removal is measured; None is all that run."""
    only_page: bool = False

    @property
    def name(self) -> str:
        """Of its results."""
        return BOARDS[self.size.board - 1]


def main(arguments: Arguments) -> None:
    """Train, score, retrain, rank, write."""
    if not arguments.only_page:
        file = RESULTS / f"{arguments.name}.json"
        earlier = json.loads(file.read_text()) if file.exists() else None
        save_results(arguments.name, merged(earlier, results(arguments)))
    write_page(*(json.loads((RESULTS / f"{name}.json").read_text()) for name in BOARDS))


def results(arguments: Arguments) -> dict[str, Any]:
    """The figures of some methods."""
    setting, run_dir = Setting(arguments.size, arguments.cache_dir), arguments.run_dir
    if run_dir is None:
        run_dir = ROOT / "runs" / arguments.name
    workers = arguments.workers
    check_size(run_dir, arguments.size)
    if REFERENCE not in arguments.methods:
        raise InputError(
            f"methods={arguments.methods}: expected {REFERENCE!r} among them, which others are held against."
        )
    torch.set_num_threads(1)  # as in the workers, so that the trained model is theirs to the last bit
    subject = Subject(setting, record(setting, run_dir / "training"), run_dir / "methods")
    scores, costs = {}, dict[str, Cost]()
    for name in arguments.methods:
        values, costs[name] = measured(subject, name)
        if values is not None:
            scores[name] = values
        print(f"{name}: {costs[name].seconds:.1f} s, {costs[name].epochs:.1f} epochs", flush=True)
    halves = protocol_a(setting, run_dir, arguments.masks, arguments.repeats, workers)
    removals, whole = protocol_b(setting, run_dir, arguments.masks, arguments.share, workers)
    removed = {name: each for name, each in scores.items() if arguments.removed is None or name in arguments.removed}
    queries = arguments.removal_queries
    rises = without_top(setting, run_dir, removed, arguments.share, queries, workers) if removed else {}
    calibrations = {
        name: calibration(METHODS[name].rises(values), removals, whole, setting.query_tokens)
        for name, values in scores.items()
        if METHODS[name].unit
    }
    return {
        "setting": {**asdict(arguments.size), "share": arguments.share, "masks": arguments.masks,
                    "repeats": arguments.repeats, "removal_queries": arguments.removal_queries},
        "protocols": {"A": ranking(scores, halves), "B": ranking(scores, removals)},
        "rises": {name: [round(each, 6) for each in found.tolist()] for name, found in rises.items()},
        "calibration": calibrations,
        "costs": {name: asdict(cost) for name, cost in costs.items()},
    }  # fmt: skip


def merged(earlier: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of this run, with those of the same setting's other methods from earlier ones.

    Those may have had another number of seeds, which stands in each row.
    """
    if earlier is None or {**earlier["setting"], "repeats": 0} != {**found["setting"], "repeats": 0}:
        return found
    both = {**found}
    for part in ("rises", "calibration", "costs"):
        both[part] = _known({**earlier[part], **found[part]})
    for protocol, ranked in found["protocols"].items():
        before, now = earlier["protocols"][protocol], ranked["methods"]
        for name, row in now.items():  # of methods that were not compared in this run, what earlier ones found
            told = before["methods"].get(name, {}).get("not_told_from", [])
            row["not_told_from"] += [other for other in told if other not in now and other in METHODS]
        rows = _known({**before["methods"], **now})
        ordered = dict(sorted(rows.items(), key=lambda row: -row[1]["value"]))
        ceiling = ranked["ceiling"] or before["ceiling"]  # of one seed there is none
        both["protocols"] = {**both["protocols"], protocol: {**ranked, "ceiling": ceiling, "methods": ordered}}
    return both


def _known(rows: dict[str, Any]) -> dict[str, Any]:
    """Those of methods that there still are."""
    return {name: row for name, row in rows.items() if name in METHODS}


def check_size(run_dir: Path, size: Size) -> None:
    """Refuse a directory that holds what was made at another size, where methods' scores would be taken for these."""
    file, wanted = run_dir / "size.json", asdict(size)
    stored = read_json(file) if file.exists() else wanted
    if stored != wanted:
        raise MismatchError(f"{run_dir} is of the size {stored}, not {wanted}. Give another --run_dir, or delete it.")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(wanted, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
