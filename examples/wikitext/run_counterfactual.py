"""Remove the training sequences that a method holds responsible for the queries, fine-tune again, measure perplexity.

    python run_counterfactual.py

Run it after `train.py`; factors and scores that `analyze.py` left in the run directory are reused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common import Example, console, run
from models import load_recipe
from retraining import Finetuning, Retrained
from rich.table import Table
from training import predicted_tokens

from wherefrom.evaluate.plots import png, removal_curves
from wherefrom.evaluate.removal import evaluate_removal
from wherefrom.methods.baselines import bm25_scores
from wherefrom.report.figures import Figure, save_evaluation

WIKITEXT_SEQUENCES = 4656  # the training set of which the published experiment removes 0, 50, 100, 150 and 200


@dataclass
class Arguments(Retrained):
    """What removing top training sequences does to the queries."""

    removals: tuple[int, ...] = (0, 50, 100, 150, 200)
    """Sequences to remove of WikiText-2's 4,656; as large a part of another training set."""
    num_queries: int = 50
    """The first queries: their scores are added up, and their perplexity is measured."""
    num_repeats: int = 3
    """Seeds that the model is fine-tuned with after each removal."""


def main(arguments: Arguments) -> None:
    """Score, remove, retrain, plot."""
    example = Example(arguments)
    queries, train = example.queries, example.train
    counts = sorted({round(count * len(train) / WIKITEXT_SEQUENCES) for count in arguments.removals})
    chosen = range(min(arguments.num_queries, len(queries)))
    scores = {strategy: example.scores(example.method(strategy)) for strategy in ("ekfac", "identity")}
    training = Finetuning(load_recipe(arguments.checkpoint_dir), arguments.cache_dir)
    removal = evaluate_removal(
        arguments.run_dir / "retrainings",
        training,
        {**scores, "bm25": bm25_scores(queries["text"], train["text"]), "random": None},
        counts,
        range(arguments.num_repeats),
        queries=chosen,
        fingerprint=training.fingerprint(),
        workers=arguments.num_workers,
        overwrite=arguments.overwrite_retrainings,
    )
    tokens = predicted_tokens(queries.select(chosen))
    curves = removal.summary(lambda losses: math.exp(float(losses.sum()) / tokens))
    table = Table("Removed", *curves, title="Query perplexity: mean ± standard deviation over seeds")
    for row, count in enumerate(counts):
        cells = (
            f"{each[row].mean():.2f} ± {each[row].std(ddof=min(1, each.shape[1] - 1)):.2f}" for each in curves.values()
        )
        table.add_row(str(count), *cells)
    console.print(table)
    caption = f"Perplexity of the first {len(chosen)} queries after fine-tuning without the sequences of the highest "
    caption += f"summed scores; mean and standard deviation of {arguments.num_repeats} seeds."
    figure = Figure("Removal of top sequences", caption, png(removal_curves(counts, curves, "Query perplexity")))
    results = {**removal.to_json(), "perplexity": {name: curve.tolist() for name, curve in curves.items()}}
    file = save_evaluation(arguments.run_dir, "counterfactual", figure, results, scores["ekfac"].fingerprint)
    console.print(f"Plot and numbers: {file}", soft_wrap=True)


if __name__ == "__main__":
    run(main, Arguments)
