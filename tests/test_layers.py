"""Every kind of layer against brute force in float64: gradients, curvature, scores, tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, Case, Sequences, gpt2, relative_error, sequences, token_rows
from tests.reference import BruteForce, gradient_products
from tests.runs import factored, with_factors
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.engine.capture import Capture, Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.planning.forms import BankForm
from wherefrom.scoring.bank import GradientBank

SEED = 5


class Network(nn.Module):
    """Some layers one after the other, with tanh between them, and a classifier on the mean over positions."""

    def __init__(self, *layers: nn.Module, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.classifier = nn.Linear(features, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        result: Tensor = self.classifier(hidden.flatten(2).mean(2))
        return result


def images(*shape: int, count: int = 13) -> list[object]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64), torch.randint(3, (), generator=generator))
        for _ in range(count)
    ]


def convolution_case(model: nn.Module, *shape: int) -> Case:
    rows = images(*shape)
    return Case(model.double(), wf.Classification(), rows[:9], rows[9:])


def conv1d_case() -> Case:
    """One of the convolutions is called twice; it has groups and wraps around."""
    torch.manual_seed(0)
    twice = nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular")
    model = Network(nn.Conv1d(3, 4, 3, stride=2, padding=1), twice, twice, features=4)
    # Around 6 positions, the three taps of a patch would be alike, and eigenvectors any of a plane.
    return convolution_case(model, 3, 14)


def conv2d_case() -> Case:
    torch.manual_seed(0)
    model = Network(
        nn.Conv2d(2, 4, (3, 2), padding=(2, 1), padding_mode="reflect", bias=False),
        nn.Conv2d(4, 4, 3, stride=(2, 1), groups=4),
        nn.Conv2d(4, 2, 1),
        features=2,
    )
    return convolution_case(model, 2, 5, 6)


def conv3d_case() -> Case:
    torch.manual_seed(0)
    model = Network(nn.Conv3d(1, 2, 2, padding="valid"), nn.Conv3d(2, 2, (1, 2, 2), dilation=(1, 2, 1)), features=2)
    return convolution_case(model, 1, 3, 4, 4)


class Normalised(nn.Module):
    """Normalisations over one and two dimensions, with and without biases and weights, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.both = nn.LayerNorm((2, 3))
        self.plain = nn.LayerNorm(6, bias=False)
        self.weightless = nn.LayerNorm(6, elementwise_affine=False)
        self.root = nn.RMSNorm(6)
        self.last = nn.Linear(6, 3)
        for module in (self.both, self.plain, self.root):
            nn.init.normal_(module.weight, 1.0, 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.root(torch.tanh(self.both(self.first(inputs).unflatten(-1, (2, 3))).flatten(-2)))
        hidden = self.root(torch.tanh(self.weightless(self.plain(hidden))))
        result: Tensor = self.last(hidden).mean(1)
        return result


def norm_case() -> Case:
    torch.manual_seed(0)
    rows = images(4, 6)
    return Case(Normalised().double(), wf.Classification(["*"]), rows[:9], rows[9:])


class Bags(nn.Module):
    """Two calls of an embedding, one of them with a padding index that examples do hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.last = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        left, right = self.embedding(ids[:, :3]), self.embedding(ids[:, 2:])
        result: Tensor = self.last(torch.tanh(left.sum(1)) * right.mean(1))
        return result


def embedding_case() -> Case:
    torch.manual_seed(0)
    rows: list[object] = [(torch.randint(7, (6,)), torch.randint(3, ())) for _ in range(13)]
    rows.append((torch.full((6,), 8), torch.tensor(1)))  # a query of which no training example holds the id
    return Case(Bags().double(), wf.Classification(["*"]), rows[:9], rows[9:])


def language_case(model: nn.Module, *patterns: str) -> Case:
    return Case(model, wf.CausalLM(patterns), token_rows(9), token_rows(4, seed=4))


def untied_case() -> Case:
    """Token embeddings, positions that are the same for all examples, and layers of every other kind."""
    model = gpt2(layers=1)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.4)
    return language_case(model, "transformer.*")


def tied_case() -> Case:
    return language_case(gpt2(layers=1), "lm_head", "transformer.h.0.mlp.*", "transformer.wpe")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.float64)
    return model


def llama_case() -> Case:
    return language_case(llama(), "*norm", "model.embed_tokens", "model.layers.0.mlp.*")


def heads_case(kind: str) -> Case:
    """Normalisations of each head, [batch, tokens, heads, width] in Qwen3 and [batch, heads, tokens, width] in Apertus.

    Some batches have as many heads as tokens.
    """
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=16, initializer_range=0.4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    nn.Module.to(model, torch.float64)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 1.0, 0.5)
    return language_case(model, "*.[qk]_*")


CASES: dict[str, Callable[[], Case]] = {
    "conv1d": conv1d_case,
    "conv2d": conv2d_case,
    "conv3d": conv3d_case,
    "norms": norm_case,
    "embedding": embedding_case,
    "untied gpt2": untied_case,
    "tied gpt2": tied_case,
    "llama": llama_case,
    "heads after tokens": functools.partial(heads_case, "Qwen3"),
    "heads before tokens": functools.partial(heads_case, "Apertus"),
}


@functools.cache
def brute_force(name: str, seed: int | None) -> BruteForce:
    case = CASES[name]()
    layers = list(select_layers(case.model, case.task.layers))
    return BruteForce(case.model, case.task, layers, case.train, case.queries, seed)


@pytest.mark.parametrize("empirical", [False, True], ids=["sampled", "empirical"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_brute_force(tmp_path: Path, name: str, strategy: str, empirical: bool) -> None:
    """In batches and in one; with query gradients in one and in several blocks."""
    case = CASES[name]()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(factored(strategy, empirical=empirical, seed=SEED), execution=wf.Execution(train_batch_size=4))
    expected = brute_force(name, None if empirical else SEED).scores(strategy)
    for sizes in ((4, 3), (9, 4)):
        execution = wf.Execution(train_batch_size=sizes[0], query_batch_size=sizes[1])
        scores = study.score(case.queries, with_factors(factors), name=f"{sizes[0]}", execution=execution)
        assert relative_error(scores.values, expected) < 1e-8


@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
@pytest.mark.parametrize("name", ["untied gpt2", "tied gpt2", "llama"])
def test_token_scores_equal_brute_force(tmp_path: Path, name: str, strategy: str) -> None:
    """A tied weight's tokens are seen by both of its modules."""
    case, brute = CASES[name](), brute_force(name, None)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method, execution = factored(strategy, empirical=True, damping=0.1), wf.Execution(train_batch_size=4)
    tokens = study.score(case.queries, method, keep=wf.Tokens(), execution=execution)
    for query, example in ((0, 0), (2, 7), (3, 8)):
        expected = torch.zeros(int(tokens.lengths[example]), dtype=torch.float64)
        for layer in brute.layers:
            gradient = brute.queries[query][layer].detach()
            if strategy == "ekfac":
                damped = brute.curvature(strategy, layer).detach() + 0.1 * torch.eye(gradient.numel()).double()
                gradient = torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)
            activations, gradients = brute.tokens[example][layer]
            each = torch.einsum("to,oi,ti->t", gradients, gradient, activations)
            expected += each.view(-1, len(expected)).sum(0).detach()
        assert relative_error(tokens[query, example], expected) < 1e-8


