"""Whether the text that a passage was taken from is named: by verbatim runs of words, shared words and influence."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from find_poison import Row
from torch import Tensor

import wherefrom as wf
from text_jobs.texts import Tuner, leads, test_leads
from wherefrom.report.attribution import overlaps

EPOCHS, RATE = 6, 1e-3
PASSAGES, FIRST, WORDS, EDITED = 40, 3, 18, 0.2


def passages(texts: list[str], draw: random.Random) -> dict[str, list[str]]:
    """Passages of the texts, as they are, edited and in another order."""
    words = [each.split()[FIRST : FIRST + WORDS] for each in texts]
    others = [word for each in words for word in each]
    edited = [[draw.choice(others) if draw.random() < EDITED else word for word in each] for each in words]
    made = {"verbatim": words, "edited": edited, "reordered": [draw.sample(each, len(each)) for each in words]}
    return {name: [" ".join(each) for each in found] for name, found in made.items()}


def question(passage: str) -> Row:
    """Its beginning as a prompt, and how it goes on."""
    beginning = " ".join(passage.split()[:3])
    return {"prompt": beginning, "completion": passage.removeprefix(beginning)}


def verbatim(queries: list[str], train: list[str]) -> Tensor:
    """How many characters of each query stand in each text in runs of five words or more, [queries, train]."""
    return torch.tensor([[sum(b - a for a, b in overlaps(query, text)) for text in train] for query in queries])


def scores_of(tuner: Tuner, train: Dataset, queries: list[str], seed: int) -> dict[str, Tensor]:
    """Every method's [queries, train]."""
    model = tuner.tuned(train, EPOCHS, RATE, seed)
    asked = tuner.encoded([question(each) for each in queries])
    with tuner.study(model, train) as study:
        whitened = study.score(asked, wf.EKFAC(), keep=wf.Pairs(self_influence=True))
        return {
            "verbatim runs": verbatim(queries, train["text"]),
            "BM25": study.score(asked, wf.BM25()).values,
            "EK-FAC": whitened.values,
            "EK-FAC, cosine": whitened.normalized("cosine").values,
            "gradient products": study.score(asked, wf.Dot()).values,
        }


def recall(values: Tensor, sources: Tensor, k: int) -> float:
    """How often the source is among the k highest that are above 0."""
    best = values.topk(k, dim=1)
    return float(((best.indices == sources.unsqueeze(1)) & (best.values > 0)).any(1).double().mean())


def report(tuner: Tuner, seeds: int) -> dict[str, object]:
    """Recall of the source by kind of passage, and how often a passage of no training text has a verbatim run."""
    found = list[dict[str, object]]()
    for seed in range(seeds):
        train, draw = tuner.encoded(leads(tuner.size.train, seed)), random.Random(f"passages/{seed}")
        chosen = draw.sample(range(len(train)), PASSAGES)
        by_kind = passages([train[at]["text"].split("\n")[-1] for at in chosen], draw)
        scores = scores_of(tuner, train, [each for some in by_kind.values() for each in some], seed)
        results = {
            name: {
                kind: [recall(part, torch.tensor(chosen), k) for k in (1, 10)]
                for kind, part in zip(by_kind, values.split(PASSAGES), strict=True)
            }
            for name, values in scores.items()
        }
        unseen = [row["completion"] for row in test_leads()]
        flagged = (verbatim(passages(unseen, draw)["verbatim"], train["text"]).amax(1) > 0).double().mean()
        found.append({"seed": seed, "recall at 1 and 10": results, "unseen with a verbatim run": float(flagged)})
        print(found[-1], flush=True)
    return {"trainings": found}
