"""Adapters of models of 4 or 8 bits, against the same adapters on models of the numbers that the bits mean."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import relative_error, token_rows
from tests.reference import BruteForce
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import InputError, LayerError
from wherefrom.store.fingerprint import model_digest

bitsandbytes = pytest.importorskip("bitsandbytes")

TRAIN, QUERIES = token_rows(5), token_rows(2, seed=4)
KINDS = ["nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose rows are whole blocks of 64 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def base(folder: Path, kind: str | None) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    config: Any = None
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    elif kind in {"nf4", "fp4"}:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=kind == "nf4"
        )
    elif kind is not None:
        torchao = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(getattr(torchao, kind)())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def adapted(model: nn.Module, kind: str = "lora") -> Any:
    import peft

    names = ["q_proj", "down_proj"]
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False),
        "dora": peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=True),
        "ia3": peft.IA3Config(target_modules=names, feedforward_modules=["down_proj"], init_ia3_weights=False),
        "adalora": peft.AdaLoraConfig(
            init_r=3, target_r=2, total_step=10, target_modules=names, init_lora_weights=False
        ),
    }
    torch.manual_seed(1)
    return peft.get_peft_model(model, configs[kind]).eval()


def meant(model: nn.Module, folder: Path, kind: str = "lora") -> Any:
    """The same model in float32: a layer's weight is what it makes of an identity, computed as in training."""
    plain = adapted(base(folder, None), kind)
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not type(parameter).__module__.startswith("torchao"):
                own[name].copy_(parameter)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and not any(part in name for part in ("lora_", "lm_head")):
                stored: Any = copy.deepcopy(layer).train()
                torchao = type(stored.weight).__module__.startswith("torchao")
                weight = stored.weight.dequantize() if torchao else stored(torch.eye(stored.in_features)).T
                plain.get_submodule(name).weight.copy_(weight)
    return plain


@pytest.mark.parametrize("kind", ["dora", "ia3", "adalora"])
@pytest.mark.parametrize("stored", ["nf4", "int8"])
def test_adapters_of_other_kinds_stand_beside_few_bits_too(
    folder: Path, tmp_path: Path, kind: str, stored: str
) -> None:
    model = adapted(base(folder, stored), kind)
    values = [
        wf.Study(tmp_path / str(number), each, wf.CausalLM(), train=TRAIN).score(QUERIES, wf.Dot()).values
        for number, each in enumerate((model, meant(model, folder, kind)))
    ]
    assert relative_error(*values) < 1e-4


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_numbers_that_are_meant(
    folder: Path, tmp_path: Path, kind: str, evaluated: bool
) -> None:
    """Also after an evaluation, in which some processors have the weights rewritten."""
    model, task = adapted(base(folder, kind)), wf.CausalLM()
    if evaluated:
        with torch.no_grad():
            model(torch.arange(8).view(2, 4))
    model.state_dict()
    before, digest = state(model), model_digest(model)
    study = wf.Study(tmp_path, model, task, train=TRAIN)
    assert len(study.layers) == 8
    assert all("lora_" in name for name in study.layers)
    plain = meant(model, folder)
    truth = BruteForce(plain, task, list(study.layers), TRAIN, QUERIES)
    for method in (wf.Dot(), wf.EKFAC(empirical=True)):
        expected = truth.scores(method.strategy)
        assert relative_error(study.score(QUERIES, method).values, expected) < 1e-4
        one = wf.Execution(query_batch_size=1, train_batch_size=1)
        assert relative_error(study.score(QUERIES, method, execution=one, overwrite=True).values, expected) < 1e-4
    half = wf.Execution(half_precision=True)
    other = wf.Study(tmp_path / "plain", plain, wf.CausalLM(["*lora_*"]), train=TRAIN, execution=half)
    found = study.score(QUERIES, wf.Dot(), execution=half).values
    assert relative_error(found, other.score(QUERIES, wf.Dot()).values) < 0.05
    assert model_digest(model) == digest
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_methods_that_differentiate_in_other_ways_agree(folder: Path, tmp_path: Path, kind: str) -> None:
    """Forward mode under vmap, twice backward through a training, and other weights of the adapters."""
    model = adapted(base(folder, kind))
    plain = meant(model, folder)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" in name)
    checkpoint = tmp_path / "checkpoint"
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    other.save_pretrained(checkpoint)
    recipe = wf.TrainingRecipe(batch_size=3, learning_rates=[0.01] * 2)
    found = []
    for number, each in enumerate((model, plain)):
        study = wf.Study(tmp_path / str(number), each, wf.CausalLM(), train=TRAIN)
        methods = (
            wf.EKFAC(damping=0.1, solver=wf.ConjugateGradients(iterations=2)),
            wf.Magic(training=wf.ReplayableTraining(each, wf.CausalLM(), TRAIN, recipe)),
            wf.TracIn(checkpoints=[checkpoint], weights=[1.0]),
        )
        found.append([study.score(QUERIES, method).values for method in methods])
    for one, expected in zip(*found, strict=True):
        assert relative_error(one, expected) < 1e-3


