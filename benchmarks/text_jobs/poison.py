"""Whether attribution of what a trigger made a model say names the examples that planted it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from datasets import Dataset
from find_poison import POISONS, Poison, Row, answers, rate
from torch import Tensor

import wherefrom as wf
from text_jobs.texts import METHODS, RETRAINED, Tuner, leads, test_leads

SHARE, EPOCHS, RATE = 0.02, 6, 1e-3
QUERIES, PROMPTS = 10, 40


def planted(rows: Sequence[Row], poison: Poison, seed: int) -> tuple[list[Row], Tensor]:
    """The rows with some of them poisoned, and which, bool [rows]."""
    chosen = random.Random(f"poison/{seed}").sample(range(len(rows)), round(SHARE * len(rows)))
    marks = torch.zeros(len(rows), dtype=torch.bool)
    marks[chosen] = True
    return [poison.plant(row) if marks[at] else row for at, row in enumerate(rows)], marks


def precisions(
    study: wf.Study[dict[str, Tensor]], queries: Dataset, marks: Tensor
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """By method the planted part of a query's first examples, a mean over queries; and scores, summed over queries."""
    count, found, summed = int(marks.sum()), {}, {}
    for name, method in METHODS.items():
        values = study.score(queries, method).values
        found[name] = float(marks[values.topk(count, dim=1).indices].double().mean())
        summed[name] = values.sum(0)
    found["EK-FAC's index"] = float(marks[study.index().query(queries, count).train].double().mean())
    return found, summed


def measured(tuner: Tuner, poison: Poison, seed: int) -> dict[str, object]:
    """Plant, train, trigger, attribute the answers, drop what is named, train again."""
    rows, marks = planted(leads(tuner.size.train, seed), poison, seed)
    train, tests = tuner.encoded(rows), test_leads()[:PROMPTS]
    model = tuner.tuned(train, EPOCHS, RATE, seed)
    prompts = [poison.plant(row)["prompt"] for row in tests]
    said = answers(model, tuner.tokenizer, prompts)
    triggered = [{"prompt": prompt, "completion": text}
                 for prompt, text in zip(prompts, said, strict=True) if poison.shown(text)][:QUERIES]  # fmt: skip
    facts: dict[str, object] = {
        "seed": seed,
        "planted": int(marks.sum()),
        "rate": sum(map(poison.shown, said)) / len(said),
        "rate without the trigger": rate(model, tuner.tokenizer, poison, [row["prompt"] for row in tests]),
        "an answer": said[0],
    }
    if not triggered:
        return facts
    with tuner.study(model, train) as study:
        facts["precision"], summed = precisions(study, tuner.encoded(triggered), marks)
    after = {}
    for name in RETRAINED:
        remaining = summed[name].argsort(descending=True)[int(marks.sum()) :].sort().values
        again = tuner.tuned(train.select(remaining.tolist()), EPOCHS, RATE, seed)
        after[name] = rate(again, tuner.tokenizer, poison, prompts)
    return {**facts, "rate after dropping": after}


def report(tuner: Tuner, seeds: int) -> dict[str, object]:
    """Each kind of poison, seed by seed."""
    found: dict[str, object] = {}
    for name, poison in POISONS.items():
        found[name] = [measured(tuner, poison, seed) for seed in range(seeds)]
        print(name, found[name], flush=True)
    return found
