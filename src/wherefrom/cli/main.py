"""The command: `wherefrom fit`, `score`, `top` and `report` on a Hugging Face model and text, and other modules' own.

What `fit` and `score` were given is written into the run directory, so that the later commands need only the run. All
work is the library's; this module turns arguments into its calls, and its errors into one line and an exit status.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from wherefrom.cli.index import index, query
from wherefrom.cli.plan import PlanArguments, plan
from wherefrom.cli.shared import Run, StrategyName, command_line
from wherefrom.cli.sources import SOURCES, RunSources, TextSource, checked_run, chosen_scores, log_other_scores
from wherefrom.curvature.solvers import SOLVERS
from wherefrom.report.figures import load_figures
from wherefrom.report.html import render_report, write_page
from wherefrom.report.passages import DatasetPassages, DatasetTokens
from wherefrom.report.text import hits_table, top_tables
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError
from wherefrom.runtime.progress import show_log
from wherefrom.scoring.options import Aggregation, Options, PairwiseOptions, RescoredOptions, ScoreOptions
from wherefrom.scoring.results import Scores, TopScores, load_scores
from wherefrom.scoring.tokens import INDEX, TokenScores
from wherefrom.store.locks import run_lock
from wherefrom.study import Study

app = tyro.extras.SubcommandApp()
app.command(plan)
app.command(index)
app.command(query)
console = Console()


@app.command
def fit(
    run: Run,
    *,
    model: str,
    train: str,
    strategy: StrategyName = "ekfac",
    layers: tuple[str, ...] = (),
    split: str = "train",
    column: str | None = None,
    unit: Literal["documents", "blocks"] = "documents",
    length: int = 512,
    empirical: bool = False,
    half_precision: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    memory_budget: float | None = None,
    overwrite: bool = False,
    profile: bool = False,
) -> None:
    """Fit curvature factors of a model on its training text.

    Args:
        run: The directory that keeps factors, scores and reports.
        model: A model directory or hub name.
        train: The training text: a .txt, .jsonl, .csv or .parquet file, a saved dataset or a hub name.
        strategy: The curvature.
        layers: Names or patterns of the layers to track, such as '*.mlp.*'; linear ones but the head by default.
        split: The split of a saved or hub dataset.
        column: The column that holds the text; found when there is only one.
        unit: One sequence a document, or all text joined and cut into blocks.
        length: The longest sequence (documents), or the length of each (blocks), in tokens.
        empirical: Use the text's own tokens instead of tokens drawn from the model.
        half_precision: bfloat16 products in the model's passes; factors stay float32.
        batch_size: Sequences a batch; found by default.
        seed: Of the drawn tokens.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        memory_budget: GiB to take on the device beyond the model and its factors; most of what is free by default.
        overwrite: Replace factors that were made from something else.
        profile: Print where the time went, and for that wait for a GPU after each action.
    """
    if (checked_run(run) / SOURCES).exists():
        RunSources.load(run)  # or hours later it turns out that it cannot be read
    text = TextSource(train, split, column, unit, length)
    sources = RunSources(model, list(layers) or None, text, empirical, seed)
    study, _ = sources.study(run, device, memory_budget)
    study.profile.synchronize = profile
    log_other_scores(study)
    study.fit(
        strategy,
        empirical=empirical,
        half_precision=half_precision,
        batch_size=batch_size,
        seed=seed,
        overwrite=overwrite,
    )
    Ranks.current().first(lambda: sources.save(run))
    _say(f"{strategy} factors of {len(study.train):,} sequences are in {run / 'factors'}.", study, profile)


@app.command
def score(
    run: Run,
    *,
    queries: str,
    strategy: StrategyName = "ekfac",
    name: str | None = None,
    split: str = "validation",
    column: str | None = None,
    damping: float | None = None,
    half_precision: bool = False,
    query_rank: int | None = None,
    query_bits: int | None = None,
    solver: Literal["cg", "astra"] | None = None,
    rescore: int = 0,
    tokens: int | None = None,
    per_layer: bool = False,
    self_influence: bool = False,
    aggregate_queries: Aggregation | None = None,
    aggregate_train: Aggregation | None = None,
    top_only: int | None = None,
    query_batch_size: int | None = None,
    train_batch_size: int | None = None,
    device: str = "auto",
    memory_budget: float | None = None,
    explain: bool = False,
    overwrite: bool = False,
    profile: bool = False,
) -> None:
    """Score every training sequence for every query.

    Args:
        run: A run directory that `wherefrom fit` made.
        queries: The query text: a file, a saved dataset or a hub name, cut as the training text was.
        strategy: The curvature; fitted first if the run does not have it yet.
        name: Of the scores in the run; by default the strategy, what else was asked for, and a digest of all that
            they depend on, so that other queries or another damping lie side by side.
        split: The split of a saved or hub dataset.
        column: The column that holds the text; found when there is only one.
        damping: Added to every eigenvalue; 0.1 x the mean eigenvalue of each layer by default.
        half_precision: bfloat16 products in the model's passes, query gradients in bfloat16.
        query_rank: Keep query gradients as pairs of matrices of this rank, so that more fit into memory.
        query_bits: 8 keeps query gradients as integers of that size, with scales.
        solver: Go on from the curvature's approximation to the damped Gauss-Newton matrix itself; slow.
        rescore: With a query rank or query bits, compute this many of each query's highest scores again, with whole
            gradients of the products' type.
        tokens: Also score the tokens of this many most positive and most negative sequences of each query; the report
            shades them.
        per_layer: Also keep each layer's part of every score.
        self_influence: Also keep each training sequence's score with itself, for normalised scores.
        aggregate_queries: One score for all queries together: of the sum or the mean of their losses.
        aggregate_train: One score of each query for all training sequences together.
        top_only: Keep only this many of each query's highest and lowest scores, for very many training sequences.
        query_batch_size: Queries a batch; found by default.
        train_batch_size: Training sequences a batch; found by default.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        memory_budget: GiB to take on the device beyond the model and its factors; most of what is free by default.
        explain: Print what would be done, and what it would cost with the fit, and stop.
        overwrite: Replace scores that were made from something else.
        profile: Print where the time went, and for that wait for a GPU after each action.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens={tokens}: expected at least 1 sequence of each sign.")
    if tokens is not None and (top_only or aggregate_queries or aggregate_train):
        raise InputError(
            f"tokens={tokens} needs every pair's score, which top_only, aggregate_queries and aggregate_train do not "
            "keep: leave one of them out."
        )
    common: ScoreOptions = {
        "damping": damping,
        "half_precision": half_precision,
        "query_rank": query_rank,
        "query_bits": query_bits,
        "solver": SOLVERS[solver]() if solver else None,
        "query_batch_size": query_batch_size,
        "train_batch_size": train_batch_size,
        "name": name,
        "overwrite": overwrite,
    }
    pairwise: PairwiseOptions = {
        **common,
        "rescore": rescore,
        "per_layer": per_layer,
        "self_influence": self_influence,
        "aggregate_queries": aggregate_queries,
        "aggregate_train": aggregate_train,
    }
    Options(**pairwise, top=top_only)  # or the model would be loaded first
    sources = RunSources.load(run)
    study, tokenizer = sources.study(run, device, memory_budget)
    study.profile.synchronize = profile
    text = replace(sources.train, source=queries, split=split, column=column)
    sequences = text.sequences(tokenizer)
    if explain:
        plan = study.plan(sequences, strategy, **common)
        if Ranks.current().writes:
            console.print(plan.table())
        return
    factors = study.fit(strategy, empirical=sources.empirical, half_precision=half_precision, seed=sources.seed)
    found: Scores | TopScores
    if top_only is None:
        found = study.score(sequences, factors, **pairwise)
        shape = "{:,} queries x {:,} training sequences".format(*found.values.shape)
    else:
        found = study.score_top(sequences, factors, top_only, **common)
        shape = f"{len(found.values):,} queries, the {found.values.shape[1]} highest and lowest each,"
    Ranks.current().first(lambda: replace(sources, queries=text).save(run, found.name))
    if tokens is not None:
        of_pairs: RescoredOptions = {**common, "rescore": rescore, "name": found.name}
        study.score_tokens(sequences, factors, top=tokens, **of_pairs)
    _say(f"Scores of {shape} are in {run / 'scores' / found.name}.", study, profile)


