"""Numbers at the edge: what is not finite, vanishes, overflows or has no inverse gives defined scores or an error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import wherefrom as wf
from tests.models import relative_error, widened
from tests.reference import BruteForce
from tests.runs import factored, with_factors
from wherefrom.curvature.damping import damped_inverse
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.runtime.errors import LossError
from wherefrom.tasks.losses import IGNORED, summed_cross_entropy
from wherefrom.tasks.sampling import Sampler

DAMPINGS = (None, 0.0, 1e-3)
CURVED = [name for name in STRATEGIES if name != "identity"]


def vectors(count: int, width: int = 4, classes: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Pairs of features [width] and a label."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator).to(dtype)
    return [(each, torch.randint(classes, (), generator=generator)) for each in features]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def study(path: Path, model: nn.Module, train: Any, task: Any = None, **execution: Any) -> wf.Study[Any]:
    return wf.Study(path, model, task or wf.Classification(), train=train, execution=wf.Execution(**execution))


# What is not finite


class Hidden(nn.Module):
    """A loss that stays finite while a tracked layer's input, or the gradient of its output, is not.

    The first feature says what is wrong with an example: 1 makes an activation infinite, 2 a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        wrong = inputs[..., :1]
        hidden = torch.tanh(self.first(inputs))
        side = self.side(torch.where(wrong == 1, torch.inf, hidden))
        side = torch.where(wrong == 1, 0.0, side)
        root = torch.where(wrong == 2, side * 0, side.square() + 1).sqrt()
        logits: Tensor = self.last(hidden + root)
        return logits


def with_fault(kind: int, position: int, count: int = 12) -> Any:
    examples = vectors(count)
    examples[position][0][0] = kind
    return examples


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("strategy", ["diagonal", "ekfac"])
def test_a_finite_loss_does_not_hide_what_is_not_finite(tmp_path: Path, kind: int, strategy: str) -> None:
    where = ["Activations of layer 'side' are inf", "Output gradients of layer 'side' are nan"][kind - 1]
    stage = {"diagonal": "eigenvalues", "ekfac": "covariance"}[strategy]
    made = study(tmp_path, Hidden().double(), with_fault(kind, 7), checkpoint_seconds=0, train_batch_size=3)
    expected = rf"{stage}: the loss of examples 6 to 8 is finite, and its gradients are not\. {where} for example 7\."
    with pytest.raises(LossError, match=expected):
        made.fit(factored(strategy, empirical=True))
    assert not list(tmp_path.rglob("manifest.json"))
    for file in tmp_path.rglob("*.safetensors"):  # the sums of the batches before are good, and stay
        assert all(bool(each.isfinite().all()) for each in load_file(file).values())


@pytest.mark.parametrize("rank", [None, 1])
def test_a_query_that_is_not_finite_is_named(tmp_path: Path, rank: int | None) -> None:
    made = study(tmp_path, Hidden().double(), vectors(6), query_batch_size=2)
    with pytest.raises(LossError, match=r"query gradients: .*Activations of layer 'side' are inf for example 4\."):
        made.score(with_fault(1, 4, 5), wf.Dot(query_rank=rank))


