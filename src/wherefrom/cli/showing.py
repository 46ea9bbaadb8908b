"""The subcommands `wherefrom top`, `report` and `export`: scores beside the texts that they are of, or as a file.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from wherefrom.cli.shared import Run
from wherefrom.jobs.sources import RunSources, chosen_scores, token_scores_of
from wherefrom.report.figures import load_figures
from wherefrom.report.html import render_report, write_page
from wherefrom.report.passages import DatasetTokens
from wherefrom.report.text import top_tables
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.results import load_scores
from wherefrom.store.files import within
from wherefrom.store.locks import run_lock

console = Console()


def top(
    run: Run, *, name: str | None = None, k: int = 5, query: tuple[int, ...] = (), trust_remote_code: bool = False
) -> None:
    """Show the most influential training sequences of queries.

    Args:
        run: A run directory with scores.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        k: Sequences for each query.
        query: Which queries; the first three by default.
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    folder = chosen_scores(run, name)
    scores = load_scores(folder)
    count = len(scores.values)
    if not all(0 <= each < count for each in query):
        raise InputError(f"query={list(query)}: the scores have queries 0 to {count - 1}.")
    queries, train, _ = RunSources.of_result(folder, trust_remote_code).passages(scores.fingerprint)
    shown = query or range(min(3, count))
    k = min(k, scores.values.shape[1])  # no more are stored
    console.print(top_tables(scores, queries, train, shown=shown, k=k))


def report(
    run: Run, *, name: str | None = None, k: int = 10, output: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Write a self-contained HTML page of the most influential training sequences.

    Args:
        run: A run directory with scores.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        k: Sequences of each sign for each query.
        output: The page; RUN/reports/NAME.html by default.
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    folder = chosen_scores(run, name)
    scores = load_scores(folder)
    sources = RunSources.of_result(folder, trust_remote_code)
    queries, train, tokenizer = sources.passages(scores.fingerprint)
    tokens = token_scores_of(folder, scores)
    page = render_report(
        title=f"Where from? {run.name}",
        queries=queries,
        train=train,
        scores=scores,
        settings=sources.described(),
        tokens=None if tokens is None or tokenizer is None else DatasetTokens(tokens, train.dataset, tokenizer),
        figures=load_figures(run, scores.fingerprint),
        k=k,
    )
    output = output or within(run, "reports", f"{folder.name}.html")
    with run_lock(run):
        write_page(output, page)
    console.print(f"The report is {output}", soft_wrap=True)


def export(run: Run, output: Path, *, name: str | None = None, k: int | None = None) -> None:
    """Write scores for other programs: a table (.csv, .parquet) or all tensors (.safetensors).

    Args:
        run: A run directory with scores.
        output: The file; its ending says what it is. A table has the columns query, rank, train and score.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        k: Only the highest of each query; all that were stored by default.
    """
    scores = load_scores(chosen_scores(run, name))
    scores.save(output, k)
    console.print(f"The scores {scores.name} are in {output}", soft_wrap=True)
