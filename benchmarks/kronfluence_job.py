"""The same job through kronfluence 1.0.1, set up as in its own WikiText example."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D
from workload import Stopwatch, Workload


def as_linear(model: nn.Module) -> nn.Module:
    """A copy with every Conv1D turned into a Linear of the same function, which is what kronfluence can track."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1])
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


class LanguageModelling(Task):  # type: ignore[misc]
    """The loss, the measurement and the tracked layers of its example."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        """The summed loss, with the dataset's labels or with drawn ones."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits[..., :-1, :].reshape(-1, logits.size(-1))
        if sample:
            with torch.no_grad():
                probabilities = functional.softmax(logits.detach(), dim=-1)
                labels = torch.multinomial(probabilities, num_samples=1).flatten()
        else:
            labels = batch["labels"][..., 1:].reshape(-1)
        return functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """The summed loss of queries."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """The layers of the blocks."""
        return self.layers

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        """Which tokens are real."""
        return batch["attention_mask"]


def run(
    work: Workload, folder: Path, watch: Stopwatch, empirical: bool, train_batch: int, query_batch: int, half: bool
) -> Tensor:
    """Fit ek-fac factors and score all pairs; the scores [queries, train]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = work.model()
    layers = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    task = LanguageModelling(layers)
    prepared = prepare_model(as_linear(model).to(device), task)
    analyzer = Analyzer("benchmark", prepared, task, cpu=device == "cpu", output_dir=str(folder), disable_tqdm=True)
    train, queries = (_rows(work.sequences(*each)) for each in ((work.train, 1), (work.queries, 2)))
    factors = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical)
    scores = ScoreArguments(damping_factor=None)
    if half:
        factors.amp_dtype = scores.amp_dtype = torch.bfloat16
        factors.activation_covariance_dtype = factors.gradient_covariance_dtype = torch.bfloat16
        factors.per_sample_gradient_dtype = factors.lambda_dtype = torch.bfloat16
        scores.per_sample_gradient_dtype = scores.score_dtype = torch.bfloat16
    with watch.stage("covariances and eigenbasis"):
        analyzer.fit_covariance_matrices("factors", train, train_batch, factor_args=factors)
        analyzer.perform_eigendecomposition("factors", factor_args=factors)
    with watch.stage("eigenvalues"):
        analyzer.fit_lambda_matrices("factors", train, train_batch, factor_args=factors)
    with watch.stage("pairwise scores"):
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, train, query_batch, train_batch, score_args=scores
        )
    found: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return found


def _rows(sequences: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
        for tokens in (row["input_ids"] for row in sequences)
    ]
