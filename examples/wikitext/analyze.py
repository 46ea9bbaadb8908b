"""Fit factors, score every (query, training sequence) pair, and show the most influential training sequences.

    python analyze.py --query_batch_size 32 --train_batch_size 64 --checkpoint_dir ./checkpoints --factor_strategy ekfac

Run it after `train.py`, whose checkpoint says which model and which data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from datasets import Dataset
from models import load_example
from rich.console import Console

import wherefrom as wf
from wherefrom.evaluate.labels import label_agreement
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.text import top_tables

console = Console()


@dataclass
class Arguments:
    """Where the predictions of a fine-tuned language model come from."""

    checkpoint_dir: Path = Path("checkpoints")
    """What train.py wrote."""
    run_dir: Path = Path("runs/wikitext")
    """Keeps factors, scores and the report; what is there already is reused."""
    factor_strategy: Literal["identity", "diagonal", "kfac", "ekfac"] = "ekfac"
    query_batch_size: int = 32
    train_batch_size: int = 64
    damping: float | None = None
    """Added to every eigenvalue; None is 0.1 x the mean eigenvalue of each layer."""
    report: Path | None = None
    """The HTML page; RUN_DIR/reports/STRATEGY.html by default."""
    overwrite: bool = False
    """Replace factors and scores that were made from something else."""
    profile: bool = False
    """Print where the time went."""


def main(arguments: Arguments) -> None:
    """Fit, score, print, and write the page."""
    model, tokenizer, train, queries = load_example(arguments.checkpoint_dir)
    study = wf.Study(arguments.run_dir, model, wf.CausalLM(), train=train)
    factors = study.fit(arguments.factor_strategy, batch_size=arguments.train_batch_size, overwrite=arguments.overwrite)
    scores = study.score(
        queries,
        factors,
        damping=arguments.damping,
        query_batch_size=arguments.query_batch_size,
        train_batch_size=arguments.train_batch_size,
        overwrite=arguments.overwrite,
    )
    console.print(
        top_tables(scores, DatasetPassages(queries), DatasetPassages(train), shown=range(min(3, len(queries))))
    )
    summary = f"{len(queries):,} queries x {len(train):,} training sequences, {arguments.factor_strategy}. "
    summary += topic_agreement(scores, queries, train)
    console.print(summary)
    page = study.report(scores, queries, tokenizer=tokenizer, path=arguments.report, summary=summary)
    if arguments.profile:
        console.print(*study.profile.tables())
    console.print(f"The report is {page}", soft_wrap=True)


def topic_agreement(scores: wf.Scores, queries: Dataset, train: Dataset) -> str:
    """How often top sequences share their query's topic, where the texts have topics."""
    if "label" not in queries.column_names:
        return ""
    return f"{label_agreement(scores, queries['label'], train['label'])}."


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)))
    except wf.WherefromError as error:
        sys.exit(f"error: {error}")
