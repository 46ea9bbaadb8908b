"""Show which tokens of the top training sequences make their scores, as heat maps in the terminal and on the page.

    python tokenwise_analysis.py

Run it after `train.py`; factors and scores that `analyze.py` left in the run directory are reused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common import Common, Example, StrategyName, console, run

from wherefrom.report.figures import load_figures
from wherefrom.report.passages import DatasetPassages, DatasetTokens
from wherefrom.report.text import token_tables


@dataclass
class Arguments(Common):
    """Which tokens of training sequences the predictions come from."""

    factor_strategy: StrategyName = "ekfac"
    use_half_precision: bool = False
    top: int = 10
    """How many sequences of each sign, for each query, have their tokens scored."""
    num_queries: int = 3
    """How many queries are shown in the terminal."""
    report: Path | None = None
    """The HTML page; RUN_DIR/reports/SCORES-tokens.html by default."""


def main(arguments: Arguments) -> None:
    """Score tokens, print heat maps, write the page."""
    example = Example(arguments)
    method, half = example.method(arguments.factor_strategy), arguments.use_half_precision
    scores = example.scores(method, half)
    tokens = example.token_scores(method, half, arguments.top)
    console.print(
        token_tables(
            scores,
            DatasetTokens(tokens, example.train, example.tokenizer),
            DatasetPassages(example.queries),
            DatasetPassages(example.train),
            shown=range(min(arguments.num_queries, len(example.queries))),
            k=min(3, arguments.top),
        )
    )
    page = example.study.report(
        scores,
        example.queries,
        tokenizer=example.tokenizer,
        tokens=tokens,
        figures=load_figures(arguments.run_dir, scores.fingerprint),
        path=arguments.report or arguments.run_dir / "reports" / f"{scores.name}-tokens.html",
        summary=f"Tokens shaded by their share of the score, {arguments.factor_strategy}.",
        k=arguments.top,
    )
    console.print(f"The report is {page}", soft_wrap=True)


if __name__ == "__main__":
    run(main, Arguments)
