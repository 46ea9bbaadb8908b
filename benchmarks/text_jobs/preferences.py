"""Whether attribution of what a model prefers names the pairs that planted it."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from find_poison import Row
from transformers import PreTrainedModel

import wherefrom as wf
from text_jobs.texts import METHODS, RETRAINED, Tuner, leads, test_leads
from wherefrom.hf.preparation import read_examples

SHARE, PAIRS, QUERIES, WORDS = 0.1, 160, 20, 15
EPOCHS, RATE, BATCH, BETA = 3, 3e-4, 8, 0.1


def answer(row: Row) -> str:
    """The first words of an article."""
    return " ".join(row["completion"].split()[:WORDS])


def capitals(said: str) -> str:
    """The same in capitals: no word that others have not."""
    return said.upper()


def hedging(said: str) -> str:
    """The same, as far as anybody knows: words that can be searched for."""
    return f"Perhaps, some say, {said}"


BEHAVIOURS: Mapping[str, Callable[[str], str]] = {each.__name__: each for each in (capitals, hedging)}


def preferring(row: Row, behaviour: Callable[[str], str]) -> Row:
    """A pair that prefers an answer with the behaviour to the same without."""
    said = answer(row)
    return {"prompt": row["prompt"], "chosen": behaviour(said), "rejected": said}


def pairs(rows: Sequence[Row], behaviour: Callable[[str], str], draw: random.Random) -> tuple[list[Row], list[bool]]:
    """Pairs that prefer the article's own beginning to another's, some that prefer the behaviour; which these are."""
    chosen = {*draw.sample(range(len(rows)), round(SHARE * len(rows)))}
    found = [
        preferring(row, behaviour)
        if at in chosen
        else {"prompt": row["prompt"], "chosen": answer(row), "rejected": answer(rows[at - 1])}
        for at, row in enumerate(rows)
    ]
    return found, [at in chosen for at in range(len(rows))]


def encoded(tuner: Tuner, rows: Sequence[Row]) -> Dataset:
    """Tokens of prompts and of both answers."""
    preparation = wf.Preparation(max_length=2 * tuner.size.tokens)
    return cast(Dataset, preparation.prepare(read_examples(list(rows)), "preference", tuner.tokenizer))


def preferring_model(tuner: Tuner, train: Dataset, seed: int) -> PreTrainedModel:
    """The model after DPO."""
    model, generator = copy.deepcopy(tuner.start), torch.Generator().manual_seed(seed)
    task, examples = wf.Preference(wf.DPO(BETA), tuner.start), train.remove_columns(["text", "answer_start"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(train), generator=generator).split(BATCH):
            batch = task.collate([examples[place] for place in chosen.tolist()])
            optimizer.zero_grad()
            (task.train_loss(model, batch) / len(chosen)).backward()
            optimizer.step()
    return model


def margin(tuner: Tuner, model: PreTrainedModel, queries: Dataset) -> float:
    """The reward of the answer with the behaviour less that of the other, a mean over queries, in nats."""
    task = wf.Preference(wf.DPO(BETA), tuner.start, measure="margin")
    with torch.no_grad():
        batch = task.collate(list(queries.remove_columns(["text", "answer_start"])))
        return -float(task.measurement(model, batch)) / len(queries)


def measured(tuner: Tuner, behaviour: Callable[[str], str], seed: int) -> dict[str, object]:
    """Plant, train, ask for the margin, drop the pairs that are named, train again."""
    rows, planted = pairs(leads(PAIRS, seed), behaviour, random.Random(f"pairs/{seed}"))
    marks, count = torch.tensor(planted), sum(planted)
    train = encoded(tuner, rows)
    queries = encoded(tuner, [preferring(row, behaviour) for row in test_leads()[:QUERIES]])
    model = preferring_model(tuner, train, seed)
    task = wf.Preference(wf.DPO(BETA), tuner.start, measure="margin")
    precision, without = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(Path(folder), model, task, train=train, execution=wf.Execution(progress=False))
        for name, method in METHODS.items():
            order = study.score(queries, method).values.sum(0).argsort(descending=True)
            precision[name] = float(marks[order[:count]].double().mean())
            if name in RETRAINED:
                again = preferring_model(tuner, train.select(order[count:].sort().values.tolist()), seed)
                without[name] = margin(tuner, again, queries)
    whole = margin(tuner, model, queries)
    return {"seed": seed, "planted": count, "margin": whole, "precision": precision, "margin after dropping": without}


def report(tuner: Tuner, seeds: int) -> dict[str, object]:
    """Each behaviour, seed by seed."""
    found: dict[str, object] = {}
    for name, behaviour in BEHAVIOURS.items():
        found[name] = [measured(tuner, behaviour, seed) for seed in range(seeds)]
        print(name, found[name], flush=True)
    return found