@pytest.mark.parametrize("name", ["conv1d", "norms", "embedding", "untied gpt2", "tied gpt2"])
def test_factors_are_loaded_as_they_were_fitted_and_low_rank_is_exact_where_it_suffices(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, wf.EKFAC()).values
    again = wf.Study(tmp_path, case.model, case.task, train=case.train)
    assert relative_error(again.score(case.queries, wf.EKFAC(), name="again").values, expected) < 1e-12
    low = again.score(case.queries, wf.EKFAC(query_rank=50))
    assert relative_error(low.values, expected) < 1e-9


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("name", ["conv2d", "norms", "tied gpt2"])
def test_wide_factors_count_with_their_diagonal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, strategy: str
) -> None:
    monkeypatch.setattr("wherefrom.engine.modules.layers.WIDEST", 9)
    case = CASES[name]()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    assert any(any(layer.diagonal_factors) for layer in study.layers.values())
    found = study.score(case.queries, factored(strategy, empirical=True)).values
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries, widest=9)
    assert relative_error(found, brute.scores(strategy)) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_close(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    floats = copy.deepcopy(case.model).float()
    rows = [
        [
            tuple(x.float() if x.is_floating_point() else x for x in row) if isinstance(row, tuple) else row
            for row in each
        ]
        for each in (case.train, case.queries)
    ]
    study = wf.Study(tmp_path, floats, case.task, train=rows[0])
    found = study.score(rows[1], wf.KFAC(empirical=True), execution=wf.Execution(half_precision=True)).values
    assert relative_error(found, brute_force(name, None).scores("kfac")) < 0.05


@given(data=st.data(), dimensions=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_the_gradient_of_a_convolution_is_its_tokens_product(data: Any, dimensions: int, seed: int) -> None:
    """Any setting: the products of what is captured, example by example, against autograd on the weight."""

    def draw(low: int, high: int) -> tuple[int, ...]:
        drawn: tuple[int, ...] = data.draw(st.tuples(*[st.integers(low, high)] * dimensions))
        return drawn

    kernel, dilation, groups = draw(1, 3), draw(1, 2), data.draw(st.sampled_from([1, 2, 4]))
    padding = data.draw(st.sampled_from(["same", "valid"]) | st.just(draw(0, 2)))
    stride = (1,) * dimensions if padding == "same" else draw(1, 3)
    mode, biased = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])), data.draw(st.booleans())
    size = tuple(
        data.draw(st.integers(max(4, step * (width - 1) + 1), 7)) for width, step in zip(kernel, dilation, strict=True)
    )
    torch.manual_seed(seed)
    kinds: list[Any] = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    layer = kinds[dimensions - 1](4, 4, kernel, stride, padding, dilation, groups, biased, mode, dtype=torch.float64)
    inputs = torch.randn(3, 4, *size, dtype=torch.float64)
    output = layer(inputs)
    wanted = torch.randn_like(output)
    expected = [
        torch.autograd.grad((layer(inputs[row : row + 1]) * wanted[row : row + 1]).sum(), list(layer.parameters()))
        for row in range(3)
    ]
    model = nn.Sequential(layer)
    layers, found = select_layers(model), []

    def loss() -> Tensor:
        total: Tensor = (model(inputs) * wanted).sum()
        return total

    with Capture(model, layers, lambda _, captured: found.append(weight_gradients(captured))) as capture:
        capture.run(loss, 3)
    for row, parts in enumerate(expected):
        flat = torch.cat([part.reshape(4, -1) for part in parts], 1)
        assert relative_error(found[0][row, :, : flat.shape[1]], flat) < 1e-10
        assert layers["0"].shape == flat.shape


