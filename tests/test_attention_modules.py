"""`nn.MultiheadAttention` and the layers of PyTorch's transformer, whose projections are used by functions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.dense_gauss_newton import study_of, system_of
from tests.models import Case, Sequences, relative_error, sequences
from tests.reference import gradient_products
from tests.runs import factored
from wherefrom.engine.modules.coverage import coverage, mostly_left_out, untracked
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.modules.written.attention import attention_forward, attention_maps
from wherefrom.runtime.errors import LayerError

BATCH, QUERIES, KEYS, FEATURES, HEADS = 3, 4, 5, 6, 2
PROJECTIONS = ["in_proj.q", "in_proj.k", "in_proj.v", "out_proj"]


def masks(kind: str) -> dict[str, Any]:
    """Arguments of one kind of mask, none of which hides all keys from a query."""
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(KEYS) >= torch.tensor([5, 3, 2])[:, None]
    pairs = torch.rand(BATCH * HEADS, QUERIES, KEYS, generator=generator) > 0.6
    pairs[..., 0] = False
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), "is_causal": True},
        "pairs and padding": {"attn_mask": pairs, "key_padding_mask": padding},
        "numbers": {
            "attn_mask": torch.randn(QUERIES, KEYS, generator=generator).double(),
            "key_padding_mask": torch.zeros(BATCH, KEYS).double().masked_fill(padding, -torch.inf),
        },
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["none", "padding", "causal", "pairs and padding", "numbers"])
def test_attention_is_what_the_module_computes(kind: str) -> None:
    torch.manual_seed(0)
    flags = itertools.product([False, True], repeat=7)
    for first, own_sizes, bias, bias_kv, zero, weights, average in flags:
        sizes = {"kdim": 5, "vdim": 7} if own_sizes else {}
        module = nn.MultiheadAttention(
            FEATURES, HEADS, bias=bias, add_bias_kv=bias_kv, add_zero_attn=zero, batch_first=first, dropout=0.5, **sizes
        )
        module = module.double().eval()
        inputs = [
            torch.randn(BATCH, tokens, size, dtype=torch.float64)
            for tokens, size in ((QUERIES, FEATURES), (KEYS, module.kdim), (KEYS, module.vdim))
        ]
        inputs = inputs if first else [each.transpose(0, 1) for each in inputs]
        options = {**masks(kind), "need_weights": weights, "average_attn_weights": average}
        expected = module(*inputs, **options)
        found = attention_forward(module, attention_maps(module))(*inputs, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", [False, True])
def test_attention_without_a_batch_is_what_the_module_computes(weights: bool) -> None:
    torch.manual_seed(0)
    module, inputs = nn.MultiheadAttention(FEATURES, HEADS).double().eval(), torch.randn(QUERIES, FEATURES).double()
    options = {"need_weights": weights, "key_padding_mask": torch.arange(QUERIES) > 2}
    found = attention_forward(module, attention_maps(module))(inputs, inputs, inputs, **options)
    torch.testing.assert_close(found, module(inputs, inputs, inputs, **options))


class Attending(nn.Module):
    """Attention of the inputs to what a linear layer makes of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, FEATURES)
        self.attention = nn.MultiheadAttention(FEATURES, HEADS, **options)
        self.head = nn.Linear(FEATURES, 3)
        for each in self.parameters():
            nn.init.normal_(each, std=0.6)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(inputs))
        memory = inputs if self.attention.kdim == 4 else hidden
        first = self.attention.batch_first
        turned = [each if first else each.transpose(0, 1) for each in (hidden, memory, memory)]
        mixed, weights = self.attention(*turned, key_padding_mask=~mask)
        mixed = mixed if first else mixed.transpose(0, 1)
        weights = (weights * mask[:, :, None])[..., : mask.shape[1]]  # of keys that are not the module's own
        logits: Tensor = self.head((weights @ hidden + (hidden + mixed) * mask[:, :, None]).sum(1))
        return logits


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"batch_first": True, "kdim": 4, "vdim": 4},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=" ".join,
)
def test_gradients_are_autograds(tmp_path: Path, options: dict[str, Any], batch_size: int) -> None:
    model, task, rows = Attending(**options).double(), Sequences(), sequences(9)
    study = wf.Study(tmp_path, model, task, train=rows)
    assert list(study.layers) == ["embed", *(f"attention.{name}" for name in PROJECTIONS), "head"]
    found = study.score(rows, wf.Dot(), execution=wf.Execution(train_batch_size=batch_size)).values
    expected = gradient_products(model, task, lambda name: "bias_" not in name, rows, rows)
    assert relative_error(found, expected) < 1e-12
    biases = 2 * FEATURES if "add_bias_kv" in options else 0
    assert sum(each.weights for each in untracked(model, study.layers)) == biases
    assert ("not tracked: attention MultiheadAttention (12)" in coverage(model, study.layers)) == bool(biases)


