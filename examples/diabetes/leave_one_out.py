"""Leave out one patient, train again to convergence, and see what influence functions said would happen.

    python leave_one_out.py

The diabetes data of scikit-learn; a small MLP and linear regression, both in float64 and small enough to train until
nothing moves, so that what separates prediction and retraining is the method alone. The model minimises

    1/N sum_i (f(x_i) - y_i)^2 / 2 + weight_decay / 2 |theta|^2

over all weights and biases. Leaving out example i drops its term and keeps 1/N: the objective's curvature is that of
the mean loss plus `weight_decay`, which is what `damping=weight_decay` makes of the library's eigenvalues, and a score
divided by N predicts the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.evaluate.agreement import Correlations, compare_scores
from wherefrom.evaluate.plots import BLUE, INK, RESOLUTION, png
from wherefrom.report.figures import Figure, save_evaluation
from wherefrom.tasks.sampling import Sampler

console = Console()

METHODS: dict[str, type[wf.Factored]] = {
    "identity": wf.Dot,
    "diagonal": wf.Diagonal,
    "kfac": wf.KFAC,
    "ekfac": wf.EKFAC,
}


@dataclass
class Arguments:
    """Influence functions against leave-one-out retraining."""

    run_dir: Path = Path("runs/diabetes")
    """Keeps factors, scores, plots and their numbers."""
    hidden: int = 8
    """Units of the MLP's hidden layer."""
    weight_decay: float = 0.03
    """Of the mean loss; the damping of every score."""
    num_test: int = 100
    """Patients kept out of training, whose losses are the queries."""
    max_train_examples: int | None = None
    """Train on, and leave out, only the first so many of the others."""
    seed: int = 0
    """Of the split and of the MLP's first weights."""
    overwrite: bool = False
    """Replace factors and scores that were made from something else."""


