"""How well an audit finds corrupted texts, by signal, and what dropping the worst tenth is worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import PreTrainedModel

import wherefrom as wf
from text_jobs.corruptions import CORRUPTIONS, corrupted
from text_jobs.texts import Tuner, counted, leads, test_leads, token_losses

RETRAINED = ("neighbours", "loss", "held_out", "random", "loss before", "all that are wrong")
SHORT, LONG, RATE = 2, 8, 5e-4  # epochs, and the learning rate
OTHERS = 50  # articles that texts are mixed with


@dataclass(frozen=True)
class Corrupted:
    """Training texts of which a tenth is wrong, and others that are right."""

    train: Dataset
    held_out: Dataset
    kinds: list[str]

    @classmethod
    def draw(cls, tuner: Tuner, seed: int) -> Corrupted:
        """As many of each kind."""
        size = tuner.size
        rows = leads(size.train + size.held_out + OTHERS, seed)
        count = size.train // 10 // len(CORRUPTIONS)
        train, kinds = corrupted(rows[: size.train], rows[-OTHERS:], count, seed)
        return cls(tuner.encoded(train), tuner.encoded(rows[size.train : -OTHERS]), kinds)

    @property
    def wrong(self) -> Tensor:
        """bool [train]."""
        return torch.tensor([bool(kind) for kind in self.kinds])


def signals_of(tuner: Tuner, model: PreTrainedModel, data: Corrupted, seed: int) -> dict[str, Tensor]:
    """Those of the audit and variants of them; each [train], higher is more suspicious."""
    with tuner.study(model, data.train) as study:
        found = dict(wf.audit(study, data.held_out).signals)
    own, before = found["self_influence"], token_losses(tuner.start, data.train)
    return {
        **found,
        "random": torch.rand(len(own), generator=torch.Generator().manual_seed(seed)).double(),
        "loss less that before": found["loss"] - before,
        "self_influence by the token": own / counted(data.train),
        "held_out, cosine": found["held_out"] / own.sqrt(),
    }


def judged(values: Tensor, data: Corrupted) -> dict[str, object]:
    """AUC of all wrong texts and of each kind against the right ones, and precision among as many as are wrong."""
    wrong, count = data.wrong, int(data.wrong.sum())
    first = values.argsort(descending=True)[:count]
    by_kind = {}
    for kind in sorted({*data.kinds} - {""}):
        chosen = torch.tensor([each in ("", kind) for each in data.kinds])
        by_kind[kind] = float(roc_auc_score(wrong[chosen].numpy(), values[chosen].numpy()))
    auc = float(roc_auc_score(wrong.numpy(), values.numpy()))
    return {"auc": auc, "precision": float(wrong[first].double().mean()), "auc by kind": by_kind}


def retrained(tuner: Tuner, data: Corrupted, values: Tensor, epochs: int, seed: int, test: Dataset) -> float:
    """The test loss by the token after training without the highest values, as many as texts are wrong."""
    remaining = values.argsort(descending=True)[int(data.wrong.sum()) :].sort().values
    model = tuner.tuned(data.train.select(remaining.tolist()), epochs, RATE, seed)
    return test_loss(model, test)


def test_loss(model: PreTrainedModel, test: Dataset) -> float:
    """By the token, of all texts together."""
    tokens = counted(test)
    return float((token_losses(model, test) * tokens).sum() / tokens.sum())


def report(tuner: Tuner, seeds: int) -> dict[str, object]:
    """Corrupt, audit the model before fine-tuning and after, drop, train again."""
    found, test = list[dict[str, object]](), tuner.encoded(test_leads())
    for seed in range(seeds):
        data = Corrupted.draw(tuner, seed)
        before = token_losses(tuner.start, data.train)
        for epochs in (0, SHORT, LONG):
            model = tuner.tuned(data.train, epochs, RATE, seed)
            signals = signals_of(tuner, model, data, seed)
            results = {name: judged(values, data) for name, values in signals.items()}
            if epochs == SHORT:
                dropped = {**signals, "loss before": before, "all that are wrong": data.wrong.double()}
                for name in RETRAINED:
                    loss = retrained(tuner, data, dropped[name], epochs, seed, test)
                    results.setdefault(name, {})["test loss"] = loss
            one = {"seed": seed, "epochs": epochs, "train loss": float(signals["loss"].mean())}
            found.append({**one, "test loss": test_loss(model, test), "signals": results})
            print(found[-1], flush=True)
    return {"trainings": found}