def test_a_training_example_is_named_by_its_place_in_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are computed in parts, each a sweep of its own over some positions."""
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_BYTES", 1)
    monkeypatch.setattr("wherefrom.planning.plan.SHARD_EXAMPLES", 1)
    made = study(tmp_path, Hidden().double(), with_fault(2, 10), train_batch_size=3)
    with pytest.raises(LossError, match=r"pairwise scores: the loss of examples 9 to 11 .* for example 10\."):
        made.score(vectors(2), wf.Dot())
    with pytest.raises(LossError, match=r"self-influence: .* for example 10\."):
        made.self_influence(wf.Dot())


def test_a_loss_that_is_not_finite_names_the_layer_too(tmp_path: Path) -> None:
    train = vectors(9)
    train[5][0][2] = torch.nan
    expected = r"the loss of examples 4 to 5 is nan\. Activations of layer '0' are nan for example 5\."
    with pytest.raises(LossError, match=expected):
        study(tmp_path, mlp(), train, train_batch_size=2).fit(wf.EKFAC(empirical=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_that_overflow_name_their_layer(tmp_path: Path, strategy: str) -> None:
    """Activations whose squares float32 does not hold, in a layer whose output is small."""
    model = mlp(torch.float32)
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator]
    train = vectors(8, dtype=torch.float32)
    for features, _ in train[4:]:
        features.mul_(1e25)
    made = study(tmp_path, model, train, train_batch_size=2, query_batch_size=2)
    expected = r"layer '0' are finite \(activations reach \d\.?\d*e\+25.*overflow with examples 4 to 5\."
    with pytest.raises(LossError, match=expected):
        made.score(train[4:6], factored(strategy))


def test_a_float16_model_that_overflows_is_an_error(tmp_path: Path) -> None:
    model = mlp(torch.float16)
    with torch.no_grad():
        model[0].weight.mul_(3e4)  # type: ignore[operator]
    model[1] = nn.ReLU()
    train = [(30 * features, label) for features, label in vectors(6, dtype=torch.float16)]
    with pytest.raises(LossError, match=r"Activations of layer '2' are inf for example"):
        study(tmp_path, model, train).fit(wf.EKFAC(empirical=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_score_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    train, queries = vectors(12, dtype=dtype), vectors(3, seed=1, dtype=dtype)
    model = mlp(dtype)
    made = study(tmp_path, model, train)
    scores = made.score(queries, wf.EKFAC(empirical=True))
    reference = BruteForce(model, wf.Classification(), ["0", "2"], widened(train), widened(queries))
    assert scores.values.dtype == torch.float32
    assert relative_error(scores.values, reference.scores("ekfac")) < 20 * torch.finfo(dtype).eps


# Padding


class Tagging(wf.Task[Any]):
    """One label for every token of sequences that are padded with a given number."""

    def __init__(self, padding: float) -> None:
        super().__init__()
        self._padding = padding

    def collate(self, examples: Sequence[Any]) -> Any:
        longest = max(len(features) for features, _ in examples)
        rows = [functional.pad(x, (0, 0, 0, longest - len(x)), value=self._padding) for x, _ in examples]
        labels = [functional.pad(y, (0, longest - len(y)), value=IGNORED) for _, y in examples]
        return torch.stack(rows), torch.stack(labels)

    def mask(self, batch: Any) -> Tensor:
        mask: Tensor = batch[1] != IGNORED
        return mask

    def train_loss(self, model: nn.Module, batch: Any, sampler: Sampler | None = None) -> Tensor:
        logits, labels = model(batch[0]), batch[1]
        if sampler is not None:
            labels = sampler.categorical(logits.detach(), labels != IGNORED).where(labels != IGNORED, IGNORED)
        return summed_cross_entropy(logits, labels)


def sequences(count: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    return [
        (torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)) for n in lengths
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_padding_may_hold_anything(tmp_path: Path, strategy: str, padding: float) -> None:
    train, queries = sequences(9, 1), sequences(4, 2)
    made = study(tmp_path, mlp(), train, Tagging(padding), train_batch_size=5)
    scores = made.score(queries, factored(strategy))
    expected = BruteForce(mlp(), Tagging(0.0), ["0", "2"], train, queries, seed=0).scores(strategy)
    assert relative_error(scores.values, expected) < 1e-9


# Damping of zero


def rank_deficient(dtype: torch.dtype) -> tuple[nn.Sequential, Any, Any]:
    """A feature twice and one that is a sum of others; softmax gradients that sum to zero over the classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    mixed = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 1]], dtype=dtype)
    train, queries = (
        [(features @ mixed, label) for features, label in vectors(count, 3, seed=seed, dtype=dtype)]
        for count, seed in ((14, 1), (4, 2))
    )
    return model, train, queries


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strategy", CURVED)
def test_damping_zero_is_the_pseudo_inverse(tmp_path: Path, strategy: str, dtype: torch.dtype) -> None:
    model, train, queries = rank_deficient(dtype)
    made = study(tmp_path, model, train)
    scores = made.score(queries, factored(strategy, empirical=True, damping=0.0))
    reference = BruteForce(model, wf.Classification(), ["0", "2"], widened(train), widened(queries))
    expected = torch.zeros(4, 14, dtype=torch.float64)
    for layer in reference.layers:
        curvature = reference.curvature(strategy, layer)
        left, right = (torch.stack([g[layer].flatten() for g in each]) for each in (reference.queries, reference.train))
        rank = int(torch.linalg.matrix_rank(curvature, hermitian=True, rtol=1e-11))
        assert rank < len(curvature) or strategy == "diagonal"
        expected += left @ torch.linalg.pinv(curvature, hermitian=True, rtol=1e-11) @ right.T
    assert relative_error(scores.values, expected) < (1e-6 if dtype == torch.float64 else 2e-2)


