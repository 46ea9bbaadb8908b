"""Hand our scores to quanda's metrics, beside the explainers that quanda brings: an outside test.

    pip install quanda
    python quanda_metrics.py

Small networks on scikit-learn's digits, as in `find_mislabels.py`: a clean one, one with wrong labels, one that knows
only even and odd, one with a mark in the corner of some zeros. Each metric is quanda's own code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from find_mislabels import network
from quanda.explainers import Explainer, RandomExplainer
from quanda.explainers.wrappers import (
    TRAK,
    CaptumArnoldi,
    CaptumSimilarity,
    CaptumTracInCPFast,
    Kronfluence,
)
from quanda.explainers.wrappers.kronfluence_tasks import ImageClassificationTask
from quanda.metrics.downstream_eval import (
    ClassDetectionMetric,
    MislabelingDetectionMetric,
    ShortcutDetectionMetric,
    SubclassDetectionMetric,
)
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from quanda.metrics.heuristics import ModelRandomizationMetric, TopKCardinalityMetric
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.store.files import write_text

console = Console()


# --8<-- [start:explainer]
class WherefromExplainer(Explainer):  # type: ignore[misc,unused-ignore]
    """Any method of wherefrom as an explainer of quanda.

    Args:
        method: `wf.EKFAC()`, `wf.Dot()`, ...
        run: the run directory, which keeps factors and scores; it may serve several models.
    """

    accepted_tasks = ("image_classification",)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[[nn.Module, str], Any] | None = None,
        *,
        method: wf.Method,
        run: str | Path,
    ) -> None:
        super().__init__(model, train_dataset, "image_classification", checkpoints, checkpoints_load_func)
        if self.checkpoints:
            self.load_last_checkpoint()
        quiet = wf.Execution(progress=False)
        self.study = wf.Study(run, model, wf.Classification(), train=self.train_dataset, execution=quiet)
        self.method = method

    def explain(self, test_data: Tensor, targets: list[int] | Tensor) -> Tensor:
        """Scores [queries, train]; positive where training on the example lowers the loss of the target."""
        return self.study.score(list(zip(test_data, torch.as_tensor(targets), strict=True)), self.method).values

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Each training example's score with itself, [train]."""
        if type(self.method).self_influence is wf.Method.self_influence:  # it has no way of its own
            found: Tensor = super().self_influence(batch_size=batch_size)
            return found
        return self.study.self_influence(self.method)


# --8<-- [end:explainer]


@dataclass
class Arguments:
    """Scores in quanda's metrics."""

    run_dir: Path = Path("runs/quanda")
    """Keeps models, factors and scores, and the numbers."""
    train_examples: int = 1000
    """Trained on."""
    test_examples: int = 200
    """Explained."""
    epochs: int = 20
    """Of every training."""
    subsets: int = 100
    """Halves of the training set that networks are trained on, for the linear datamodeling score."""
    seed: int = 0
    """Of the split, the first weights, the order of batches, and what is wrong."""
    only: tuple[str, ...] = ()
    """Explainers; all of them by default."""


Kwargs = Mapping[str, Any]


def explainers(folder: Path) -> dict[str, tuple[type[Explainer], Kwargs]]:
    """Each explainer's class and arguments; what others keep of a model lies in its folder."""
    ours = {
        "EKFAC": wf.EKFAC(),
        "KFAC": wf.KFAC(),
        "Cosine": wf.Cosine(),
        "TrackStar": wf.TrackStar(),
        "Dot": wf.Dot(),
        "Random": wf.Random(),
    }
    kept = {"model_id": "digits", "cache_dir": str(folder), "load_from_disk": False}
    return {
        **{name: (WherefromExplainer, {"method": each, "run": folder.parent / "ours"}) for name, each in ours.items()},
        "Kronfluence": (Kronfluence, {"task_module": ImageClassificationTask(), "batch_size": 20, **kept}),
        "TRAK": (TRAK, {"batch_size": 50, "proj_dim": 256, **kept}),
        "CaptumArnoldi": (CaptumArnoldi, {"batch_size": 50, "arnoldi_dim": 50}),
        "CaptumTracInCPFast": (CaptumTracInCPFast, {"final_fc_layer": "5", "batch_size": 50}),
        "CaptumSimilarity": (CaptumSimilarity, {"layers": "4", "batch_size": 50, **kept}),
        "RandomExplainer": (RandomExplainer, {}),
    }


