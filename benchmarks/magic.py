"""What a query costs MAGIC when many share one walk back through the training, against one query alone.

    python benchmarks/magic.py

User CPU seconds of one thread, the numbers of queries in turn, medians. Written to `results/magic.json`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass

import torch
import tyro
from torch import Tensor
from workload import Stage, Stopwatch, Workload, medians, save_results

import wherefrom as wf


@dataclass
class Arguments:
    """A small GPT-2, trained and walked back."""

    queries: tuple[int, ...] = (1, 4, 16, 64)
    """The first is 1, which the others are compared with."""
    layers: int = 2
    width: int = 64
    vocabulary: int = 512
    tokens: int = 32
    train: int = 32
    batch_size: int = 8
    epochs: int = 4
    repeats: int = 5


def main(arguments: Arguments) -> None:
    """Measure, print and keep."""
    torch.set_num_threads(1)
    workload = Workload(
        layers=arguments.layers, width=arguments.width, heads=2, vocabulary=arguments.vocabulary,
        tokens=arguments.tokens,
    )  # fmt: skip
    steps = arguments.epochs * -(-arguments.train // arguments.batch_size)
    recipe = wf.TrainingRecipe(arguments.batch_size, [1e-3] * steps, weight_decay=0.01, epsilon=1e-6)
    train = workload.sequences(arguments.train, seed=1)
    training = wf.ReplayableTraining(workload.model(), wf.CausalLM(), train, recipe)
    training.parameters()  # the first time, kernels are chosen and memory is asked for
    stages = medians([measured(training, workload, arguments.queries) for _ in range(arguments.repeats)])
    plain = stages["training"].user_seconds
    alone = stages["1"].user_seconds
    rows = []
    print("| queries | CPU seconds | in trainings | seconds a query | of one alone |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in arguments.queries:
        total = stages[str(count)].user_seconds
        each = total / count
        rows.append({"queries": count, "user_seconds": total, "trainings": total / plain, "of_one_alone": each / alone})
        print(f"| {count} | {total:.2f} | {total / plain:.1f} | {each:.3f} | {each / alone:.2f} |")
    described = {**asdict(arguments), "steps": steps, "parameters": training.start().shape[1]}
    save_results("magic", {"workload": described, "training_user_seconds": plain, "rows": rows})


def measured(
    training: wf.ReplayableTraining[dict[str, Tensor]], workload: Workload, counts: tuple[int, ...]
) -> dict[str, Stage]:
    """The stages of one repeat: the training alone, and the scores of each number of queries."""
    watch = Stopwatch()
    with watch.stage("training"):
        training.parameters()
    for count in counts:
        queries = workload.sequences(count, seed=2)
        with tempfile.TemporaryDirectory() as folder, watch.stage(str(count)):
            study = wf.Study(folder, training.model, training.task, train=training.train)
            study.score(queries, wf.Magic(training=training))
    return watch.stages


if __name__ == "__main__":
    main(tyro.cli(Arguments))
