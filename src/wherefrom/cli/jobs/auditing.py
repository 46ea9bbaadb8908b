"""The subcommand `wherefrom audit`: a run's training examples as a review queue, and the file without the worst.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from wherefrom.cli.methods import EXECUTED, FACTORED, READ, default, subcommands
from wherefrom.cli.shared import Run
from wherefrom.hf.preparation import Source
from wherefrom.jobs.auditing import Audit, Signal
from wherefrom.jobs.auditing import audit as audited
from wherefrom.jobs.filtering import check_filtered, check_new, filtered_together, origins
from wherefrom.jobs.sources import DataSource, RunSources
from wherefrom.report.passages import DatasetPassages, excerpt
from wherefrom.report.text import figures
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError, check_argument, printable
from wherefrom.store.files import write_bytes, write_text

console = Console()

AUDITED: Any = subcommands(FACTORED, only=("empirical", "seed", "damping"), of_the_fit=True)


def audit(
    run: Run,
    *,
    held_out: str | None = None,
    method: tyro.conf.OmitArgPrefixes[AUDITED] = default(AUDITED),  # noqa: B008  (a frozen value)
    order: Signal | None = None,
    n: int = 10,
    out: Path | None = None,
    drop: int | None = None,
    filtered: Path | None = None,
    split: str = "validation",
    reading: tyro.conf.OmitArgPrefixes[READ] = READ(),  # noqa: B008
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Show the training examples that are most likely wrong or harmful, and write files without them.

    Args:
        run: A run directory that `wherefrom fit` made.
        held_out: Examples that are known to be right, a file, a saved dataset or a hub name: what raises their loss.
        method: Whose curvature is used; that of EK-FAC unless one is named.
        order: The signal that examples are ranked by: unless named, the loss of texts, or else neighbours.
        n: How many examples are shown.
        out: Write all of them as JSON lines, the most suspicious first.
        drop: Leave this many of the most suspicious out of the file that `filtered` names.
        filtered: Write the training examples without those, in the format that they came in.
        split: The split of a saved or hub dataset of held-out examples.
        reading: How held-out examples are read.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        overwrite: Replace files that are there.
    """
    Ranks.current().check_alone("audit")
    executed, sources = execution.made(), RunSources.load(run, trust_remote_code)
    check_argument(n >= 1, "n", n, "at least 1")
    if (drop is None) != (filtered is None):
        raise InputError(f"drop={drop} with filtered={filtered}: expected both, or none of them.")
    if order == "held_out" and held_out is None:
        raise InputError("order='held_out' without held_out: name the held-out examples, or another order.")
    if out is not None:
        check_new("out", out, ".jsonl", overwrite)
    if filtered is not None:
        check_filtered("filtered", filtered, sources.train, overwrite)
    study = sources.study(run, device, executed)
    count = len(study.train)
    check_argument(drop is None or 1 <= drop < count, "drop", drop, f"1 to {count - 1}, of {count} examples")
    queries = None
    if held_out is not None:
        queries = study.prepare(held_out, split, sources.queries_from(held_out, split, reading.made()).preparation)
    chosen = method.made(sources.fitted)
    found, passages = audited(study, queries, chosen, order), DatasetPassages(study.train, study.tokenizer)
    ranking = found.ranking.tolist()
    read = sources.train.read() if filtered or out else []
    if filtered is not None:
        write_bytes(filtered, filtered_together(read, sources.train.names, set(ranking[drop:])))
    if out is not None:
        write_text(out, "".join(_queue(found, passages, sources.train, read)))
    console.print(_table(found, passages, ranking[:n]))
    for file in (each for each in (out, filtered) if each is not None):
        console.print(f"Written: {file}", soft_wrap=True, highlight=False)


def _queue(found: Audit, passages: DatasetPassages, train: DataSource, read: Sequence[Source]) -> Iterator[str]:
    """A line for each training example, the most suspicious first: where it is, its signals, its text."""
    places = origins(read, train.names) if train.preparation.unit == "documents" else []
    for rank, position in enumerate(found.ranking.tolist(), start=1):
        passage, (file, line) = passages[position], places[position] if places else ("", None)
        signals = {name: float(values[position]) for name, values in found.signals.items()}
        described = {"title": passage.title, "label": passage.label, "text": passage.text}
        facts = {"rank": rank, "train": position, "file": file or None, "line": line, **signals, **described}
        yield json.dumps(facts, ensure_ascii=False) + "\n"


def _table(found: Audit, passages: DatasetPassages, ranking: list[int]) -> Table:
    """The first of the queue, with their signals, labels and the beginnings of their texts."""
    signals = (name.replace("_", "\n").capitalize() for name in found.signals)
    table = Table(*figures("Rank", "Train", *signals), Column("Training example", overflow="fold"))
    for rank, train in enumerate(ranking, start=1):
        values = (f"{float(each[train]):.3g}" for each in found.signals.values())
        passage = passages[train]
        text = excerpt(passage.text, 120, passage.answer_start)
        label = f"({passage.label}) " * bool(passage.label)
        table.add_row(str(rank), str(train), *values, Text(printable(label + text)))
    return table
