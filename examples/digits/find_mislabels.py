"""Flip a tenth of the labels, train, and find the wrong ones by self-influence.

    python find_mislabels.py

A small convolutional network on scikit-learn's digits (8 x 8 pixels). An example with a wrong label can only be learnt
by heart, so its loss depends on itself more than that of others. Rankings by self-influence are compared with the cheap
ones, by the loss and at random, over several seeds, early in training and after the wrong labels are learnt too.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.evaluate.plots import COLOURS, RESOLUTION, png
from wherefrom.report.figures import Figure, save_evaluation

console = Console()

METHODS: dict[str, type[wf.Factored]] = {
    "identity": wf.Dot,
    "diagonal": wf.Diagonal,
    "kfac": wf.KFAC,
    "ekfac": wf.EKFAC,
}
LABELS = {
    "ekfac": "self-influence, ekfac",
    "kfac": "self-influence, kfac",
    "diagonal": "self-influence, diagonal",
    "identity": "squared gradient norm (identity)",
    "loss": "loss",
    "random": "random",
}


@dataclass
class Arguments:
    """Wrong labels, found by self-influence."""

    run_dir: Path = Path("runs/digits")
    """Keeps factors, self-influence, plots and their numbers."""
    epochs: tuple[int, ...] = (10, 40, 100, 200)
    """After how many epochs examples are ranked."""
    shown_epoch: int = 100
    """Whose curves and images are drawn."""
    num_seeds: int = 5
    """Of the flips, the first weights and the order of batches."""
    flipped: float = 0.1
    """The part of the labels that is replaced by another class."""
    max_train_examples: int | None = None
    """Train only on the first so many."""
    damping: float | None = None
    """Added to every eigenvalue; None is 0.1 x the mean eigenvalue of each layer."""
    empirical: bool = False
    """Fit factors with the (partly wrong) labels instead of labels drawn from the model."""
    overwrite: bool = False
    """Compute factors and self-influence again, and replace those that are there."""

    def __post_init__(self) -> None:
        if self.shown_epoch not in self.epochs:
            raise SystemExit(f"--shown_epoch {self.shown_epoch}: expected one of --epochs {self.epochs}.")


@dataclass(frozen=True)
class Data:
    """Images [examples, 1, 8, 8], the labels trained on, the true ones, and which are wrong."""

    images: Tensor
    labels: Tensor
    true: Tensor

    @property
    def wrong(self) -> Tensor:
        """bool [examples]."""
        return self.labels != self.true

    @classmethod
    def load(cls, seed: int, arguments: Arguments) -> Data:
        """The digits with some labels flipped to another class, each as likely."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1)[: arguments.max_train_examples] / 16
        true = torch.from_numpy(digits.target)[: arguments.max_train_examples]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(true), generator=generator)[: round(arguments.flipped * len(true))]
        labels = true.clone()
        labels[chosen] = (true[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
        return cls(images, labels, true)

    def examples(self) -> list[tuple[Tensor, Tensor]]:
        """As pairs of image and label."""
        return list(zip(self.images, self.labels, strict=True))


def network() -> nn.Module:
    """Two convolutions and a linear layer: 10,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


def trained(data: Data, seed: int, epochs: tuple[int, ...]) -> dict[int, nn.Module]:
    """The network after each of some numbers of epochs."""
    torch.manual_seed(seed)
    model, found = network(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for epoch in range(1, max(epochs) + 1):
        for rows in torch.randperm(len(data.images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()
        if epoch in epochs:
            found[epoch] = copy.deepcopy(model)
    return found


def rankings(model: nn.Module, data: Data, run: Path, arguments: Arguments) -> dict[str, Tensor]:
    """How suspicious each way finds each example, [examples]."""
    study = wf.Study(run, model, wf.Classification(), train=data.examples(), execution=wf.Execution(progress=False))
    with torch.no_grad():
        logits = model(data.images)
    found = {"loss": functional.cross_entropy(logits, data.labels, reduction="none")}
    for name, kind in METHODS.items():
        method = kind(empirical=arguments.empirical, damping=arguments.damping)
        method = replace(method, factors=study.fit(method, overwrite=arguments.overwrite))
        found[name] = study.self_influence(method, overwrite=arguments.overwrite)
    found["random"] = torch.rand(len(data.labels), generator=torch.Generator().manual_seed(0))
    return found


@dataclass
class Finding:
    """What a ranking finds, each number a list over seeds.

    Attributes:
        auc: area under the ROC curve: how likely a wrong label ranks above a right one.
        found: part of the wrong labels among the highest-ranked examples, as many as there are wrong labels.
    """

    auc: list[float] = field(default_factory=list)
    found: list[float] = field(default_factory=list)

    def add(self, wrong: Tensor, suspicion: Tensor) -> None:
        """Judge one ranking."""
        highest = suspicion.argsort(descending=True)[: int(wrong.sum())]
        self.auc.append(float(roc_auc_score(wrong.numpy(), suspicion.numpy())))
        self.found.append(float(wrong[highest].double().mean()))


def curves(wrong: Tensor, suspicion: Tensor) -> Tensor:
    """Part of the wrong labels found after checking the highest-ranked n examples, [examples]."""
    return wrong[suspicion.argsort(descending=True)].double().cumsum(0) / wrong.sum()


def draw(found: dict[str, list[Tensor]], data: Data, suspicion: Tensor, epoch: int) -> Plot:
    """The curves, averaged over seeds, and the twelve images that EK-FAC suspects most."""
    figure = Plot(figsize=(7.2, 5.2), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["curves"] * 12, [f"image{place}" for place in range(12)]], height_ratios=[4.2, 1])
    axes = panels["curves"]
    for name, repeats in found.items():
        mean = torch.stack(repeats).mean(0).numpy()
        checked = np.arange(1, len(mean) + 1) / len(mean)
        style = "--" if name in ("loss", "random") else "-"
        axes.plot(100 * checked, 100 * mean, style, color=COLOURS.get(name, "#000000"), label=LABELS[name])
    axes.set(xlim=(0, 50), ylim=(0, 102), xlabel="Examples checked (%)", ylabel="Wrong labels found (%)")
    axes.set_title(f"After {epoch} epochs, mean of {len(repeats)} seeds", loc="left")
    axes.legend(frameon=False, loc=(0.57, 0.48))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for place, example in enumerate(suspicion.argsort(descending=True)[:12].tolist()):
        panel = panels[f"image{place}"]
        panel.imshow(data.images[example, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        given, true = int(data.labels[example]), int(data.true[example])
        panel.set_title(f"{given}" if given == true else f"{given}, is {true}", fontsize=8)
        panel.set(xticks=[], yticks=[])
    panels["image0"].set_ylabel("highest\nekfac", fontsize=8)
    return figure


def table(findings: dict[int, dict[str, Finding]]) -> Table:
    """The area under the curve after each stage of training."""
    shown = Table("Ranking", title="Area under the ROC curve, mean and standard deviation over seeds")
    for epoch in findings:
        shown.add_column(f"{epoch} epochs", justify="right")
    for name, label in LABELS.items():
        values = [np.array(stage[name].auc) for stage in findings.values()]
        shown.add_row(label, *(f"{each.mean():.3f} ± {each.std():.3f}" for each in values))
    return shown


def main(arguments: Arguments) -> None:
    """Flip, train, rank, judge, draw."""
    logging.getLogger("wherefrom").setLevel(logging.WARNING)
    findings = {epoch: {name: Finding() for name in LABELS} for epoch in arguments.epochs}
    found: dict[str, list[Tensor]] = {name: [] for name in LABELS}
    accuracy: dict[int, list[float]] = {epoch: [] for epoch in arguments.epochs}
    for seed in range(arguments.num_seeds):
        data = Data.load(seed, arguments)
        for epoch, model in trained(data, seed, arguments.epochs).items():
            ranked = rankings(model, data, arguments.run_dir / f"seed{seed}-epoch{epoch}", arguments)
            with torch.no_grad():
                accuracy[epoch].append(float((model(data.images).argmax(1) == data.labels).double().mean()))
            for name, suspicion in ranked.items():
                findings[epoch][name].add(data.wrong, suspicion)
                if epoch == arguments.shown_epoch:
                    found[name].append(curves(data.wrong, suspicion))
            if epoch == arguments.shown_epoch and not seed:
                first = data, ranked["ekfac"]
        console.print(f"Seed {seed}: {int(data.wrong.sum())} of {len(data.wrong)} labels are wrong.")
    console.print(table(findings))
    figure = Figure(
        "Wrong labels found",
        "By checking the highest-ranked examples first. Below, the images that EK-FAC ranks highest, with the label "
        "that was trained on and, where it is wrong, the true one.",
        png(draw(found, *first, arguments.shown_epoch)),
    )
    stages = {str(epoch): {name: asdict(each) for name, each in stage.items()} for epoch, stage in findings.items()}
    numbers = {
        "arguments": {name: str(value) for name, value in asdict(arguments).items()},
        "rankings": stages,
        "accuracy on the labels trained on": {str(epoch): values for epoch, values in accuracy.items()},
    }
    file = save_evaluation(arguments.run_dir, "mislabels", figure, numbers, {})
    console.print(f"The plot is {file}", soft_wrap=True)


if __name__ == "__main__":
    chosen = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
