"""Which layers are tracked by default and by name, which are refused, and what is left out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, gpt2, relative_error, token_rows
from tests.reference import BruteForce
from tests.runs import factored
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.engine.modules.coverage import coverage, mostly_left_out, untracked
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import LayerError


def vectors() -> list[object]:
    torch.manual_seed(1)
    return [(torch.randn(4).double(), torch.randint(3, ())) for _ in range(13)]


def adapted() -> Any:
    import peft

    torch.manual_seed(0)
    options = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(gpt2(layers=1), options)


def test_of_a_model_with_adapters_only_these_are_tracked(tmp_path: Path) -> None:
    model = adapted().double()
    train, queries, task = token_rows(9), token_rows(4, seed=4), wf.CausalLM()
    study = wf.Study(tmp_path, model, task, train=train)
    assert len(study.layers) == 4
    assert all("lora_" in name for name in study.layers)
    assert untracked(model, study.layers) == []
    for strategy in STRATEGIES:
        found = study.score(queries, factored(strategy, empirical=True)).values
        expected = BruteForce(model, task, list(study.layers), train, queries).scores(strategy)
        assert relative_error(found, expected) < 1e-8
    named = select_layers(model, ["*.c_attn.base_layer"])
    assert list(named) == ["base_model.model.transformer.h.0.attn.c_attn.base_layer"]


def test_frozen_layers_are_left_out_by_default() -> None:
    model = gpt2(layers=2)
    model.transformer.h[0].requires_grad_(False)
    assert {name.split(".")[2] for name in select_layers(model, None, model.lm_head)} == {"1"}
    assert "transformer.h.0.mlp.c_fc" in select_layers(model, ["*.c_fc"])
    model.requires_grad_(False)
    assert len(select_layers(model, None, model.lm_head)) == 8
    model.transformer.wte.requires_grad_(True)
    with pytest.raises(LayerError, match="no layer that is tracked without being named.* such as 'transformer.wte'"):
        select_layers(model, None, model.lm_head)


class Mixed(nn.Module):
    """Kinds that cannot be tracked beside those that can."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRUCell(4, 4)
        self.batch = nn.BatchNorm1d(4)
        self.up = nn.ConvTranspose1d(4, 4, 1)
        self.renormalised = nn.Embedding(5, 4, max_norm=1.0)
        self.scaled = nn.Embedding(5, 4, scale_grad_by_freq=True)
        self.weightless = nn.LayerNorm(4, elementwise_affine=False)
        self.constant = nn.RMSNorm(4)  # as in Falcon Mamba, whose weights of ones are not trained
        del self.constant.weight
        self.constant.register_buffer("weight", torch.ones(4))
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)


def test_what_cannot_be_tracked_is_named_with_the_reason() -> None:
    model = Mixed()
    assert list(select_layers(model)) == ["last"]
    assert list(select_layers(model, ["*"])) == ["norm", "last"]
    for name, reason in {
        "recurrent": "'recurrent', a GRUCell with 120 weights of its own, which is not",
        "batch": "a BatchNorm1d with 8 weights of its own",
        "up": "a ConvTranspose1d with 20 weights of its own",
        "renormalised": "an? Embedding that cannot be tracked: max_norm changes its weights",
        "scaled": "Embedding that cannot be tracked: scale_grad_by_freq",
        "weightless": "a LayerNorm that cannot be tracked: it has no weight",
        "constant": "a RMSNorm that cannot be tracked: it has no weight that is trained",
    }.items():
        with pytest.raises(LayerError, match=reason):
            select_layers(model, [name])
    layers = select_layers(model)
    left = {each.name: each.weights for each in untracked(model, layers)}
    assert left == {
        "recurrent": 120, "batch": 8, "up": 20, "renormalised": 20, "scaled": 20, "norm": 8,
    }  # fmt: skip
    line = coverage(model, layers)
    assert line.startswith("Tracking 1 layer(s), 15 of 211 weights; not tracked: recurrent GRUCell (120), ")
    assert "2 Embedding (40)" in line


def test_tied_weights_count_once() -> None:
    model = gpt2(layers=1)
    total = sum(each.numel() for each in model.parameters())
    for patterns in (None, ["lm_head"], ["*"]):
        layers = select_layers(model, patterns, model.lm_head)
        tracked = sum(math.prod(layer.shape) for layer in layers.values())
        assert tracked + sum(each.weights for each in untracked(model, layers)) == total
    assert coverage(model, layers).endswith("weights")  # nothing is left out
    assert [use.name for use in layers["transformer.wte"].uses] == ["transformer.wte", "lm_head"]
    assert layers["transformer.wte"].shape == (VOCABULARY, 8)


