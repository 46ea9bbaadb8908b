"""Layers that a model does not run as modules: left out unless they are named, and said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import wherefrom as wf
from tests.models import TRANSFORMERS, Sequences, relative_error, sequences, token_rows
from tests.reference import gradient_products
from wherefrom.engine.modules.layers import select_layers
from wherefrom.hf.blueprint import measure
from wherefrom.runtime.errors import LayerError


class Partly(nn.Module):
    """One layer runs, the weight of another is used by a function, and a third is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.inside, self.idle = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = functional.linear(torch.tanh(self.used(inputs)), self.inside.weight, self.inside.bias)
        logits: Tensor = self.head((hidden * mask[:, :, None]).sum(1))
        return logits


def test_layers_that_never_run_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, rows = Partly().double(), sequences(7)
    said = "2 layer(s) never run in a forward pass, and are not tracked: 'idle', 'inside'. They have 49.4% of"
    for folder in ("first", "again"):
        with caplog.at_level(logging.WARNING, "wherefrom"):
            study = wf.Study(tmp_path, model, Sequences(), train=rows)
            scores = study.score(rows, wf.Dot())
        assert list(study.layers) == ["used", "head"], folder
        assert said in caplog.text
        assert said in scores.fingerprint["left out"]
        caplog.clear()
    expected = gradient_products(model, Sequences(), lambda name: name.startswith(("used", "head")), rows, rows)
    assert relative_error(scores.values, expected) < 1e-12
    assert [path.name[:3] for path in (tmp_path / "scores").iterdir()] == ["dot"]  # found again


@pytest.mark.parametrize("name", ["inside", "idle"])
def test_a_named_layer_has_to_run(tmp_path: Path, name: str) -> None:
    study = wf.Study(tmp_path, Partly().double(), Sequences(["used", name]), train=sequences(7))
    assert list(study.layers) == ["used", name]
    with pytest.raises(LayerError, match=rf"1 tracked layer\(s\) never ran in a forward pass: {name}"):
        study.fit(wf.EKFAC())


class Both(nn.Module):
    """A weight is used by its module, and by a function too, or by one that does not depend on its numbers."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = self.function(torch.tanh(self.first(inputs)), self.first.weight)
        logits: Tensor = self.second((hidden * mask[:, :, None]).sum(1))
        return logits


@pytest.mark.parametrize(
    "function", [functional.linear, lambda x, w: x @ w.T, lambda x, w: x + torch.stack([w, w]).sum()]
)
def test_a_weight_that_a_function_uses_too_is_refused(
    tmp_path: Path, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, rows = Both(function).double(), sequences(6)
    with pytest.raises(LayerError, match=r"weight of layer 'first' is used by a function"):
        wf.Study(tmp_path, model, Sequences(), train=rows).score(rows, wf.Dot())
    found = wf.Study(tmp_path, model, Sequences(["second"]), train=rows).score(rows, wf.Dot()).values
    expected = gradient_products(model, Sequences(), lambda name: name.startswith("second"), rows, rows)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x.to(w.dtype) + torch.zeros_like(w).sum() + w.new_ones(1),
        lambda x, w: x + w.detach().sum() + w.data.mean() + len(w),
        lambda x, w: x * nn.Parameter(w.clone().detach()).requires_grad_(False).sum(),
    ],
)
def test_what_does_not_depend_on_a_weight_is_no_use_of_it(
    tmp_path: Path, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model, rows = Both(function).double(), sequences(6)
    found = wf.Study(tmp_path, model, Sequences(), train=rows).score(rows, wf.Dot()).values
    assert relative_error(found, gradient_products(model, Sequences(), lambda _: True, rows, rows)) < 1e-12


class Nothing(nn.Module):
    """A function of a layer's weight, and no layer that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return functional.linear(inputs.sum(1), self.inside.weight)


def test_a_model_of_which_no_layer_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"1 tracked layer\(s\) never ran in a forward pass: inside"):
        wf.Study(tmp_path, Nothing().double(), Sequences(), train=sequences(3)).fit(wf.EKFAC())


