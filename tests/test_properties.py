"""What scores are by definition, on random small models: bilinear, additive, and blind to order and batches."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import wherefrom as wf
from tests.reference import BruteForce
from tests.runs import factored, with_factors
from wherefrom.curvature.factors import STRATEGIES, Factors
from wherefrom.curvature.operators import Basis, Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.modules.layers import select_layers
from wherefrom.planning.forms import BankForm
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import PairwiseCollector
from wherefrom.tasks.losses import IGNORED, summed_cross_entropy
from wherefrom.tasks.sampling import Sampler

CLASSES = 3
CPU = torch.device("cpu")


class Weighted(wf.Task[Any]):
    """Cross-entropy of every token times a weight of the example's; any mixture of two measurements.

    Examples are features [tokens, ...], labels [tokens] and a weight; sequences are padded with numbers that count for
    nothing if they are masked as they should be.

    Args:
        mixture: of the loss and of the mean square of the logits.
    """

    def __init__(self, mixture: Sequence[float] = (1.0, 0.0), layers: Sequence[str] | None = None) -> None:
        super().__init__(layers)
        self.mixture = tuple(mixture)

    def collate(self, examples: Sequence[Any]) -> Any:
        longest = max(len(labels) for _, labels, _ in examples)
        return tuple(
            torch.stack([_padded(each, longest, filling) for each in column])
            for column, filling in zip(zip(*examples, strict=True), (9.0, IGNORED, 1.0), strict=True)
        )

    def mask(self, batch: Any) -> Tensor | None:
        mask: Tensor = batch[1] != IGNORED
        return mask if mask.shape[1] > 1 else None  # a single token is never padding

    def train_loss(self, model: nn.Module, batch: Any, sampler: Sampler | None = None) -> Tensor:
        inputs, labels, weights = batch
        logits = model(inputs)
        if sampler is not None:
            labels = sampler.categorical(logits.detach(), labels != IGNORED).where(labels != IGNORED, IGNORED)
        costs: Tensor = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total: Tensor = (costs.view(labels.shape) * weights).sum()
        return total

    def measurement(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels, _ = batch
        logits, real = model(inputs), labels != IGNORED
        squares = logits.square().mean(-1).where(real, 0).sum()
        found: Tensor = self.mixture[0] * summed_cross_entropy(logits, labels) + self.mixture[1] * squares
        return found


def _padded(tensor: Tensor, longest: int, filling: float) -> Tensor:
    if tensor.dim() == 0:
        return tensor.view(1)
    padding = [0, 0] * (tensor.dim() - 1) + [0, longest - len(tensor)]
    return functional.pad(tensor, padding, value=filling)


class Pixels(nn.Module):
    """Two convolutions and a linear layer on images that come as sequences of one: [batch, 1, channels, h, w]."""

    def __init__(self, width: int, biased: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 2, padding=1, bias=biased)
        self.second = nn.Conv2d(width, 2 * width, (1, 2), stride=2, groups=width, bias=biased)
        self.last = nn.Linear(2 * width, CLASSES, bias=biased)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(images.flatten(0, 1)))))
        logits: Tensor = self.last(hidden.mean((2, 3)))
        return logits.unsqueeze(1)


@dataclass(frozen=True)
class Case:
    """A random model with random data.

    Attributes:
        kind: "mlp" (one token an example), "tokens" (one to four, padded), "images".
    """

    kind: str
    seed: int
    width: int
    biased: bool
    train: int
    queries: int
    dtype: torch.dtype = field(default=torch.float64)

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        if self.kind == "images":
            return Pixels(self.width, self.biased).to(self.dtype)
        first = nn.Linear(4, self.width, bias=self.biased)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(self.width, CLASSES)).to(self.dtype)

    def examples(self, count: int, offset: int) -> list[Any]:
        generator = torch.Generator().manual_seed(2 * self.seed + offset)
        found = []
        for _ in range(count):
            tokens = int(torch.randint(1, 5, (), generator=generator)) if self.kind == "tokens" else 1
            shape = (tokens, 2, 3, 4) if self.kind == "images" else (tokens, 4)
            features = torch.randn(shape, generator=generator).to(self.dtype)
            weight = torch.ones((), dtype=self.dtype)
            found.append((features, torch.randint(CLASSES, (tokens,), generator=generator), weight))
        return found

    @property
    def train_set(self) -> list[Any]:
        return self.examples(self.train, 0)

    @property
    def query_set(self) -> list[Any]:
        return self.examples(self.queries, 1)


def cases(*kinds: str, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        st.sampled_from(kinds or ("mlp", "tokens", "images")),
        st.integers(0, 10**6),
        st.integers(1, 4),
        st.booleans(),
        st.integers(1, 7),
        st.integers(1, 4),
        st.just(dtype),
    )


STRATEGY = st.sampled_from(list(STRATEGIES))
DAMPING = st.sampled_from([None, 1e-2, 1.0])
FEW = settings(max_examples=12, deadline=None)


class Run:
    """A study in a directory that is gone afterwards."""

    def __init__(
        self, case: Case, train: list[Any] | None = None, task: Weighted | None = None, **execution: Any
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.task, chosen = task or Weighted(), wf.Execution(progress=False, **execution)
        train = train or case.train_set
        self.study = wf.Study(self._folder.name, case.model(), self.task, train=train, execution=chosen)

    def fit(self, strategy: str) -> Factors:
        return self.study.fit(factored(strategy, empirical=True))

    def values(self, queries: list[Any], method: wf.Method) -> Tensor:
        return self.study.score(queries, method).values.clone()


def assert_alike(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    assert difference <= tolerance * float(expected.abs().max()) + 1e-300


def weighted(examples: list[Any], weights: Tensor) -> list[Any]:
    return [(x, y, weight) for (x, y, _), weight in zip(examples, weights, strict=True)]


@given(cases(), STRATEGY, DAMPING, st.tuples(st.floats(-3, 3), st.floats(-3, 3)))
@FEW
def test_scores_are_linear_in_what_is_measured(
    case: Case, strategy: str, damping: float | None, mixture: tuple[float, float]
) -> None:
    method = with_factors(Run(case).fit(strategy), damping=damping)
    one, other, both = (
        Run(case, task=Weighted(each)).values(case.query_set, method) for each in ((1.0, 0.0), (0.0, 1.0), mixture)
    )
    scale = mixture[0] * one, mixture[1] * other
    assert float((both - sum(scale)).abs().max()) <= 1e-9 * float(max(each.abs().max() for each in (one, other)))


@given(cases(), STRATEGY, DAMPING, st.floats(-3, 3), st.floats(-3, 3))
@FEW
def test_scores_are_linear_in_training_gradients(
    case: Case, strategy: str, damping: float | None, first: float, second: float
) -> None:
    """The same factors, and training losses with weights of their own."""
    method, generator = with_factors(Run(case).fit(strategy), damping=damping), torch.Generator().manual_seed(case.seed)
    plain = Run(case).values(case.query_set, method)
    one, other = torch.randn(2, case.train, generator=generator).double()
    mixed = first * one + second * other
    found = Run(case, weighted(case.train_set, mixed)).values(case.query_set, method)
    assert float((found - plain * mixed).abs().max()) <= 1e-9 * float(plain.abs().max()) * float(
        1 + abs(first) * one.abs().max() + abs(second) * other.abs().max()
    )


def random_captured(generator: torch.Generator, batch: int, tokens: int, shape: tuple[int, int]) -> Captured:
    outputs, inputs = shape
    activations = torch.randn(batch, tokens, inputs, generator=generator, dtype=torch.float64)
    gradients = torch.randn(batch, tokens, outputs, generator=generator, dtype=torch.float64)
    return Captured(activations, gradients, batch * tokens)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_products_of_a_bank_are_bilinear_and_add_up_over_tokens(
    seed: int, outputs: int, inputs: int, tokens: int, batch: int, curved: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = select_layers(nn.Sequential(nn.Linear(inputs, outputs, bias=False)))
    right, left = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (inputs, outputs)
    )
    basis = Basis(right, left, torch.ones(inputs).double(), torch.ones(outputs).double())
    filters = torch.rand(outputs, inputs, generator=generator, dtype=torch.float64)
    preconditioner = Operator({"0": basis} if curved else {}, {"0": filters})
    queries, train, more = (random_captured(generator, batch, tokens, (outputs, inputs)) for _ in range(3))

    def products(queries: Captured, train: Captured) -> Tensor:
        bank = GradientBank(layers, preconditioner, batch, BankForm(torch.float64, CPU))
        bank.collect("0", queries, slice(0, batch))
        collector = PairwiseCollector(bank, batch, torch.float64, CPU)
        collector.collect("0", train, slice(0, batch))
        return collector.sums["values"]

    def joined(one: Captured, other: Captured, scale: float) -> Captured:
        """Tokens of both, whose gradient is the one's and `scale` times the other's."""
        gradients = torch.cat([one.gradients, scale * other.gradients], 1)
        return Captured(torch.cat([one.activations, other.activations], 1), gradients, one.tokens + other.tokens)

    expected = products(queries, train) - 3 * products(queries, more)
    assert_alike(products(queries, joined(train, more, -3)), expected, 1e-10)
    expected = products(queries, train) + 2 * products(more, train)
    assert_alike(products(joined(queries, more, 2), train), expected, 1e-10)
    # The curvature is symmetric, so that either may be the query.
    assert_alike(products(queries, train), products(train, queries).T, 1e-10)


@given(cases("mlp", "tokens"), STRATEGY, DAMPING)
@FEW
def test_scores_add_up_over_tokens(case: Case, strategy: str, damping: float | None) -> None:
    run, method = Run(case), factored(strategy, empirical=True, damping=damping)
    expected = run.values(case.query_set, method)
    tokens = run.study.score(case.query_set, method, keep=wf.Tokens())
    found = torch.stack(
        [torch.stack([tokens[query, row].sum() for row in range(case.train)]) for query in range(case.queries)]
    )
    assert_alike(found, expected)
    for row, (_, labels, _) in enumerate(case.train_set):
        assert len(tokens[0, row]) == len(labels)


@given(cases(), STRATEGY, DAMPING)
@FEW
def test_scores_add_up_over_layers(case: Case, strategy: str, damping: float | None) -> None:
    """And a layer's part is the score of a study that tracks it alone."""
    method = factored(strategy, empirical=True, damping=damping)
    scores = Run(case).study.score(case.query_set, method, keep=wf.Pairs(layers=True))
    assert_alike(torch.stack(list(scores.layers.values())).sum(0), scores.values)
    for name, part in scores.layers.items():
        assert_alike(Run(case, task=Weighted(layers=[name])).values(case.query_set, method), part)


