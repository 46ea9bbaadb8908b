"""Adapters of peft of every kind: scores against products of gradients by autograd on all weights that were trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, relative_error, token_rows
from wherefrom.engine.modules.coverage import mostly_left_out, untracked
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, LayerError

TRAIN, QUERIES = token_rows(6), token_rows(2, seed=4)
LONGEST = max(len(each["input_ids"]) for each in TRAIN)  # type: ignore[index]
PROJECTIONS = ["q_proj", "down_proj"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=24, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def lora(**options: Any) -> peft.LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "target_modules": PROJECTIONS, "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def prompt(kind: type[peft.PromptLearningConfig], **options: Any) -> peft.PromptLearningConfig:
    """As many virtual tokens as the longest text has: its mask must not be taken for theirs."""
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=LONGEST, **options)


KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora,
    "rslora with biases": lambda: lora(use_rslora=True, lora_bias=True),
    "lora of embedding and head": lambda: lora(target_modules=["embed_tokens", "lm_head"]),
    "dora": lambda: lora(use_dora=True),
    "lora with trained copies": lambda: lora(modules_to_save=["up_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: prompt(peft.PromptTuningConfig),
    "prefix": lambda: prompt(peft.PrefixTuningConfig),
    "projected prefix": lambda: prompt(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=4),
    "p-tuning": lambda: prompt(peft.PromptEncoderConfig, encoder_hidden_size=4),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


def adapted(config: peft.PeftConfig, base: Any = None) -> Any:
    """A model with adapters that do something, in float64."""
    model = nn.Module.to(peft.get_peft_model(base or llama(), config), torch.float64).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def gradients(model: nn.Module, rows: list[object]) -> Tensor:
    """Of each example's loss by all weights that are trained, [examples, weights]."""
    task, trained = wf.CausalLM(), [each for each in model.parameters() if each.requires_grad]
    losses = (task.train_loss(model, task.collate([row])) for row in rows)
    each = (torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True) for loss in losses)
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])