def test_other_dampings_leave_nothing_out() -> None:
    eigenvalues = torch.logspace(-30, 0, 12, dtype=torch.float64).view(3, 4)
    for damping in (1e-12, 0.3):
        assert torch.equal(damped_inverse(eigenvalues, damping, ()), 1 / (eigenvalues + damping))
    assert torch.equal(damped_inverse(eigenvalues, None, ()), 1 / (eigenvalues + 0.1 * float(eigenvalues.mean())))
    found = damped_inverse(eigenvalues, 0.0, ())
    # Means of squares of gradients that float64 tells from zero beside the largest.
    assert torch.equal(found, torch.where(eigenvalues > 2.0**-104, 1 / eigenvalues, 0))


# Layers without gradients


class PartlyDead(nn.Module):
    """`dead` gives zeros for every input, `reads_zeros` sees nothing else, and `unused` has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.alive, self.dead, self.last = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)
        self.reads_zeros, self.unused = nn.Linear(2, 5, bias=False), nn.Linear(5, 5)
        nn.init.constant_(self.dead.bias, -100.0)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.alive(inputs))
        self.unused(hidden)
        logits: Tensor = self.last(hidden + self.reads_zeros(torch.relu(self.dead(hidden))))
        return logits


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_without_gradients_have_no_part(
    tmp_path: Path, strategy: str, damping: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, train, queries = PartlyDead().double(), vectors(10), vectors(3, seed=1)
    made = study(tmp_path, model, train)
    with caplog.at_level(logging.WARNING, "wherefrom"):
        factors = made.fit(factored(strategy, empirical=True))
    assert ("3 layer(s) have no gradient" in caplog.text) == (STRATEGIES[strategy].eigenvalues == "fitted")
    method = with_factors(factors, damping=damping)
    scores = made.score(queries, method, keep=wf.Pairs(layers=True, self_influence=True))
    for layer in ("dead", "reads_zeros", "unused"):
        assert not scores.layers[layer].any()
    assert bool(scores.values.isfinite().all())
    alive = BruteForce(model, wf.Classification(), ["alive", "last"], train, queries)
    if damping == 0:
        expected = torch.zeros(3, 10, dtype=torch.float64)
        for layer in alive.layers:
            left, right = (torch.stack([g[layer].flatten() for g in each]) for each in (alive.queries, alive.train))
            matrix = torch.eye(left.shape[1]).double() if strategy == "identity" else alive.curvature(strategy, layer)
            expected += left @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-11) @ right.T
    else:
        expected = alive.scores(strategy, damping)
    assert relative_error(scores.values, expected) < 1e-6
    assert torch.allclose(made.self_influence(method), made.score(train, method, name="own").values.diagonal())


def test_nothing_to_learn_from_is_a_score_of_zero(tmp_path: Path) -> None:
    """Residuals of exactly zero: no curvature, no training gradient, and queries that have one."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    features = vectors(5, 3)
    train = [(x, model(x).detach()) for x, _ in features]
    queries = [(x, model(x).detach() + 1) for x, _ in features]
    made = study(tmp_path, model, train, wf.Regression())
    for strategy in STRATEGIES:
        for damping in DAMPINGS:
            method = factored(strategy, empirical=True, damping=damping)
            scores = made.score(queries, method, keep=wf.Pairs(self_influence=True))
            assert not scores.values.any()
            assert not scores.normalized("cosine").values.any()


