"""How well `wherefrom.audit` finds wrong labels: each of its signals, and what dropping the worst tenth is worth.

    python benchmarks/jobs.py

A small convolutional network on scikit-learn's digits, a tenth of the training labels flipped. Written to
`results/jobs.json`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass

import torch
import tyro
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from workload import ROOT, save_results

import wherefrom as wf

sys.path.append(str(ROOT / "examples" / "digits"))

from find_mislabels import Arguments as Flips
from find_mislabels import Data, trained


@dataclass
class Arguments:
    """Wrong labels, by signal."""

    seeds: int = 5
    epochs: tuple[int, ...] = (10, 40, 100)
    train: int = 1200
    held_out: int = 200


def judged(data: Data, test: Data, signals: dict[str, Tensor], seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """AUC and precision of each signal, and the test accuracy after retraining without the highest tenth."""
    found = {}
    wrong, count = data.wrong, len(data.labels)
    for name, values in signals.items():
        order = values.argsort(descending=True)
        remaining = order[count // 10 :].sort().values
        part = Data(data.images[remaining], data.labels[remaining], data.true[remaining])
        found[name] = {
            "auc": float(roc_auc_score(wrong.numpy(), values.numpy())),
            "precision": float(wrong[order[: count // 10]].double().mean()),
            "accuracy": accuracy(trained(part, seed, (epochs,))[epochs], test),
        }
    return found


def accuracy(model: nn.Module, test: Data) -> float:
    """On right labels."""
    with torch.no_grad():
        return float((model(test.images).argmax(1) == test.true).double().mean())


def main(arguments: Arguments) -> None:
    """Flip, train, audit, drop, train again."""
    logging.getLogger("wherefrom").setLevel(logging.WARNING)
    found = []
    for seed in range(arguments.seeds):
        whole = Data.load(seed, Flips())
        order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(100 + seed))
        ends = [arguments.train, arguments.train + arguments.held_out]
        data, held_out, test = (Data(whole.images[at], whole.labels[at], whole.true[at])
                                for at in order.tensor_split(ends))  # fmt: skip
        right = list(zip(held_out.images, held_out.true, strict=True))
        for epochs, model in trained(data, seed, arguments.epochs).items():
            with tempfile.TemporaryDirectory() as folder:
                execution = wf.Execution(progress=False)
                study = wf.Study(folder, model, wf.Classification(), train=data.examples(), execution=execution)
                signals = dict(wf.audit(study, right).signals)
            signals["random"] = torch.rand(len(data.labels), generator=torch.Generator().manual_seed(seed))
            signals_found = judged(data, test, signals, seed, epochs)
            found.append({"seed": seed, "epochs": epochs, "accuracy": accuracy(model, test), "signals": signals_found})
            print(found[-1])
    save_results("jobs", {"wrong labels": found})


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