@dataclass(frozen=True)
class Trained:
    """A network, what it was trained on and its weights' file."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    file: Path

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.images, self.labels)

    def explainer(self, cls: type[Explainer], kwargs: Kwargs) -> Explainer:
        made: Explainer = cls(model=self.model, train_dataset=self.dataset, checkpoints=[str(self.file)], **kwargs)
        return made


def trained(images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """A network that was trained on images."""
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@dataclass
class Cases:
    """The digits, and networks that were trained on them as they are and with something wrong."""

    arguments: Arguments
    models: dict[str, Trained] = field(default_factory=dict)

    def __post_init__(self) -> None:
        digits, count = load_digits(), self.arguments.train_examples
        self.generator = torch.Generator().manual_seed(self.arguments.seed)
        order = torch.randperm(len(digits.target), generator=self.generator)
        images, labels = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16, digits.target[order]
        labels = torch.from_numpy(labels)
        self.images, self.labels = images[:count], labels[:count]
        end = count + self.arguments.test_examples
        self.test_images, self.test_labels = images[count:end], labels[count:end]
        self.wrong = torch.randperm(count, generator=self.generator)[: count // 10]
        flipped = self.labels.clone()
        flipped[self.wrong] = (
            flipped[self.wrong] + torch.randint(1, 10, (count // 10,), generator=self.generator)
        ) % 10
        zeros = (self.labels == 0).nonzero().flatten()
        self.marked = zeros[: len(zeros) // 2]
        images_marked = self.images.clone()
        images_marked[self.marked] = mark(images_marked[self.marked])
        self.train("clean", self.images, self.labels)
        self.train("flipped", self.images, flipped, 5 * self.arguments.epochs)  # until it has learnt most of them
        self.train("grouped", self.images, self.labels % 2)
        self.train("marked", images_marked, self.labels)

    def train(self, name: str, images: Tensor, labels: Tensor, epochs: int | None = None) -> None:
        """Train a network and write its weights."""
        folder = self.arguments.run_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        model = trained(images, labels, self.arguments.seed, epochs or self.arguments.epochs)
        torch.save(model.state_dict(), folder / "model.pt")
        self.models[name] = Trained(model, images, labels, folder / "model.pt")

    def subsets(self) -> tuple[list[list[int]], list[str]]:
        """Random halves of the training set, and files of the networks that were trained on them."""
        found, files = [], []
        for number in range(self.arguments.subsets):
            rows = torch.randperm(len(self.images), generator=self.generator)[: len(self.images) // 2]
            model = trained(self.images[rows], self.labels[rows], self.arguments.seed, self.arguments.epochs)
            files.append(str(self.arguments.run_dir / "clean" / f"half{number}.pt"))
            torch.save(model.state_dict(), files[-1])
            found.append(rows.tolist())
        return found, files


def mark(images: Tensor) -> Tensor:
    """A bright corner."""
    images = images.clone()
    images[..., :2, :3] = 1
    return images


def interval(metric: Any) -> dict[str, float]:
    """A score with its 95% interval over test examples, as quanda has it."""
    found = metric.compute_bootstrapped(seed=0)
    return {"score": found["score"], "low": found["ci_low"], "high": found["ci_high"]}


def evaluate(cases: Cases, name: str, lds: LinearDatamodelingMetric) -> dict[str, dict[str, float]]:
    """Each metric of an explainer."""
    found, run = {}, cases.arguments.run_dir
    cls, kwargs = explainers(run / "clean" / name)[name]
    clean, images, labels = cases.models["clean"], cases.test_images, cases.test_labels
    start = perf_counter()
    explained = clean.explainer(cls, kwargs).explain(images, labels).detach()
    found["seconds"] = {"score": perf_counter() - start}
    metric = ClassDetectionMetric(clean.model, clean.dataset)
    metric.update(explained, labels)
    found["class detection"] = interval(metric)
    lds.reset()
    lds.update(explained, labels, images)
    found["linear datamodeling"] = interval(lds)
    metric = TopKCardinalityMetric(clean.model, clean.dataset, top_k=5)
    metric.update(explained)
    found["top-5 cardinality"] = metric.compute()
    metric = ModelRandomizationMetric(
        clean.model, "digits", str(run / "clean" / name / "random"), clean.dataset, [str(clean.file)], cls, dict(kwargs)
    )
    metric.update(explained, images, labels)
    found["model randomization"] = interval(metric)

    grouped = cases.models["grouped"]
    explained = grouped.explainer(*explainers(run / "grouped" / name)[name]).explain(images, labels % 2).detach()
    metric = SubclassDetectionMetric(grouped.model, grouped.dataset, cases.labels)
    metric.update(explained, labels)
    found["subclass detection"] = interval(metric)

    marked, shown = cases.models["marked"], mark(images)
    predicted = marked.model(shown).argmax(1)
    explained = marked.explainer(*explainers(run / "marked" / name)[name]).explain(shown, predicted).detach()
    metric = ShortcutDetectionMetric(marked.model, marked.dataset, cases.marked, 0)
    metric.update(explained, shown, labels)
    found["shortcut detection"] = {**interval(metric), "test examples": len(metric.auprc_scores)}

    flipped = cases.models["flipped"]
    values = flipped.explainer(*explainers(run / "flipped" / name)[name]).self_influence().detach()
    # The metric adds 1e-4 times an example's position, which small values would not survive.
    metric = MislabelingDetectionMetric(
        flipped.model, flipped.dataset, cases.wrong.tolist(),
        precomputed_self_influence=values.double() / values.abs().mean() * 1e6,
    )  # fmt: skip
    found["mislabeling detection"] = {"score": metric.compute()["score"]}
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """A row for each explainer."""
    names = list(next(iter(found.values())))
    shown = Table("explainer", *names)
    for explainer, metrics in found.items():
        shown.add_row(explainer, *(f"{metrics[name]['score']:.3f}" for name in names))
    return shown


def main(arguments: Arguments) -> None:
    """Train, explain, judge."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("wherefrom").setLevel(logging.ERROR)
    cases = Cases(arguments)
    clean = cases.models["clean"]
    with torch.no_grad():
        accuracy = float((clean.model(cases.test_images).argmax(1) == cases.test_labels).double().mean())
        flipped = cases.models["flipped"]
        right = flipped.model(flipped.images).argmax(1) == flipped.labels
        learnt = float(right[cases.wrong].double().mean())
    console.print(f"Accuracy on the test examples: {accuracy:.1%}; wrong labels that were learnt: {learnt:.1%}")
    subsets, files = cases.subsets()
    lds = LinearDatamodelingMetric(
        clean.model, clean.dataset, m=len(subsets), subset_ids=subsets, subset_ckpt_filenames=files
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in arguments.only or explainers(arguments.run_dir):
        found[name] = evaluate(cases, name, lds)
        console.print(f"{name}: { ({metric: round(each['score'], 3) for metric, each in found[name].items()}) }")
        about = {key: str(value) for key, value in asdict(arguments).items()}
        content = {"arguments": about, "accuracy": accuracy, "wrong labels learnt": learnt, "explainers": found}
        write_text(arguments.run_dir / "metrics.json", json.dumps(content, indent=1) + "\n")
    console.print(table(found))


if __name__ == "__main__":
    chosen = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
