"""Fit factors, score every (query, training sequence) pair, and show the most influential training sequences.

    python analyze.py --query_batch_size 32 --train_batch_size 64 --checkpoint_dir ./checkpoints --factor_strategy ekfac

Run it after `train.py`, whose checkpoint says which model and which data.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from common import Common, Example, StrategyName, command, console, run
from datasets import Dataset
from models import QUERIES

import wherefrom as wf
from wherefrom.evaluate.agreement import label_agreement
from wherefrom.report.figures import load_figures
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.text import top_tables

SHOWN = 10  # sequences of each sign that the page shows for a query


@dataclass
class Arguments(Common):
    """Where the predictions of a fine-tuned language model come from."""

    factor_strategy: StrategyName = "ekfac"
    use_half_precision: bool = False
    """bfloat16 products in the model's passes, query gradients in bfloat16."""
    query_gradient_rank: int | None = None
    """Keep query gradients as pairs of matrices of this rank, so that more of them fit into memory."""
    compute_per_token_score: bool = False
    """Also score the tokens of the sequences that the page shows, and shade them there."""
    report: Path | None = None
    """The HTML page; RUN_DIR/reports/SCORES.html by default."""
    profile: bool = False
    """Print where the time went."""
    explain: bool = False
    """Print what would be done and what it would cost, and stop."""


def main(arguments: Arguments) -> None:
    """Fit, score, print, and write the page."""
    example = Example(arguments)
    half = arguments.use_half_precision
    method = example.method(arguments.factor_strategy, arguments.query_gradient_rank)
    if arguments.explain:
        console.print(example.study.plan(example.queries, method, execution=example.execution(half)).table())
        return
    example.study.profile.synchronize = arguments.profile
    scores = example.scores(method, half)
    tokens = example.token_scores(method, half, SHOWN) if arguments.compute_per_token_score else None
    queries, train = example.queries, example.train
    console.print(
        top_tables(scores, DatasetPassages(queries), DatasetPassages(train), shown=range(min(3, len(queries))))
    )
    summary = f"{len(queries):,} queries x {len(train):,} training sequences, {arguments.factor_strategy}. "
    summary += topic_agreement(scores, queries, train)
    console.print(summary)
    page = example.study.report(
        scores,
        queries,
        tokenizer=example.tokenizer,
        tokens=tokens,
        figures=load_figures(arguments.run_dir, scores.fingerprint),
        path=arguments.report,
        summary=summary,
        k=SHOWN,
    )
    if arguments.profile:
        console.print(*example.study.profile.tables())
    console.print(f"Precision: {scores.fingerprint['precision']}")
    wf.record_sources(example.study, scores, arguments.checkpoint_dir / QUERIES, method=method)
    console.print(f"The report is {page}", soft_wrap=True, highlight=False)
    ask = f"{command()} serve {shlex.quote(str(arguments.run_dir))}"
    console.print(f"Ask where an answer comes from: {ask}", soft_wrap=True, highlight=False)


def topic_agreement(scores: wf.Scores, queries: Dataset, train: Dataset) -> str:
    """How often top sequences share their query's topic, where the texts have topics."""
    if "label" not in queries.column_names:
        return ""
    return f"{label_agreement(scores, queries['label'], train['label'])}."


if __name__ == "__main__":
    run(main, Arguments)
