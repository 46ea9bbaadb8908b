"""Compare scores in half precision with those in full precision, query by query: two correlations, two plots.

    python half_precision_analysis.py

Run it after `train.py`; factors and scores that `analyze.py` left in the run directory are reused.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import Common, Example, StrategyName, console, run

from wherefrom.evaluate.agreement import compare_scores
from wherefrom.evaluate.plots import correlation_histogram, png, scatter
from wherefrom.report.figures import Figure, save_evaluation
from wherefrom.runtime.errors import InputError


@dataclass
class Arguments(Common):
    """How much of the scores half precision keeps."""

    factor_strategy: StrategyName = "ekfac"
    query: int = 0
    """The query of the scatter plot."""


def main(arguments: Arguments) -> None:
    """Score twice, correlate, plot."""
    example = Example(arguments)
    strategy, query = arguments.factor_strategy, arguments.query
    if not 0 <= query < len(example.queries):
        raise InputError(f"query={query}: expected a query from 0 to {len(example.queries) - 1}.")
    full, half = (example.scores(example.method(strategy), half) for half in (False, True))
    agreement = compare_scores(full, half)
    for name, found in (("Spearman", agreement.spearman), ("Pearson", agreement.pearson)):
        console.print(
            f"{name}: mean {found.mean.value:.5f} [{found.mean.low:.5f}, {found.mean.high:.5f}], median "
            f"{found.median:.5f}, lowest {found.minimum:.5f} (query {found.worst})",
            highlight=False,
        )
    console.print(half.fingerprint["precision"])
    results = {
        "strategy": strategy,
        "damping": half.fingerprint["damping"],
        "precision": half.fingerprint["precision"],
        **agreement.to_json(),
    }
    caption = "Mean Spearman correlation of a query's scores in half and full precision: "
    caption += f"{agreement.spearman.mean} over {len(full.values):,} queries."
    plots = {
        "half-precision-correlations": correlation_histogram(agreement),
        "half-precision-scatter": scatter(
            full.values[query], half.values[query], ("full precision", "half precision"), f"Query {query}"
        ),
    }
    for name, plot in plots.items():
        figure = Figure("Scores in half precision", caption, png(plot))
        file = save_evaluation(arguments.run_dir, name, figure, results, full.fingerprint)
        console.print(f"Plot and numbers: {file}", soft_wrap=True)


if __name__ == "__main__":
    run(main, Arguments)