def test_one_projection_can_be_named_alone(tmp_path: Path) -> None:
    model, task, rows = Attending().double(), Sequences(["attention.in_proj.v"]), sequences(5)
    found = wf.Study(tmp_path, model, task, train=rows).score(rows, wf.Dot()).values
    inside = gradient_products(model, task, lambda name: "in_proj" in name, rows, rows)
    assert relative_error(found, inside) > 1e-3
    for name in "qk":
        task = Sequences([f"attention.in_proj.{name}"])
        found = found + wf.Study(tmp_path / name, model, task, train=rows).score(rows, wf.Dot()).values
    assert relative_error(found, inside) < 1e-12
    said = mostly_left_out(model, select_layers(model, ["head"]), None)
    assert said is not None and "198 could be, with 'embed', 'attention.in_proj.q', 'attention.in_proj.k', " in said
    with pytest.raises(LayerError, match=r"name the layers inside it with 'attention\.\*'"):
        wf.Study(tmp_path, model, Sequences(["attention"]), train=rows)


class Built(nn.Module):
    """`Attending` of four linear layers."""

    def __init__(self, like: Attending) -> None:
        super().__init__()
        self.embed, self.head = like.embed, like.head
        source = like.attention
        self.q, self.k, self.v, self.out = (nn.Linear(FEATURES, FEATURES) for _ in range(4))
        for number, each in enumerate((self.q, self.k, self.v)):
            each.weight.data = source.in_proj_weight.data.chunk(3)[number].clone()
            each.bias.data = source.in_proj_bias.data.chunk(3)[number].clone()
        self.out.load_state_dict(source.out_proj.state_dict())

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(inputs))
        q, k, v = (
            each(hidden).unflatten(2, (HEADS, FEATURES // HEADS)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        logits = (q @ k.transpose(2, 3) / (FEATURES // HEADS) ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
        weights = logits.softmax(3)
        mixed = self.out((weights @ v).transpose(1, 2).flatten(2))
        result: Tensor = self.head(((weights.mean(1) @ hidden + hidden + mixed) * mask[:, :, None]).sum(1))
        return result


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "shampoo"])
def test_scores_are_those_of_linear_layers(tmp_path: Path, strategy: str) -> None:
    model, task, rows = Attending().double(), Sequences(), sequences(9)
    built = Built(model).double()
    torch.testing.assert_close(built(*task.collate(rows)[:2]), model.eval()(*task.collate(rows)[:2]))
    found, expected = (
        wf.Study(tmp_path / name, each, task, train=rows).score(rows, factored(strategy)).values
        for name, each in (("attention", model), ("built", built))
    )
    assert relative_error(found, expected) < 1e-9


def test_gauss_newton_products_are_those_of_linear_layers(tmp_path: Path) -> None:
    model, rows = Attending().double(), sequences(4)
    products = []
    for name, each, layers in (
        ("attention", model, ["attention.*"]),
        ("built", Built(model).double(), ["q", "k", "v", "out"]),
    ):
        case = Case(each, Sequences(layers), rows, [])
        size = len(PROJECTIONS) * FEATURES * (FEATURES + 1)
        vectors = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        products.append(system_of(study_of(case, tmp_path / name), case).product(vectors))
    assert relative_error(*products) < 1e-10


class Transformer(nn.Module):
    """An encoder, which makes nested tensors of padded batches where it may, and a decoder that reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        memory = self.encoder(inputs, src_key_padding_mask=~mask)
        read = self.decoder(inputs, memory, tgt_key_padding_mask=~mask, memory_key_padding_mask=~mask)
        logits: Tensor = self.head((read * mask[:, :, None]).sum(1))
        return logits


def test_pytorchs_transformer_is_tracked_as_a_whole(tmp_path: Path) -> None:
    """Nothing that requires gradients comes before the encoder, which would pass its layers over."""
    model, task, rows = Transformer().double(), Sequences(), sequences(7)
    study = wf.Study(tmp_path, model, task, train=rows)
    assert {each.kind for each in untracked(model, study.layers)} == {"LayerNorm"}
    found = study.score(rows, wf.Dot(), execution=wf.Execution(train_batch_size=3)).values
    expected = gradient_products(model, task, lambda name: "norm" not in name, rows, rows)
    assert relative_error(found, expected) < 1e-11
    named = wf.Study(tmp_path / "named", model, Sequences(["encoder.layers.0.linear1"]), train=rows)
    expected = gradient_products(model, task, lambda name: name.startswith("encoder.layers.0.linear1"), rows, rows)
    assert relative_error(named.score(rows, wf.Dot()).values, expected) < 1e-11


@pytest.mark.parametrize("enabled", [True, False])
def test_what_was_changed_is_put_back(tmp_path: Path, enabled: bool) -> None:
    model, rows = Transformer().double(), sequences(5)
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        study = wf.Study(tmp_path, model, Sequences(), train=rows)
        study.score(rows, wf.Dot())
        with pytest.raises(ZeroDivisionError):
            wf.Study(tmp_path, model, Failing(), train=rows).score(rows, wf.Dot())
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        assert not any("forward" in vars(module) for module in model.modules())
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Failing(Sequences):
    """A model that is called, and a loss that fails."""

    def train_loss(self, *arguments: Any) -> Tensor:
        super().train_loss(*arguments)
        raise ZeroDivisionError