@app.command
def self_influence(
    run: Run,
    *,
    strategy: StrategyName = "ekfac",
    damping: float | None = None,
    half_precision: bool = False,
    batch_size: int | None = None,
    k: int = 10,
    device: str = "auto",
    memory_budget: float | None = None,
    overwrite: bool = False,
) -> None:
    """Show the training sequences that the model could only learn by heart: those of the highest self-influence.

    Args:
        run: A run directory that `wherefrom fit` made.
        strategy: The curvature; fitted first if the run does not have it yet.
        damping: Added to every eigenvalue; 0.1 x the mean eigenvalue of each layer by default.
        half_precision: bfloat16 products in the model's passes.
        batch_size: Sequences a batch; found by default.
        k: How many sequences are shown.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        memory_budget: GiB to take on the device beyond the model and its factors; most of what is free by default.
        overwrite: Replace what was made from something else.
    """
    sources = RunSources.load(run)
    study, _ = sources.study(run, device, memory_budget)
    factors = study.fit(strategy, empirical=sources.empirical, half_precision=half_precision, seed=sources.seed)
    values = study.self_influence(
        factors, damping=damping, half_precision=half_precision, batch_size=batch_size, overwrite=overwrite
    )
    hits = Scores(values.unsqueeze(0), {}).top(k)
    if Ranks.current().writes:
        console.print(hits_table("Highest self-influence", hits, DatasetPassages(study.train)))