@given(cases(), STRATEGY, DAMPING, st.randoms(use_true_random=False), st.integers(1, 7), st.integers(1, 7))
@FEW
def test_scores_follow_permutations_and_ignore_batch_sizes(
    case: Case, strategy: str, damping: float | None, random: Any, fitted: int, swept: int
) -> None:
    rows, columns = list(range(case.queries)), list(range(case.train))
    whole = Run(case, train_batch_size=case.train)
    expected = whole.values(case.query_set, factored(strategy, empirical=True, damping=damping))
    random.shuffle(rows)
    random.shuffle(columns)
    train, queries = case.train_set, case.query_set
    train = [train[column] for column in columns]
    factors = Run(case, train, train_batch_size=fitted).fit(strategy)
    other = Run(case, train, train_batch_size=swept, query_batch_size=fitted)
    found = other.values([queries[row] for row in rows], with_factors(factors, damping=damping))
    assert_alike(found, expected[rows][:, columns])


@given(cases(), STRATEGY, st.sampled_from([None, 1e-2, 0.0]))
@FEW
def test_self_influence_is_the_diagonal(case: Case, strategy: str, damping: float | None) -> None:
    run, method = Run(case), factored(strategy, empirical=True, damping=damping)
    scores = run.study.score(case.train_set, method, keep=wf.Pairs(self_influence=True))
    assert scores.self_influence is not None
    assert scores.query_self_influence is not None
    found = run.study.self_influence(method)
    for each in (scores.self_influence, scores.query_self_influence, found):
        assert_alike(each, scores.values.diagonal())
    assert_alike(scores.values, scores.values.T.clone())
    assert bool((found >= 0).all())
    cosines = scores.normalized("cosine").values
    assert float(cosines.abs().max()) <= 1 + 1e-9