class Twins(nn.Module):
    """Two linear layers of one weight, with one bias for both or only for the first."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=both), nn.Linear(4, 3)
        self.other.weight = self.one.weight
        if both:
            self.other.bias = self.one.bias

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.other(torch.tanh(self.one(inputs)))))
        return result


@pytest.mark.parametrize("both", [True, False])
def test_linear_layers_of_one_weight_are_one_layer(tmp_path: Path, both: bool) -> None:
    torch.manual_seed(0)
    model, task, rows = Twins(both).double(), wf.Classification(), vectors()
    study = wf.Study(tmp_path, model, task, train=rows)
    assert list(study.layers) == ["one", "last"]
    found = study.score(rows, wf.Dot(), execution=wf.Execution(train_batch_size=5)).values
    weights = [*model.one.parameters(), *model.last.parameters()]
    each = [
        torch.cat(
            [part.flatten() for part in torch.autograd.grad(task.train_loss(model, task.collate([row])), weights)]
        )
        for row in rows
    ]
    assert relative_error(found, torch.stack(each) @ torch.stack(each).T) < 1e-10


def test_weights_whose_gradients_cannot_be_added_up_are_refused() -> None:
    model = Twins(both=True)
    model.other.bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(LayerError, match="'one' and 'other' share one weight, and they have biases of their own"):
        select_layers(model)
    assert list(select_layers(model, ["last"])) == ["last"]
    shared = nn.ModuleDict({"batch": nn.BatchNorm1d(4), "norm": nn.LayerNorm(4)})
    shared["batch"].weight = shared["norm"].weight
    with pytest.raises(LayerError, match="'batch' and 'norm' share one weight, and the gradient of one"):
        select_layers(shared, ["norm"])
    biases = Twins(both=True)
    biases.last = nn.Linear(4, 4)
    biases.last.bias = biases.one.bias
    with pytest.raises(LayerError, match="'one' and 'last' share one bias"):
        select_layers(biases)
    turned = nn.ModuleList([nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    turned[1].weight = turned[2].weight = turned[0].weight
    with pytest.raises(LayerError, match="'1' and '2' share one weight, and they have biases of their own"):
        select_layers(turned, ["0"])


class ChannelsFirst(nn.LayerNorm):
    """One weight for each channel, which is not the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Positions(nn.Embedding):
    """Rows are looked up by place and not by what comes in, as in BART and OPT."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[1]).expand(input.shape))


class Scaled(nn.Linear):
    """Its output is not that of its weight alone."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardised(nn.Conv1d):
    """Computes with another weight than its own, as in BiT."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv1d(input, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("own", "usual", "weights"),
    [
        (ChannelsFirst(3), nn.LayerNorm(3), 6),
        (Positions(5, 2), nn.Embedding(5, 2), 10),
        (Standardised(2, 3, 1), nn.Conv1d(2, 3, 1), 9),
        (Scaled(2, 3), nn.Linear(2, 3), 9),
    ],
)
def test_a_layer_that_computes_in_its_own_way_is_not_taken_for_the_usual_one(
    own: nn.Module, usual: nn.Module, weights: int
) -> None:
    model = nn.Sequential(own, usual)
    assert list(select_layers(model, ["*"])) == ["1"]
    with pytest.raises(LayerError, match=f"a {type(own).__name__} with {weights} weights of its own"):
        select_layers(model, ["0"])


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_computed_are_not_taken_for_one(bias: bool) -> None:
    """Reading one makes a tensor, which may lie where that of another layer has been."""
    from torch.nn.utils.parametrizations import orthogonal

    for count in range(2, 12):
        model = nn.Sequential(*[orthogonal(nn.Linear(4, 4, bias=bias)) for _ in range(count)])
        assert list(select_layers(model)) == [str(number) for number in range(count)]


def mixture() -> Any:
    """A mixture of experts, whose weights are no layers but parameters of one module."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=8)  # type: ignore[arg-type]
    return MixtralForCausalLM(config)


def trained_share(model: Any, layers: Any) -> float:
    """Tracked weights among all, besides embeddings and head; by the names of parameters."""
    aside = ("embed", "head", "wte", "wpe")
    counted = {name: each.numel() for name, each in model.named_parameters() if not any(part in name for part in aside)}
    return float(
        sum(each for name, each in counted.items() if name.rpartition(".")[0] in layers) / sum(counted.values())
    )


def test_weights_that_are_mostly_left_out_are_said_with_their_share_and_what_would_track_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, train = mixture(), token_rows(3)
    model.model.layers[0].add_module("batch", nn.BatchNorm1d(8))  # trained, and of no supported kind
    with caplog.at_level(logging.WARNING, "wherefrom"):
        study = wf.Study(tmp_path, model, wf.CausalLM(["*.q_proj", "*.k_proj"]), train=train)
    share = trained_share(model, study.layers)
    assert share < 0.05
    assert f"Only {share:.0%} of the " in caplog.text
    assert "'model.layers.*.self_attn.v_proj', 'model.layers.*.self_attn.o_proj'" in caplog.text
    assert "'model.layers.*.mlp.experts.*.gate_up_proj'" in caplog.text
    assert "16 cannot be, which are of no supported kind of layer (BatchNorm1d)" in caplog.text
    scores = study.score(train[:1], wf.Dot())
    assert scores.fingerprint["left out"].startswith(f"Only {share:.0%} of the ")
    page = study.report(scores, train[:1], tokenizer=None, k=1).read_text()
    assert f"Only {share:.0%} of the " in page
    # The same result, whatever of the rest is said to be trained now.
    model.model.layers[0].requires_grad_(False)
    again = wf.Study(tmp_path, model, wf.CausalLM(["*.q_proj", "*.k_proj"]), train=train)
    assert torch.equal(again.score(train[:1], wf.Dot()).values, scores.values)


def test_models_that_are_tracked_for_the_most_part_are_no_warning() -> None:
    for model in (gpt2(), adapted()):
        assert mostly_left_out(model, select_layers(model, None, model.get_output_embeddings()), None) is None
    model = gpt2()
    layers = select_layers(model, ["*.c_attn"])
    share = trained_share(model, layers)
    assert share < 0.5
    said = mostly_left_out(model, layers, model.lm_head)
    assert said is not None and said.startswith(f"Only {share:.0%} of the ")
    patterns = ["transformer.h.*.ln_1", "transformer.h.*.attn.c_proj", "transformer.h.*.ln_2",
                "transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj", "transformer.ln_f"]  # fmt: skip
    assert f"with {', '.join(map(repr, patterns))} among the `layers`" in said
    assert mostly_left_out(model, select_layers(model, ["*.c_attn", *patterns]), model.lm_head) is None