@pytest.mark.parametrize("damping", [None, 1e-3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_smallest_study(tmp_path: Path, strategy: str, damping: float | None, biased: bool) -> None:
    """One example, one query, one output, one input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=biased)).double()
    train, query = ([(torch.randn(1).double(), torch.randn(1).double())] for _ in range(2))
    made = study(tmp_path, model, train, wf.Regression())
    scores = made.score(query, factored(strategy, empirical=True, damping=damping))
    expected = BruteForce(model, wf.Regression(), ["0"], train, query).scores(strategy, damping)
    assert scores.values.shape == (1, 1)
    assert relative_error(scores.values, expected) < 1e-12


# Scales of losses


class Scaled(wf.Classification):
    """Cross-entropy times a number; the measurement times another."""

    def __init__(self, train: float = 1.0, query: float = 1.0) -> None:
        super().__init__()
        self.scales = (train, query)

    def train_loss(self, model: nn.Module, batch: Any, sampler: Sampler | None = None) -> Tensor:
        return self.scales[0] * super().train_loss(model, batch, sampler)

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        return self.scales[1] * super().train_loss(model, batch)


def scaled_scores(
    path: Path, strategy: str, dtype: torch.dtype, train: float = 1.0, query: float = 1.0, damping: float | None = None
) -> Tensor:
    made = study(path / f"{train} {query}", mlp(dtype), vectors(9, dtype=dtype), Scaled(train, query))
    return made.score(vectors(4, seed=1, dtype=dtype), factored(strategy, damping=damping)).values.double()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e30), (torch.float64, 1e-30), (torch.float32, 2.0**20)])
def test_scores_follow_the_scales_of_losses(tmp_path: Path, strategy: str, dtype: torch.dtype, scale: float) -> None:
    """g_q^T (C + 0.1 mean C)^-1 g_t: linear in g_q; with a training loss c L, C is c^2 and g_t c times as large."""
    plain = scaled_scores(tmp_path, strategy, dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert relative_error(scaled_scores(tmp_path, strategy, dtype, query=scale), scale * plain) < tolerance
    power = 1 if strategy == "identity" else -1
    assert relative_error(scaled_scores(tmp_path, strategy, dtype, train=scale), scale**power * plain) < tolerance


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_queries_may_have_any_scale(tmp_path: Path, strategy: str, scale: float) -> None:
    plain = scaled_scores(tmp_path, strategy, torch.float32)
    assert relative_error(scaled_scores(tmp_path, strategy, torch.float32, query=scale), scale * plain) < 1e-5


@pytest.mark.parametrize("damping", [None, 0.0])
@pytest.mark.parametrize("strategy", CURVED)
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-18, 1e20, 1e30])
def test_squares_that_float32_does_not_hold_are_an_error(
    tmp_path: Path, strategy: str, scale: float, damping: float | None
) -> None:
    advice = r"ayer '\d'.*(curvature is zero|too small|overflow|too large).*float64"
    with pytest.raises(LossError, match=advice):
        scaled_scores(tmp_path, strategy, torch.float32, train=scale, damping=damping)


def test_factors_of_vanished_squares_have_no_self_influence_or_tokens(tmp_path: Path) -> None:
    train = vectors(5, dtype=torch.float32)
    made = study(tmp_path, mlp(torch.float32), train, Scaled(1e-30))
    method = wf.EKFAC(empirical=True)
    for asked in (lambda: made.self_influence(method), lambda: made.score(train, method, keep=wf.Tokens())):
        with pytest.raises(LossError, match=r"Layer '2': its curvature is zero in all directions"):
            asked()
    # A damping above zero defines the scores: gradients over it.
    scores = made.score(vectors(2, dtype=torch.float32), replace(method, damping=1.0))
    assert bool(scores.values.isfinite().all())
