"""What a query costs MAGIC when many share one walk back through the training, against one query alone.

    python benchmarks/magic.py

User CPU seconds of one thread, the numbers of queries in turn, medians. Written to `results/magic.json`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import tyro
from workload import Stage, Stopwatch, Workload, medians, save_results

import wherefrom as wf


@dataclass
class Arguments:
    """A small GPT-2, trained and walked back."""

    queries: tuple[int, ...] = (1, 4, 16, 64)
    layers: int = 2
    width: int = 64
    vocabulary: int = 512
    tokens: int = 64
    train: int = 64
    batch_size: int = 8
    epochs: int = 4
    repeats: int = 5


def measured(
    arguments: Arguments, training: wf.ReplayableTraining[dict[str, torch.Tensor]]
) -> Iterator[dict[str, Stage]]:
    """Each repeat's stages: the training alone, and the scores of each number of queries."""
    workload = workload_of(arguments)
    for _ in range(arguments.repeats):
        watch = Stopwatch()
        with watch.stage("training"):
            training.parameters()
        for count in arguments.queries:
            queries = workload.sequences(count, seed=2)
            with tempfile.TemporaryDirectory() as folder, watch.stage(f"{count} queries"):
                wf.magic_scores(folder, training, queries)
        yield watch.stages


def workload_of(arguments: Arguments) -> Workload:
    return Workload(
        layers=arguments.layers, width=arguments.width, heads=2, vocabulary=arguments.vocabulary,
        tokens=arguments.tokens,
    )  # fmt: skip


def main(arguments: Arguments) -> None:
    """Measure, print and keep."""
    torch.set_num_threads(1)
    workload = workload_of(arguments)
    steps = arguments.epochs * -(-arguments.train // arguments.batch_size)
    recipe = wf.TrainingRecipe(arguments.batch_size, [1e-3] * steps, weight_decay=0.01, epsilon=1e-6)
    train = workload.sequences(arguments.train, seed=1)
    training = wf.ReplayableTraining(workload.model(), wf.CausalLM(), train, recipe)
    training.parameters()  # the first time, kernels are chosen and memory is asked for
    stages = medians(list(measured(arguments, training)))
    plain = stages["training"].user_seconds
    alone = stages[f"{arguments.queries[0]} queries"].user_seconds / arguments.queries[0]
    rows = []
    print(
        "| queries | CPU seconds | in trainings | seconds a query | of one alone |\n| ---: | ---: | ---: | ---: | ---: |"
    )
    for count in arguments.queries:
        seconds = stages[f"{count} queries"].user_seconds
        each = seconds / count
        rows.append(
            {"queries": count, "user_seconds": seconds, "trainings": seconds / plain, "of_one_alone": each / alone}
        )
        print(f"| {count} | {seconds:.2f} | {seconds / plain:.1f} | {each:.3f} | {each / alone:.2f} |")
    save_results(
        "magic",
        {
            "workload": {**vars(arguments), "steps": steps, "parameters": training.start().shape[1]},
            "training_user_seconds": plain,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