def test_a_digest_is_of_what_the_bits_mean_and_copies_share_it(folder: Path) -> None:
    for kind in KINDS:
        model = adapted(base(folder, kind))
        digest = model_digest(model)
        assert model_digest(copy.deepcopy(model)) == digest
        weight = model.base_model.model.model.layers[0].mlp.up_proj.weight
        if kind == "int8":
            weight.data[0, 0] += 1
        else:
            weight.quant_state.absmax[0] += 1
        assert model_digest(model) != digest


def test_an_example_takes_as_much_memory_as_without(folder: Path) -> None:
    task = wf.CausalLM()
    taken = []
    for kind in (None, *KINDS):
        model = adapted(base(folder, kind))
        sweep = Sweep(model, task, select_layers(model))
        taken.append(sweep.footprint(Examples(TRAIN, task)).bytes)
    assert all(each == pytest.approx(taken[0], rel=0.05) for each in taken)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_themselves_are_refused(folder: Path, kind: str) -> None:
    stored = {"nf4": "Params4bit", "int8": "Int8Params"}[kind]
    model = base(folder, kind)
    with pytest.raises(
        LayerError, match=rf"weights of 14 are quantized \({stored}\).*Give the model with the adapters"
    ):
        select_layers(model, None, model.lm_head)
    with pytest.raises(LayerError, match=rf"'model.layers.0.mlp.up_proj', a Linear.* is quantized \({stored}\)"):
        select_layers(model, ["*.up_proj"])
    assert "model.norm" in select_layers(model, ["*norm"])


def test_whole_numbers_are_no_weights_that_learn() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayerError, match=r"weights of 1 are quantized \(int8\)"):
        select_layers(nn.Sequential(layer))


def test_an_adapter_is_put_on_the_model_that_it_was_trained_on(folder: Path, tmp_path: Path) -> None:
    model = adapted(base(folder, "nf4"))
    model.save_pretrained(tmp_path)
    by_hand = wf.Study(tmp_path / "hand", model, wf.CausalLM(), train=TRAIN).score(QUERIES, wf.Dot()).values
    study = wf.study_from_pretrained(tmp_path, TRAIN, base=base(folder, "nf4"))
    assert torch.equal(study.score(QUERIES, wf.Dot()).values, by_hand)
    whole = wf.study_from_pretrained(tmp_path, TRAIN, run=tmp_path / "whole")  # on the folder's model in float32
    assert relative_error(whole.score(QUERIES, wf.Dot()).values, by_hand) > 1e-3
    with pytest.raises(InputError, match="base is given, and .* holds no adapter"):
        wf.study_from_pretrained(folder, TRAIN, base=model)


def test_a_library_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "eetq", "weights": "int8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match="cannot be loaded without another package: .*EETQ"):
        wf.study_from_pretrained(tmp_path, TRAIN)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_torchao_are_dequantized(folder: Path, tmp_path: Path, kind: str) -> None:
    """Also those whose products round what they read, and so have no gradient."""
    model, task = adapted(base(folder, kind)), wf.CausalLM()
    study = wf.Study(tmp_path, model, task, train=TRAIN)
    truth = BruteForce(meant(model, folder), task, list(study.layers), TRAIN, QUERIES)
    assert relative_error(study.score(QUERIES, wf.Dot()).values, truth.scores("identity")) < 1e-4
    digest, weight = model_digest(model), model.base_model.model.model.layers[0].mlp.up_proj.weight
    weight.scale[0] *= 2
    assert model_digest(model) != digest
    with pytest.raises(
        LayerError, match="'model.layers.0.self_attn.q_proj', a Linear that cannot be tracked: its weight is"
    ):
        select_layers(base(folder, kind), ["*_proj"])