@given(cases())
@FEW
def test_identity_is_the_dot_product_of_gradients(case: Case) -> None:
    run = Run(case)
    found = run.values(case.query_set, wf.Dot())
    reference = BruteForce(case.model(), run.task, list(run.study.layers), case.train_set, case.query_set)
    assert_alike(found, reference.scores("identity"))


@given(cases(dtype=torch.float32), STRATEGY)
@FEW
def test_float32_scores_are_those_of_float64(case: Case, strategy: str) -> None:
    run = Run(case)
    found = run.values(case.query_set, factored(strategy, empirical=True, damping=1.0))
    train, queries = ([(x.double(), y, w.double()) for x, y, w in each] for each in (case.train_set, case.query_set))
    reference = BruteForce(case.model(), run.task, list(run.study.layers), train, queries)
    assert found.dtype == torch.float32
    assert_alike(found, reference.scores(strategy, 1.0), 1e-4)


@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(*[st.integers(1, 4)] * 2),
    counts=st.tuples(*[st.integers(1, 5)] * 2),
    biased=st.booleans(),
    strategy=st.sampled_from(["kfac", "ekfac"]),
    damping=st.sampled_from([None, 0.3, 0.0]),
)
@settings(max_examples=40, deadline=None)
def test_of_a_kronecker_product_the_inverse_is_exact(
    seed: int, sizes: tuple[int, int], counts: tuple[int, int], biased: bool, strategy: str, damping: float | None
) -> None:
    """Every input with every output gradient: E[vec(G) vec(G)^T] is S x A, also where it has no full rank."""
    torch.manual_seed(seed)
    model = nn.Linear(*sizes, bias=biased).double()
    inputs = torch.randn(counts[0], sizes[0], dtype=torch.float64)
    residuals = torch.randn(counts[1], sizes[1], dtype=torch.float64)
    examples = [(x, model(x).detach() - residual) for x in inputs for residual in residuals]
    gradients = torch.stack(
        [torch.outer(r, torch.cat([x, torch.ones(int(biased)).double()])).flatten() for x in inputs for r in residuals]
    )
    curvature = gradients.T @ gradients / len(gradients)  # dense, [out * in, out * in]
    if damping == 0:
        inverse = torch.linalg.pinv(curvature, hermitian=True, rtol=1e-10)
    else:
        added = 0.1 * float(curvature.diagonal().mean()) if damping is None else damping
        inverse = torch.linalg.inv(curvature + added * torch.eye(len(curvature), dtype=torch.float64))
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, nn.Sequential(model), wf.Regression(), train=examples)
        found = study.score(examples, factored(strategy, empirical=True, damping=damping)).values.clone()
    assert_alike(found, gradients @ inverse @ gradients.T, 1e-9 if damping != 0 else 1e-5)
