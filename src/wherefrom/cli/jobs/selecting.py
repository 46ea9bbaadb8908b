"""The subcommand `wherefrom select`: the training examples that help a target set most, as a file.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import tyro
from rich.console import Console

from wherefrom.cli.methods import EXECUTED, READ, default
from wherefrom.cli.scoring import SCORED
from wherefrom.cli.shared import Run
from wherefrom.jobs.filtering import check_filtered, filtered_together
from wherefrom.jobs.selecting import Normalized
from wherefrom.jobs.selecting import select as selected
from wherefrom.jobs.sources import RunSources
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.reading import reading as reading_of
from wherefrom.report.text import hits_table
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import check_argument, printable
from wherefrom.scoring.results import Hit, Scores
from wherefrom.store.files import write_bytes

console = Console()

_SHOWN = 10


def select(
    run: Run,
    *,
    targets: str,
    n: int,
    out: Path,
    method: tyro.conf.OmitArgPrefixes[SCORED] = default(SCORED),  # noqa: B008  (a frozen value)
    normalized: Normalized = "none",
    balance: str | None = None,
    overlap: float = 0.5,
    split: str = "validation",
    reading: tyro.conf.OmitArgPrefixes[READ] = READ(),  # noqa: B008
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the training examples that help a target set most to a file, and show the first of them.

    Args:
        run: A run directory that `wherefrom fit` made.
        targets: Examples of what the model is to do well, a file, a saved dataset or a hub name.
        n: How many are chosen.
        out: The file, in the format and the order that the training examples came in.
        method: Whose scores are summed over the targets; those of EK-FAC unless one is named.
        normalized: What scores are divided by before they are summed: 'none', nothing; 'targets', each target's root
            mean square; 'examples', the root of each training example's self-influence.
        balance: A column of the training examples, such as 'source', whose values get equal shares.
        overlap: An example is a copy where this part of its runs of five words stands in better ones.
        split: The split of a saved or hub dataset of targets.
        reading: How targets are read.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        overwrite: Replace a file that is there.
    """
    Ranks.current().check_alone("select")
    executed, sources = execution.made(), RunSources.load(run, trust_remote_code)
    check_argument(n >= 1, "n", n, "at least 1")
    check_filtered("out", out, sources.train, overwrite)
    chosen = method.made(sources.fitted)
    study = sources.study(run, device, executed)
    groups = None if balance is None else study.pretrained.column(balance, "balance")
    queries = study.prepare(targets, split, sources.queries_from(targets, split, reading.made()).preparation)
    found = selected(study, queries, n, chosen, normalized=normalized, balance=groups, overlap=overlap)
    written = filtered_together(sources.train.read(), sources.train.names, set(found.chosen.tolist()))
    write_bytes(out, written)
    best = found.chosen[:_SHOWN].tolist()
    hits = [Hit(0, rank, train, float(found.values[train])) for rank, train in enumerate(best, start=1)]
    read = reading_of(Scores(found.values.unsqueeze(0), {"method": chosen.name}))
    console.print(hits_table(None, hits, DatasetPassages(study.train, study.tokenizer), read))
    if found.groups is not None:
        counts = Counter(found.groups[each] for each in found.chosen.tolist())
        shares = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
        console.print(printable(f"By {balance}: {shares}"), soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"Written: {out}, {n:,} of {len(study.train):,} examples", soft_wrap=True, highlight=False, markup=False
    )
