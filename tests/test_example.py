"""The WikiText example: its splits, and that a recipe gives the same weights and data again."""

from __future__ import annotations

from pathlib import Path

import data
import models
import pytest
import torch
from training import TrainSettings, finetune, perplexity
from transformers import GPT2Config, GPT2LMHeadModel

from wherefrom.runtime.errors import InputError


def test_no_title_straddles_the_parts() -> None:
    leads = data.read_leads()
    parts = {part: {lead.title for lead in data.labelled_leads(part)} for part in ("pretrain", "train", "query")}
    assert not parts["train"] & parts["query"]
    assert not (parts["train"] | parts["query"]) & parts["pretrain"]
    texts = "".join(data.pretraining_texts())
    assert all(f" = {title} = \n" not in texts for title in parts["train"] | parts["query"])
    assert 1200 < len(parts["train"]) < 1600
    assert 100 < len(parts["query"]) < 160
    assert all(lead.text.startswith(f" = {lead.title} = \n") for lead in leads)
    assert all(lead.topic for lead in data.labelled_leads("query"))


def test_missing_wheels_are_named_with_the_way_to_install_them() -> None:
    with pytest.raises(InputError, match="no-such-package is not installed.*make smollm2"):
        data.wheel_file("no-such-package", "file", "make smollm2")


def test_finetuning_is_repeatable_learns_and_leaves_its_start_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    before = {name: value.clone() for name, value in start.state_dict().items()}
    rows = [{"input_ids": torch.randint(20, (8,)).tolist()} for _ in range(12)]
    settings = TrainSettings(batch_size=4, learning_rate=1e-2, num_epochs=4)
    one, two, other = (finetune(start, rows, settings, seed) for seed in (3, 3, 4))
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert perplexity(one, rows, 5) < perplexity(start, rows, 5)


def test_a_directory_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no recipe\.json; run train\.py first"):
        models.load_recipe(tmp_path)