class Branches(nn.Module):
    """Long sequences pass through one layer, short ones through another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.short, self.long, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        chosen = self.long if mask.sum(1).max() > 4 else self.short
        logits: Tensor = self.head((torch.tanh(chosen(inputs)) * mask[:, :, None]).sum(1))
        return logits


def test_layers_that_some_examples_reach_are_tracked(tmp_path: Path) -> None:
    rows: list[Any] = sequences(20)
    lengths = [len(inputs) > 4 for inputs, _ in rows]
    assert True in lengths[::3] and False in lengths[::3]  # not more than eight are looked at
    study = wf.Study(tmp_path, Branches().double(), Sequences(), train=rows)
    assert list(study.layers) == ["short", "long", "head"]
    same = [row for row, long in zip(rows, lengths, strict=True) if long == lengths[0]]
    other = wf.Study(tmp_path, Branches().double(), Sequences(), train=same)
    assert len(other.layers) == 2


_COMMON: dict[str, Any] = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.4,
}  # fmt: skip
_ATTENTION: dict[str, Any] = {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
_MAMBA: dict[str, Any] = {"state_size": 3, "intermediate_size": 16}
# Of a few thousand weights, some of which each model uses in a way of its own.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba2": {"state_size": 3, "num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 4},
    "falcon_mamba": _MAMBA,
    "jamba": {
        **_ATTENTION, "mamba_d_state": 3, "mamba_dt_rank": 2, "num_experts": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "qwen3_next": {
        **_ATTENTION, "head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4,
        "linear_value_head_dim": 4, "mlp_only_layers": [0, 1], "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {**_ATTENTION, "num_hidden_layers": 3, "lru_width": 8, "attention_window_size": 8},
    "lfm2": {**_ATTENTION, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
# By the last part of their names.
LEFT: dict[str, tuple[str, ...]] = {
    "mamba": ("conv1d", "dt_proj"), "mamba2": ("conv1d",), "falcon_mamba": ("conv1d", "dt_proj"),
    "jamba": ("conv1d", "dt_proj"), "qwen3_next": ("conv1d",), "recurrent_gemma": (), "lfm2": ("conv",),
}  # fmt: skip


def language_model(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_COMMON, **CONFIGURATIONS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    nn.Module.to(model, torch.float64)
    return model


@pytest.mark.skipif(TRANSFORMERS < (5, 5), reason="its models are computed otherwise")
@pytest.mark.parametrize("kind", LEFT)
def test_models_with_state_spaces_are_scored_without_what_they_use_by_functions(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, task, rows = language_model(kind), wf.CausalLM(), token_rows(5)
    chosen = select_layers(model, None, task.head(model))
    ran = lambda name: name.rpartition(".")[0] in chosen and not name.rpartition(".")[0].endswith(LEFT[kind])  # noqa: E731
    expected = gradient_products(model, task, ran, rows, rows)
    with caplog.at_level(logging.WARNING, "wherefrom"):
        study = wf.Study(tmp_path, model, task, train=rows)
        found = study.score(rows, wf.Dot(), execution=wf.Execution(train_batch_size=2)).values
    assert {name for name in chosen if name.endswith(LEFT[kind])} == chosen.keys() - study.layers.keys()
    assert all(f".{name}'" in caplog.text for name in LEFT[kind])
    assert relative_error(found, expected) < 1e-4  # some of it is computed in float32


@pytest.mark.skipif(TRANSFORMERS < (5, 5), reason="its models do not run without weights")
def test_a_plan_leaves_out_what_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(language_model("mamba2").config.to_json_string())
    assert not any(name.endswith("conv1d") for name in measure(str(tmp_path), 8).layers)


def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    rows = sequences(5)
    model = nn.Linear(4, 3).double()
    scripted = torch.jit.script(model)
    for each in (scripted, torch.jit.trace(model, torch.zeros(1, 4, dtype=torch.float64))):
        with pytest.raises(LayerError, match=r"model is a TorchScript module.*: load the original nn\.Module"):
            wf.Study(tmp_path, each, Sequences(), train=rows)
    with pytest.raises(LayerError, match=r"'0', a TorchScript module.*: load the original nn\.Module"):
        select_layers(nn.Sequential(scripted, nn.Linear(3, 3)), ["0"])