def normalisation(kind: str) -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    made: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(6),
        "root": nn.RMSNorm(6),
        "llama": LlamaRMSNorm(6),
        "gemma, by 1 + w": GemmaRMSNorm(6),
    }
    torch.manual_seed(0)
    for parameter in made[kind].parameters():
        nn.init.normal_(parameter)
    return made[kind]


class Causal(nn.Module):
    """Convolutions that see the past alone, because what is padded at the end is cut off; the last one is not cut."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(4, 4, 3, padding=4, dilation=2)
        self.grouped = nn.Conv1d(4, 4, 2, padding=1, groups=4)
        self.head, self._cut = nn.Linear(4, 3), cut

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        length = inputs.shape[1]
        hidden = torch.tanh(self.first(inputs.transpose(1, 2))[..., :length])
        hidden = torch.tanh(self.grouped(hidden)[..., : length + (not self._cut)]).transpose(1, 2)
        logits: Tensor = self.head((hidden * mask[:, :, None] if self._cut else hidden).sum(1))
        return logits


@pytest.mark.parametrize("cut", [True, False])
def test_a_causal_convolution_has_the_tokens_of_its_input(tmp_path: Path, cut: bool) -> None:
    """Nor do scores depend on what is padded; a convolution that is not cut is its own business without a mask."""
    model, task, rows = Causal(cut).double(), Sequences(), sequences(9)
    rows = rows if cut else [(inputs[:2], label) for inputs, label in cast(list[Any], rows)]
    expected = gradient_products(model, task, lambda name: True, rows, rows)
    scores = []
    for size in (1, 4):
        study = wf.Study(tmp_path / str(size), model, task, train=rows)
        execution = wf.Execution(train_batch_size=size, query_batch_size=size)
        found = study.score(rows, wf.Dot(), execution=execution).values
        assert relative_error(found, expected) < 1e-12
        scores.append(study.score(rows, wf.EKFAC(), execution=execution).values)
    assert relative_error(scores[1], scores[0]) < 1e-9


@pytest.mark.parametrize("kind", ["layer", "root", "llama", "gemma, by 1 + w"])
def test_the_gradient_of_a_normalisation_is_its_tokens_sum(kind: str) -> None:
    layer = normalisation(kind)
    model, inputs, wanted = nn.Sequential(layer), torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    found: list[Tensor] = []

    def loss() -> Tensor:
        total: Tensor = (model(inputs) * wanted).sum()
        return total

    layers = select_layers(model, ["0"])
    with Capture(model, layers, lambda _, captured: found.append(weight_gradients(captured))) as capture:
        capture.run(loss, 3)
    for row in range(3):
        expected = torch.autograd.grad((layer(inputs[row]) * wanted[row]).sum(), list(layer.parameters()))
        assert relative_error(found[0][row, 0], torch.cat(expected)) < 1e-6


def test_embeddings_of_a_large_vocabulary_take_what_queries_touch(tmp_path: Path) -> None:
    """50,000 ids, of which few are seen, score as the few alone would."""
    torch.manual_seed(0)
    small = embedding_case()
    few: Any = small.model
    many = copy.deepcopy(few)
    many.embedding = nn.Embedding(50_000, 4, padding_idx=2).double()
    ids = torch.tensor([7, 49_999, 2, 12_345, 20_000, 1, 0, 30_000, 40_000])
    with torch.no_grad():
        many.embedding.weight[ids] = few.embedding.weight
    rows = [[(ids[row[0]], row[1]) for row in each] for each in (small.train, small.queries)]  # type: ignore[index]
    for strategy in ("identity", "kfac"):
        one = wf.Study(tmp_path / "few", few, small.task, train=small.train)
        other = wf.Study(tmp_path / "many", many, small.task, train=rows[0])
        expected = one.score(small.queries, factored(strategy, empirical=True, damping=0.01)).values
        factors = other.fit(factored(strategy, empirical=True))
        assert relative_error(other.score(rows[1], with_factors(factors, damping=0.01)).values, expected) < 1e-9
    plan = other.plan(rows[1])
    assert plan.form.bytes_per_query(other.layers) < 8 * (4 * 7 + 7 + 3 * 8) + 100  # 7 ids of 4 features, and the rest


def test_a_bank_adds_up_from_parts(tmp_path: Path) -> None:
    """Queries collected by two banks, zeros elsewhere, and of more ids than there was room for."""
    case = embedding_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    preconditioner = study.fit(wf.EKFAC()).preconditioner()
    banks = [
        GradientBank(study.layers, preconditioner, 5, BankForm(torch.float64, torch.device("cpu"), tokens=tokens))
        for tokens in (7, 7, 2)
    ]
    batches: dict[str, list[Captured]] = {name: [] for name in study.layers}
    for row in range(5):
        one = Examples(case.queries, case.task).subset([row])
        study._sweep.probe(one, lambda layer, captured: batches[layer].append(captured))
    for layer, captured in batches.items():
        for row, each in enumerate(captured):
            banks[2].collect(layer, each, slice(row, row + 1))
            banks[row % 2].collect(layer, each, slice(row, row + 1))
    for layer, captured in batches.items():
        expected = torch.stack([each.gradients[0].T @ each.activations[0] for each in captured])
        assert expected.abs().max() > 0
        for each in captured:
            whole = banks[2].product(layer, each)
            parts = [bank.product(layer, each) for bank in banks[:2]]
            assert relative_error(parts[0] + parts[1], whole) < 1e-12
    for name in banks[0].sums:
        banks[0].sums[name] += banks[1].sums[name]
    layer = "embedding"
    assert (
        relative_error(banks[0].product(layer, batches[layer][0]), banks[2].product(layer, batches[layer][0])) < 1e-12
    )