@dataclass(frozen=True)
class Data:
    """Standardised features [patients, 10] and targets [patients, 1]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, arguments: Arguments) -> Data:
        """Split at random; the training patients decide mean and scale."""
        features, targets = (torch.from_numpy(values) for values in load_diabetes(return_X_y=True))
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(arguments.seed))
        test, train = order[: arguments.num_test], order[arguments.num_test :][: arguments.max_train_examples]
        columns = torch.cat([features, targets[:, None]], 1)
        columns = (columns - columns[train].mean(0)) / columns[train].std(0)
        return cls(*((columns[part, :-1], columns[part, -1:]) for part in (train, test)))


class GaussNewtonRegression(wf.Regression):
    """Regression whose drawn targets are all exactly one standard deviation away from the prediction.

    With one output, the drawn gradients are then those of the prediction, and what is fitted is the Gauss-Newton matrix
    itself: the Fisher information without the noise of a draw.
    """

    def train_loss(self, model: nn.Module, batch: Sequence[Tensor], sampler: Sampler | None = None) -> Tensor:
        """Half the squared error."""
        inputs, targets = batch
        predictions: Tensor = model(inputs)
        if sampler is not None:
            targets = predictions.detach() - 1
        return 0.5 * (predictions - targets).square().sum()


@dataclass(frozen=True)
class Retraining:
    """What is minimised, as a function of all weights and biases in one vector [weights]."""

    model: nn.Module
    data: Data
    weight_decay: float

    def predictions(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """The model's output, [inputs]."""
        names = [name for name, _ in self.model.named_parameters()]
        shapes = [parameter.shape for parameter in self.model.parameters()]
        parts = torch.split(weights, [shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        output: Tensor = torch.func.functional_call(self.model, named, (inputs,))
        return output.squeeze(1)

    def losses(self, weights: Tensor, examples: tuple[Tensor, Tensor]) -> Tensor:
        """Half the squared error of each example."""
        return 0.5 * (self.predictions(weights, examples[0]) - examples[1].squeeze(1)).square()

    def objective(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Over the kept examples [train], 1 or 0; still divided by the number of all."""
        losses = self.losses(weights, self.data.train)
        return (losses * kept).sum() / len(losses) + 0.5 * self.weight_decay * weights.square().sum()

    def solve(self, start: Tensor, kept: Tensor) -> Tensor:
        """The minimum: a trust region method with the exact Hessian, and Newton steps until only rounding is left.

        Raises:
            RuntimeError: it did not converge to a minimum.
        """
        slope, curvature = torch.func.grad(self.objective), torch.func.hessian(self.objective)
        found = minimize(
            lambda weights: self.objective(torch.from_numpy(weights), kept).item(),
            start.numpy(),
            method="trust-exact",
            jac=lambda weights: slope(torch.from_numpy(weights), kept).numpy(),
            hess=lambda weights: curvature(torch.from_numpy(weights), kept).numpy(),
            options={"gtol": 1e-6, "maxiter": 2000},
        )
        weights = torch.from_numpy(found.x)
        for _ in range(4):  # each squares the error
            factor = torch.linalg.cholesky(curvature(weights, kept))  # fails unless this is a minimum
            weights = weights - torch.cholesky_solve(slope(weights, kept)[:, None], factor).squeeze(1)
        remaining = float(slope(weights, kept).norm())
        if remaining > 1e-11:
            raise RuntimeError(f"Retraining did not converge: gradient norm {remaining:.1g}. Try another --seed.")
        return weights

    def without_each(self, optimum: Tensor) -> Tensor:
        """The minimum without each training example, from the minimum with all: [train, weights]."""
        everything = torch.ones(len(self.data.train[0]), dtype=torch.float64)
        return torch.stack([self.solve(optimum, everything.index_fill(0, i, 0)) for i in torch.arange(len(everything))])

    def exact_scores(self, weights: Tensor) -> dict[str, Tensor]:
        """Scores [test, train] with curvature matrices over all weights, as the library scales its own."""
        train, test = self.data.train, self.data.test
        rows = torch.func.jacrev(self.predictions)(weights, train[0])  # [train, weights]
        layers = torch.repeat_interleave(*self._layer_sizes())
        gauss_newton = rows.T @ rows / len(rows)
        matrices = {
            "Gauss-Newton, layer by layer": gauss_newton * (layers[:, None] == layers),
            "Gauss-Newton": gauss_newton,
            "Hessian": torch.func.hessian(lambda each: self.losses(each, train).mean())(weights),
        }
        left, right = (torch.func.jacrev(self.losses)(weights, part) for part in (test, train))
        decay = self.weight_decay * torch.eye(len(weights), dtype=torch.float64)
        return {name: left @ torch.linalg.solve(matrix + decay, right.T) for name, matrix in matrices.items()}

    def _layer_sizes(self) -> tuple[Tensor, Tensor]:
        """The number of each layer, and how many weights and biases it has."""
        sizes = [
            sum(each.numel() for each in layer.parameters())
            for layer in self.model.modules()
            if isinstance(layer, nn.Linear)
        ]
        return torch.arange(len(sizes)), torch.tensor(sizes)


@dataclass(frozen=True)
class Outcome:
    """One model: what each left-out example changed, and what was predicted.

    Attributes:
        changes: of each test loss, measured, [test, train].
        predicted: the same by method.
        facts: the model's size and losses.
    """

    changes: Tensor
    predicted: dict[str, Tensor]
    facts: dict[str, float]

    def correlations(self) -> dict[str, dict[str, float]]:
        """By method: Spearman and Pearson, the mean over test patients and of the mean test loss; and the slope."""
        found = {}
        for name, predicted in self.predicted.items():
            each = compare_scores(self.changes, predicted)
            mean = compare_scores(self.changes.mean(0, keepdim=True), predicted.mean(0, keepdim=True))
            found[name] = {
                "spearman": each.spearman.mean.value,
                "spearman_low": each.spearman.mean.low,
                "spearman_high": each.spearman.mean.high,
                "pearson": each.pearson.mean.value,
                "spearman_of_mean_loss": _only(mean.spearman),
                "pearson_of_mean_loss": _only(mean.pearson),
                # Measured change for each unit of predicted change, by least squares through the origin.
                "slope": float((self.changes * predicted).sum() / predicted.square().sum()),
            }
        return found


def main(arguments: Arguments) -> None:
    """Train, leave out, score, correlate, plot."""
    data = Data.load(arguments)
    linear, mlp = linear_outcome(arguments, data), mlp_outcome(arguments, data)
    for title, outcome in (("Linear regression", linear), ("MLP", mlp)):
        console.print(table(title, outcome))
    panels = {
        "Linear regression, ekfac": (linear, "ekfac"),
        "MLP, ekfac": (mlp, "ekfac"),
        "MLP, exact Gauss-Newton": (mlp, "Gauss-Newton"),
        "MLP, exact Hessian": (mlp, "Hessian"),
    }
    caption = f"Change of the mean loss of {len(mlp.changes)} test patients when one training patient is left out."
    figure = Figure("Leave-one-out retraining", caption, png(scatters(panels)))
    results = {
        "settings": {name: str(value) for name, value in asdict(arguments).items()},
        "linear": report(linear),
        "mlp": report(mlp),
    }
    file = save_evaluation(arguments.run_dir, "leave-one-out", figure, results, {})
    console.print(f"Plot and numbers: {file}", soft_wrap=True)


def linear_outcome(arguments: Arguments, data: Data) -> Outcome:
    """Linear regression, for which leaving out has a closed form.

    With H the objective's curvature and h_i = x_i^T H^-1 x_i / N, the minimum moves by H^-1 x_i r_i / (N (1 - h_i)),
    r_i the residual f(x_i) - y_i (Cook 1977): the influence function's step, divided by 1 - h_i.
    """
    model = nn.Linear(data.train[0].shape[1], 1).double()
    retraining = Retraining(model, data, arguments.weight_decay)
    everything = torch.ones(len(data.train[0]), dtype=torch.float64)
    optimum = retraining.solve(torch.zeros(data.train[0].shape[1] + 1, dtype=torch.float64), everything)
    rows = nn.functional.pad(data.train[0], (0, 1), value=1.0)  # [train, features + 1]
    residuals = rows @ optimum - data.train[1].squeeze(1)
    decay = arguments.weight_decay * torch.eye(len(optimum), dtype=torch.float64)
    steps = torch.linalg.solve(rows.T @ rows / len(rows) + decay, rows.T).T / len(rows)  # H^-1 x_i / N
    kept = 1 - (steps * rows).sum(1)  # 1 - h_i
    without = optimum + steps * (residuals / kept)[:, None]
    outcome = compare(arguments, retraining, optimum, without, "linear")
    # What the first order leaves out is known here too, so that predictions can be made exact.
    moves = nn.functional.pad(data.test[0], (0, 1), value=1.0) @ (without - optimum).T  # of test predictions
    corrected = {name: predicted / kept + 0.5 * moves.square() for name, predicted in outcome.predicted.items()}
    errors = {name: float((each - outcome.changes).abs().max()) for name, each in corrected.items()}
    largest = float(outcome.changes.abs().max())
    outcome.facts.update({f"error after correction, {name}": errors[name] / largest for name in ("kfac", "Hessian")})
    return outcome


def mlp_outcome(arguments: Arguments, data: Data) -> Outcome:
    """A network with one hidden layer, trained again without each example."""
    torch.manual_seed(arguments.seed)
    inputs = data.train[0].shape[1]
    model = nn.Sequential(nn.Linear(inputs, arguments.hidden), nn.Tanh(), nn.Linear(arguments.hidden, 1)).double()
    retraining = Retraining(model, data, arguments.weight_decay)
    everything = torch.ones(len(data.train[0]), dtype=torch.float64)
    optimum = retraining.solve(parameters_to_vector(model.parameters()).detach(), everything)
    console.print(f"Training again {len(everything)} times, each without one patient ...")
    return compare(arguments, retraining, optimum, retraining.without_each(optimum), "mlp")


def compare(arguments: Arguments, retraining: Retraining, optimum: Tensor, without: Tensor, name: str) -> Outcome:
    """Measured changes and all predictions of them."""
    vector_to_parameters(optimum, retraining.model.parameters())
    data = retraining.data
    before = retraining.losses(optimum, data.test)
    changes = torch.stack([retraining.losses(weights, data.test) for weights in without], 1) - before[:, None]
    scores = library_scores(arguments, retraining.model, data, name, GaussNewtonRegression(), tuple(METHODS))
    drawn = library_scores(arguments, retraining.model, data, f"{name}-drawn", wf.Regression(), ("kfac", "ekfac"))
    scores |= {f"{strategy}, drawn targets": values for strategy, values in drawn.items()}
    scores |= retraining.exact_scores(optimum)
    facts = {
        "weights": float(len(optimum)),
        "train": float(len(without)),
        "test": float(len(before)),
        "train_loss": float(retraining.losses(optimum, data.train).mean()),
        "test_loss": float(before.mean()),
    }
    return Outcome(changes, {each: values / len(without) for each, values in scores.items()}, facts)


def library_scores(
    arguments: Arguments, model: nn.Module, data: Data, name: str, task: wf.Regression, strategies: Sequence[str]
) -> dict[str, Tensor]:
    """Scores [test, train] by strategy, with the weight decay as damping."""
    train, test = (list(zip(*part, strict=True)) for part in (data.train, data.test))
    study = wf.Study(arguments.run_dir / name, model, task, train=train, execution=wf.Execution(progress=False))
    found = {}
    for strategy in strategies:
        method = METHODS[strategy](damping=arguments.weight_decay)
        method = replace(method, factors=study.fit(method, overwrite=arguments.overwrite))
        found[strategy] = study.score(test, method, overwrite=arguments.overwrite).values.clone()
    return found


def report(outcome: Outcome) -> dict[str, object]:
    """All numbers, as json writes them; for each training example, the change of the mean test loss."""
    return {
        "facts": outcome.facts,
        "correlations": outcome.correlations(),
        "measured": outcome.changes.mean(0).tolist(),
        "predicted": {name: values.mean(0).tolist() for name, values in outcome.predicted.items()},
    }


def table(title: str, outcome: Outcome) -> Table:
    """The correlations of every method."""
    facts = outcome.facts
    shown = Table(
        "Curvature", "Spearman", "Pearson", "Spearman, mean loss", "Pearson, mean loss", "Slope",
        title=f"{title}: {facts['weights']:.0f} weights, loss {facts['train_loss']:.3f}, test {facts['test_loss']:.3f}",
    )  # fmt: skip
    for name, found in outcome.correlations().items():
        columns = ("spearman", "pearson", "spearman_of_mean_loss", "pearson_of_mean_loss", "slope")
        shown.add_row(name, *(f"{found[column]:.3f}" for column in columns))
    return shown


def scatters(panels: Mapping[str, tuple[Outcome, str]]) -> Plot:
    """Predicted against measured change of the mean test loss, a panel for each method."""
    plot = Plot(figsize=(7.6, 7.2), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(plot)
    for (title, (outcome, method)), axes in zip(panels.items(), plot.subplots(2, 2).flat, strict=True):
        measured, predicted = (1000 * each.mean(0).numpy() for each in (outcome.changes, outcome.predicted[method]))
        ends = np.array([min(measured.min(), predicted.min()), max(measured.max(), predicted.max())])
        axes.plot(ends, ends, color=INK, linewidth=0.8, dashes=(5, 3))
        axes.scatter(predicted, measured, s=14, color=BLUE, alpha=0.5, linewidths=0)
        pearson = outcome.correlations()[method]["pearson_of_mean_loss"]
        axes.set_title(f"{title}: Pearson {pearson:.3f}", loc="left", fontsize=10)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[["top", "right"]].set_visible(False)
    plot.supxlabel("Predicted change of the mean test loss, thousandths", fontsize=10)
    plot.supylabel("Measured change", fontsize=10)
    return plot


def _only(correlations: Correlations) -> float:
    return float(correlations.values.item())


if __name__ == "__main__":
    chosen = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
