"""The subcommands `wherefrom index` and `wherefrom query`: sketch a training set once, query it again and again.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

from typing import Any

import tyro
from rich.console import Console

from wherefrom.cli.methods import EXECUTED, FACTORED, READ, default, flags, subcommands
from wherefrom.cli.shared import Run
from wherefrom.jobs.sources import RunSources
from wherefrom.methods.index.sketches import Sketch
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.text import top_tables
from wherefrom.runtime.distributed import Ranks

console = Console()

INDEXED: Any = subcommands(FACTORED, only=("empirical", "damping"), of_the_fit=True)
SKETCHED: Any = flags(Sketch)


def index(
    run: Run,
    sketch: tyro.conf.OmitArgPrefixes[SKETCHED] = SKETCHED(),  # noqa: B008  (a frozen value)
    *,
    method: tyro.conf.OmitArgPrefixes[INDEXED] = default(INDEXED),  # noqa: B008
    name: str | None = None,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> None:
    """Store a sketch of every training sequence's gradient, for `wherefrom query`.

    Args:
        run: A run directory that `wherefrom fit` made.
        sketch: How gradients are sketched.
        method: Whose scores answers approximate; those of EK-FAC unless one is named.
        name: Of the index in the run; by default the method, the sketch and a digest.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
        overwrite: Replace an index that was made from something else.
    """
    sketched, executed = sketch.made(), execution.made()
    sources = RunSources.load(run, trust_remote_code)
    chosen = method.made(sources.fitted)
    study = sources.study(run, device, executed)
    found = study.index(chosen, sketched, name=name, overwrite=overwrite)
    if Ranks.current().is_main:
        size = len(found) * found.bytes_per_example / 2**20
        console.print(f"{len(found):,} gradients, {size:,.2f} MiB, are in {found.path}.", soft_wrap=True)


def query(
    run: Run,
    sketch: tyro.conf.OmitArgPrefixes[SKETCHED] = SKETCHED(),  # noqa: B008
    *,
    queries: str,
    method: tyro.conf.OmitArgPrefixes[INDEXED] = default(INDEXED),  # noqa: B008
    name: str | None = None,
    k: int = 5,
    rerank: int = 0,
    normalized: bool = False,
    split: str = "validation",
    reading: tyro.conf.OmitArgPrefixes[READ] = READ(),  # noqa: B008
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Show the most influential training sequences of new queries, or chunks of these, from an index.

    Args:
        run: A run directory with an index; what of it is missing is made first.
        sketch: How gradients are sketched, as for `wherefrom index`.
        queries: The queries: a file, a saved dataset or a hub name, cut as the training examples were.
        method: Whose scores answers approximate; those of EK-FAC unless one is named.
        name: Of the index in the run; by default the method, the sketch and a digest.
        k: Sequences or chunks for each query.
        rerank: Score this many of each query's highest and lowest again with whole gradients.
        normalized: Divide scores by the norms of both whitened gradients: cosines.
        split: The split of a saved or hub dataset.
        reading: How queries are read.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    sketched, executed = sketch.made(), execution.made()
    sources = RunSources.load(run, trust_remote_code)
    chosen = method.made(sources.fitted)
    study = sources.study(run, device, executed)
    source = sources.queries_from(queries, split, reading.made())
    sequences = study.prepare(queries, split, source.preparation)
    found = study.index(chosen, sketched, name=name)
    search = found.query if sketched.chunk is None else found.query_chunks
    scores = search(sequences, k, rerank=rerank, normalized=normalized)
    train = DatasetPassages(study.train, study.pretrained.tokenizer)
    console.print(top_tables(scores, DatasetPassages(sequences), train, shown=range(len(sequences)), k=k))