def check(model: nn.Module, run: Path, expected_of: nn.Module | None = None) -> None:
    """Without curvature, and with the diagonal of the empirical Fisher matrix."""
    study = wf.Study(run, model, wf.CausalLM(), train=TRAIN)
    train, queries = (gradients(expected_of or model, rows) for rows in (TRAIN, QUERIES))
    assert relative_error(study.score(QUERIES, wf.Dot()).values, queries @ train.T) < 1e-9
    found = study.score(QUERIES, wf.Diagonal(empirical=True, damping=0.1)).values
    expected = queries / (train.square().mean(0) + 0.1) @ train.T
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_trained_is_tracked_exactly(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(KINDS[kind]())
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with caplog.at_level(logging.WARNING, "wherefrom"):
        check(model, tmp_path)
    assert "weights that were trained" not in caplog.text
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not {"forward", "get_prompt"}.intersection(*map(vars, [model])), "put back"
    assert untracked(model, select_layers(model)) == []


def test_kfac_of_adapters_that_are_parameters_runs_in_every_basis(tmp_path: Path) -> None:
    """Scores of one query are those of the sum of its parts: an example beside others, or alone."""
    model = adapted(lora(target_modules=["embed_tokens", "q_proj"]))
    values = []
    for size in (1, 6):
        execution = wf.Execution(train_batch_size=size, query_batch_size=size)
        study = wf.Study(tmp_path / str(size), model, wf.CausalLM(), train=TRAIN, execution=execution)
        values.append(study.score(QUERIES, wf.EKFAC(empirical=True)).values)
    assert relative_error(*values) < 1e-8


def test_dora_of_gpt2s_transposed_matrices_with_biases(tmp_path: Path) -> None:
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    check(adapted(config, gpt2()), tmp_path)


def test_adalora_has_three_factors(tmp_path: Path) -> None:
    """And a number that peft counts with, which is no weight."""
    config = peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=PROJECTIONS)
    model = adapted(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "ranknum" not in name)
    assert {name.split(".")[-2] for name in select_layers(model)} == {"lora_A", "lora_E", "lora_B"}
    check(model, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix", "projected prefix", "p-tuning"])
def test_adapters_that_were_loaded_are_tracked_as_they_are(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """peft freezes what it loads, and keeps a prompt without what has made it: then it is a prompt like others."""
    trained: Any = adapted(KINDS[kind]())
    trained.save_pretrained(tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).double().eval()
    assert kind not in {"lora", "ia3"} or not any(each.requires_grad for each in loaded.parameters())
    with caplog.at_level(logging.WARNING, "wherefrom"):
        study = wf.Study(tmp_path / "run", loaded, wf.CausalLM(), train=TRAIN)
        found = study.score(QUERIES, wf.Dot()).values
    assert "weights that were trained" not in caplog.text
    if kind in {"projected prefix", "p-tuning"}:
        trained = adapted(prompt(peft.PrefixTuningConfig if "prefix" in kind else peft.PromptTuningConfig))
        trained.prompt_encoder["default"].embedding.weight.data = loaded.prompt_encoder["default"].embedding.weight.data
    train, queries = (gradients(trained, rows) for rows in (TRAIN, QUERIES))
    assert relative_error(found, queries @ train.T) < 1e-5  # files are in float32


def test_a_prompts_last_token_predicts_the_first_of_the_text() -> None:
    """The loss is peft's own; a chosen token is counted from the text's first."""
    model, task = adapted(KINDS["prompt"]()), wf.CausalLM()
    batch = task.collate([TRAIN[0]])
    ids = batch["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss * ids.shape[1]
    assert relative_error(task.train_loss(model, batch), expected) < 1e-6
    measured = wf.CausalLM(measure=wf.ChosenToken(3, position=0)).measurement(model, batch)
    logits = model(input_ids=ids).logits[0, LONGEST]
    assert relative_error(measured, -logits.log_softmax(0)[3]) < 1e-12


def test_what_cannot_be_tracked_is_said_with_its_share_and_refused_by_name() -> None:
    model = adapted(lora(trainable_token_indices=[1, 2]))
    said = mostly_left_out(model, select_layers(model), model.base_model.model.lm_head)
    assert said is not None
    assert "16 cannot be, which are of no supported kind of layer (ParameterDict)" in said
    model = adapted(lora(modules_to_save=["lm_head", "embed_tokens"]))
    head = wf.CausalLM().head(model)
    said = mostly_left_out(model, select_layers(model, None, head), head)
    assert said is not None
    assert "208 could be, with 'base_model.model.model.embed_tokens.modules_to_save.default', " in said
    named = select_layers(model, ["*lora_*", "*.modules_to_save.*"])
    assert mostly_left_out(model, named, model.get_output_embeddings()) is None
    others: dict[str, peft.PeftConfig] = {
        "LOHA": peft.LoHaConfig(target_modules=PROJECTIONS),
        "OFT": peft.OFTConfig(oft_block_size=4, target_modules=PROJECTIONS),
    }
    for name, config in others.items():
        with pytest.raises(LayerError, match=rf"adapters \({name}\), and none.*merge_and_unload"):
            select_layers(adapted(config))


@pytest.mark.parametrize("kind", ["ia3", "lora of embedding and head", "dora", "prompt"])
def test_a_loss_may_switch_adapters_off_for_its_reference(kind: str, tmp_path: Path) -> None:
    model, task = adapted(KINDS[kind]()), wf.Preference(wf.DPO(beta=0.5), reference="base")
    pairs: list[object] = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, number], "rejected_ids": [5, number]} for number in range(4)
    ]
    found = wf.Study(tmp_path, model, task, train=pairs).score(pairs, wf.Dot()).values
    trained = [each for each in model.parameters() if each.requires_grad]
    rows = []
    for pair in pairs:
        loss = task.train_loss(model, task.collate([pair]))
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert relative_error(found, expected) < 1e-9


def test_of_several_adapters_the_active_one_counts(tmp_path: Path) -> None:
    model = adapted(lora())
    model.add_adapter("other", lora(r=3))
    model.double()
    assert all(name.endswith(".default") for name in select_layers(model))
    model.set_adapter("other")
    assert all(name.endswith(".other") for name in select_layers(model))
    check(model, tmp_path)
    model.merge_adapter()
    with pytest.raises(LayerError, match="8 tracked layer.* never ran in a forward pass"):
        wf.Study(tmp_path / "merged", model, wf.CausalLM(), train=TRAIN).score(QUERIES, wf.Dot())


def test_adapters_of_parameters_are_left_out_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """peft makes a part of a parameter of them, and never calls them."""
    model = adapted(lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"]))
    with caplog.at_level(logging.WARNING, "wherefrom"):
        study = wf.Study(tmp_path, model, wf.CausalLM(), train=TRAIN)
        assert len(study.layers) == 4
    assert "4 layer(s) never run in a forward pass" in caplog.text
    assert "Only 44% of the 144 weights that were trained are tracked" in caplog.text


def test_adapters_that_transformers_has_put_into_a_model(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(lora())
    model.double()
    assert all("lora_" in name for name in select_layers(model))
    check(model, tmp_path)


def test_a_prompt_takes_positions_and_no_packed_texts(tmp_path: Path) -> None:
    model = adapted(prompt(peft.PromptTuningConfig), gpt2())
    long: list[object] = [{"input_ids": [1] * (25 - LONGEST)}]
    with pytest.raises(InputError, match=f"and the model positions for {24 - LONGEST}"):
        wf.Study(tmp_path, model, wf.CausalLM(), train=long).score(long, wf.Dot())
    packed: list[object] = [{"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}]
    with pytest.raises(InputError, match="lets the documents"):
        wf.Study(tmp_path, model, wf.CausalLM(), train=packed).score(packed, wf.Dot())
