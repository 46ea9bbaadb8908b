"""Evaluate scores by retraining: fine-tune on random halves of the training set, and see whose scores predict the rest.

    python evaluate_lds.py                                     # 20 halves, one seed: minutes
    python evaluate_lds.py --num_masks 100 --num_repeats 5     # the full protocol; it can be stopped and continued
    python evaluate_lds.py --ground_truth retrainings.npz      # retrainings that are finished already

Run it after `train.py`; factors and scores that `analyze.py` left in the run directory are reused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common import METHODS, Example, console, run
from models import load_recipe
from retraining import Finetuning, Retrained
from rich.table import Table
from torch import Tensor

import wherefrom as wf
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.plots import lds_bars, lds_tables, png
from wherefrom.evaluate.retrain import half_subsets, retrain
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.methods.baselines import bm25_scores, random_scores
from wherefrom.report.figures import Figure, save_evaluation
from wherefrom.report.passages import DatasetPassages, checked_passages, excerpt
from wherefrom.runtime.errors import InputError


@dataclass
class Arguments(Retrained):
    """How well scores predict what retraining does."""

    num_masks: int = 20
    """Random halves of the training set."""
    num_repeats: int = 1
    """Seeds that the model is fine-tuned with on each half."""
    ground_truth: Path | None = None
    """Finished retrainings instead, .npz or .safetensors with masks and losses."""
    dampings: tuple[float | None, ...] = (None, 1e-4, 1e-2)
    """Tried with ekfac beside --damping; None is 0.1 x the mean eigenvalue of each layer."""


def main(arguments: Arguments) -> None:
    """Retrain or load, score, compare, plot."""
    example = Example(arguments)
    truth = ground_truth(arguments, example)
    scores = all_scores(example, arguments.dampings)
    report = evaluate_lds(scores, truth)
    console.print(lds_tables(report))
    ekfac = example.scores(example.method("ekfac"))
    show_top_sequence(example, ekfac)
    caption = f"Linear datamodeling score: {report.subsets:,} halves of the training set, {report.repeats} seeds each."
    figure = Figure("Prediction of retraining", caption, png(lds_bars(report)))
    file = save_evaluation(arguments.run_dir, "lds", figure, report.to_json(), ekfac.fingerprint)
    console.print(f"Plot and numbers: {file}", soft_wrap=True)


def ground_truth(arguments: Arguments, example: Example) -> GroundTruth:
    """The retrainings from a file, or from here."""
    if arguments.ground_truth is not None:
        truth = GroundTruth.load(arguments.ground_truth)
        expected, found = (len(example.train), len(example.queries)), (truth.masks.shape[1], truth.losses.shape[2])
        if found != expected:
            raise InputError(
                f"ground_truth={str(arguments.ground_truth)!r}: retrainings for {found[0]:,} training sequences and "
                f"{found[1]:,} queries, but the checkpoint in {arguments.checkpoint_dir} has {expected[0]:,} and "
                f"{expected[1]:,}. Give the checkpoint that the file belongs to."
            )
        return truth
    training = Finetuning(load_recipe(arguments.checkpoint_dir), arguments.cache_dir)
    console.print(f"Fine-tuning {arguments.num_masks * arguments.num_repeats:,} times on half of the training set ...")
    return retrain(
        arguments.run_dir / "retrainings",
        training,
        half_subsets(len(example.train), arguments.num_masks),
        range(arguments.num_repeats),
        fingerprint=training.fingerprint(),
        workers=arguments.num_workers,
        overwrite=arguments.overwrite_retrainings,
    )


def all_scores(example: Example, dampings: tuple[float | None, ...]) -> dict[str, Tensor | wf.Scores]:
    """Every strategy, ekfac at other dampings and in half precision, and the baselines: [query, train] by name."""
    queries, train, ekfac = example.queries, example.train, example.method("ekfac")
    scores: dict[str, Tensor | wf.Scores] = {name: example.scores(example.method(name)) for name in METHODS}
    for damping in dampings:
        amount = "0.1 x mean" if damping is None else f"{damping:g}"
        scores[f"ekfac, damping {amount}"] = example.scores(replace(ekfac, damping=damping))
    scores["ekfac, half precision"] = example.scores(ekfac, half_precision=True)
    scores["bm25"] = bm25_scores(queries["text"], train["text"])
    scores["random"] = random_scores(len(queries), len(train), seed=0)
    return scores


def show_top_sequence(example: Example, scores: wf.Scores) -> None:
    """A query and its top training sequence."""
    queries, texts = DatasetPassages(example.queries), DatasetPassages(example.train)
    checked_passages(scores, queries, texts)
    hit = scores.top(1)[0]
    query, train = queries[0], texts[hit.train]
    table = Table("", "Text", show_lines=True)
    table.add_row("Query 0", excerpt(query.text, 600))
    table.add_row(f"Its top training sequence, {hit.train} ({hit.score:,.4g})", excerpt(train.text, 600))
    console.print(table)


if __name__ == "__main__":
    run(main, Arguments)