@app.command
def top(run: Run, *, name: str | None = None, k: int = 5, query: tuple[int, ...] = ()) -> None:
    """Show the most influential training sequences of queries.

    Args:
        run: A run directory with scores.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        k: Sequences for each query.
        query: Which queries; the first three by default.
    """
    folder = chosen_scores(run, name)
    scores = load_scores(folder)
    count = len(scores.values)
    if not all(0 <= each < count for each in query):
        raise InputError(f"query={list(query)}: the scores have queries 0 to {count - 1}.")
    queries, train, _ = RunSources.of_result(folder).passages(scores.fingerprint)
    shown = query or range(min(3, count))
    k = min(k, scores.values.shape[1])  # no more were kept
    console.print(top_tables(scores, queries, train, shown=shown, k=k))


@app.command
def report(run: Run, *, name: str | None = None, k: int = 10, output: Path | None = None) -> None:
    """Write a self-contained HTML page of the most influential training sequences.

    Args:
        run: A run directory with scores.
        name: Of the scores, or what it begins with before the digest; by default the latest.
        k: Sequences of each sign for each query.
        output: The page; RUN/reports/NAME.html by default.
    """
    folder = chosen_scores(run, name)
    scores = load_scores(folder)
    sources = RunSources.of_result(folder)
    queries, train, tokenizer = sources.passages(scores.fingerprint)
    tokens = _token_scores(folder, scores)
    page = render_report(
        title=f"Where from? {run.name}",
        queries=queries,
        train=train,
        scores=scores,
        settings=sources.described(),
        tokens=None if tokens is None else DatasetTokens(tokens, train.dataset, tokenizer),
        figures=load_figures(run, scores.fingerprint),
        k=k,
    )
    output = output or run / "reports" / f"{folder.name}.html"
    with run_lock(run):
        write_page(output, page)
    console.print(f"The report is {output}", soft_wrap=True)


def main() -> None:
    """Run the command; exit statuses are those of `commands`."""
    show_log()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts and names that the terminal has no letters for
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries that load models and data
    with command_line(_flags(sys.argv[1] if len(sys.argv) > 1 else "")):
        app.cli(
            prog="wherefrom",
            description="Which training examples made the model say that?",
            config=(tyro.conf.FlagCreatePairsOff,),
        )


# What the library calls an argument where a command has another word for it.
_OTHER_WORDS = {
    "fit": {"source": "train", "max_length": "length", "block_size": "length"},
    "score": {"source": "queries", "k": "top_only", "top": "tokens"},
    "query": {"source": "queries"},
}


def _flags(command: str) -> dict[str, str]:
    """The flags of all commands by the library's names for them, in the words of one command."""
    commands = (fit, score, self_influence, top, report, index, query, PlanArguments)
    names = {name for each in commands for name in inspect.signature(each).parameters if name != "run"}
    return {**{name: name for name in names}, **_OTHER_WORDS.get(command, {})}


def _token_scores(folder: Path, scores: Scores | TopScores) -> TokenScores | None:
    """Token scores that belong to these scores, of the most pairs, if there are any."""
    found = [TokenScores.load(index.parent) for index in folder.parent.glob(f"{folder.name}.*.tokens/{INDEX}")]
    return max(
        (each for each in found if not each.differences(scores.fingerprint)),
        key=lambda each: len(each.pairs),
        default=None,
    )


def _say(message: str, study: Study[dict[str, torch.Tensor]], profile: bool) -> None:
    if not Ranks.current().writes:
        return
    if profile:
        console.print(*study.profile.tables())
    console.print(message, soft_wrap=True)
