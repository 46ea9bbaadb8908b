"""The subcommands `wherefrom index` and `wherefrom query`: compress a training set once, query it again and again.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

from typing import Any

import tyro
from rich.console import Console

from wherefrom.cli.methods import EXECUTED, FACTORED, READ, default, flags, subcommands
from wherefrom.cli.shared import Run
from wherefrom.jobs.sources import RunSources
from wherefrom.methods.projected.projections import Compression
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.text import top_tables
from wherefrom.runtime.distributed import Ranks

console = Console()

INDEXED: Any = subcommands(FACTORED, only=("empirical",), of_the_fit=True)
COMPRESSED: Any = flags(Compression)


def index(
    run: Run,
    compression: tyro.conf.OmitArgPrefixes[COMPRESSED] = COMPRESSED(),  # noqa: B008  (a frozen value)
    *,
    method: tyro.conf.OmitArgPrefixes[INDEXED] = default(INDEXED),  # noqa: B008
    name: str | None = None,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Store the compressed gradient of every training sequence, for `wherefrom query`.

    Args:
        run: A run directory that `wherefrom fit` made.
        compression: How gradients are compressed.
        method: Whose scores answers approximate; those of EK-FAC unless one is named.
        name: Of the index in the run; by default directions, rank and quantization.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        overwrite: Replace an index that was made from something else.
    """
    compressed, executed = compression.made(), execution.made()
    sources = RunSources.load(run, trust_remote_code)
    chosen = method.made({"empirical": sources.empirical, "seed": sources.seed})
    study = sources.study(run, device, executed)
    found = study.index(chosen, compressed, name=name, overwrite=overwrite)
    if Ranks.current().is_main:
        size = len(found) * found.bytes_per_example / 2**20
        console.print(f"{len(found):,} gradients, {size:,.2f} MiB, are in {found.path}.", soft_wrap=True)


def query(
    run: Run,
    compression: tyro.conf.OmitArgPrefixes[COMPRESSED] = COMPRESSED(),  # noqa: B008
    *,
    queries: str,
    method: tyro.conf.OmitArgPrefixes[INDEXED] = default(INDEXED),  # noqa: B008
    name: str | None = None,
    k: int = 5,
    rerank: int = 0,
    damping: float | None = None,
    split: str = "validation",
    reading: tyro.conf.OmitArgPrefixes[READ] = READ(),  # noqa: B008
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Show the most influential training sequences of new queries, from an index.

    Args:
        run: A run directory with an index; what of it is missing is made first.
        compression: How gradients are compressed, as for `wherefrom index`.
        queries: The queries: a file, a saved dataset or a hub name, cut as the training examples were.
        method: Whose scores answers approximate; those of EK-FAC unless one is named.
        name: Of the index in the run; by default directions, rank and quantization.
        k: Sequences for each query.
        rerank: Score this many of each query's highest and lowest again with whole gradients.
        damping: Added to every eigenvalue; 0.1 x the mean eigenvalue of each layer by default.
        split: The split of a saved or hub dataset.
        reading: How queries are read.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    compressed, executed = compression.made(), execution.made()
    sources = RunSources.load(run, trust_remote_code)
    chosen = method.made({"empirical": sources.empirical, "seed": sources.seed})
    study = sources.study(run, device, executed)
    source = sources.queries_from(queries, split, reading.made())
    sequences = study.prepare(queries, split, source.preparation)
    scores = study.index(chosen, compressed, name=name).query(sequences, k, damping=damping, rerank=rerank)
    shown = range(len(sequences))
    console.print(top_tables(scores, DatasetPassages(sequences), DatasetPassages(study.train), shown=shown, k=k))
