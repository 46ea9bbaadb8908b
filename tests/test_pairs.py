"""Preferences as datasets have them, to tokens and scores: against what TRL's trainers make, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.models import relative_error
from tests.test_huggingface import TEMPLATE, WORDS, gpt2, ids, prepared, saved_gpt2, tokenizer
from tests.test_language import configured
from wherefrom.runtime.errors import InputError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


ASKED = "user : a b assistant :"
PAIRS = [
    # Of texts: the prompt in a column of its own, or what both begin with.
    ({"prompt": "a b ", "chosen": "c d", "rejected": "e"}, "a b", "c d <end>", "e <end>"),
    ({"chosen": "a b c d", "rejected": "a b e"}, "a b", "c d <end>", "e <end>"),
    ({"chosen": "d e", "rejected": "d e f"}, "d", "e <end>", "e f <end>"),
    # Of messages.
    (
        {"prompt": [user("a b")], "chosen": [assistant("c")], "rejected": [assistant("d e")]},
        ASKED, "c <end>", "d e <end>",
    ),
    (
        {"chosen": [user("a b"), assistant("c")], "rejected": [user("a b"), assistant("d e")]},
        ASKED, "c <end>", "d e <end>",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), PAIRS)
def test_pairs_become_a_prompt_and_two_completions(
    row: dict[str, Any], prompt: str, chosen: str, rejected: str
) -> None:
    numbers = {"ref_chosen_logps": -3.5, "ref_rejected_logps": -2.5}
    (found,) = prepared([{**row, **numbers}], TEMPLATE, target="preference")
    expected = {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected), **numbers}
    assert {name: found[name] for name in expected} == expected
    assert found["text"].startswith("prompt: ")
    assert found["text"][found["answer_start"] :].startswith("chosen: ")
    (whole,) = prepared([{**row, "margin": 0.5}], TEMPLATE, target="reward")
    assert whole["chosen_ids"] == ids(f"{prompt} {chosen}")
    assert whole["rejected_ids"] == ids(f"{prompt} {rejected}")
    assert whole["margin"] == 0.5


def test_single_completions_keep_their_label() -> None:
    rows = [{"prompt": "a b ", "completion": "c", "label": True}, {"prompt": "d ", "completion": "e", "label": False}]
    found = prepared(rows, target="preference", end_token=False)
    assert [row["completion_ids"] for row in found] == [ids("c"), ids("e")]
    assert [row["label"] for row in found] == [True, False]


def test_long_pairs_are_cut_as_trl_cuts_them_or_refused_where_it_leaves_them_out() -> None:
    row = {"prompt": "a b ", "chosen": "c d e", "rejected": "f"}
    (found,) = prepared([row], target="preference", max_length=4)
    assert (found["prompt_ids"], found["chosen_ids"], found["rejected_ids"]) == (ids("a b"), ids("c d"), ids("f <end>"))
    with pytest.raises(
        InputError, match="Example 1 .* its prompt makes 2 tokens, and max_length is 2, so that nothing is"
    ):
        prepared([{**row, "prompt": "a "}, row], target="preference", max_length=2)
    with pytest.raises(InputError, match="Example 0 of the dataset: 'chosen' makes 6 tokens, and max_length is 5"):
        prepared([row], target="reward", max_length=5)
    with pytest.raises(InputError, match="one is a text and one messages"):
        prepared([{**row, "chosen": [assistant("a")]}], TEMPLATE, target="preference")


def test_words_have_their_label_at_their_first_token() -> None:
    """The words of this tokenizer are tokens, but for those with spaces within."""
    rows = [{"tokens": ["a b", "c", "d e f"], "ner_tags": [4, 5, 6]}]
    (found,) = prepared(rows, target="tokens")
    assert found["input_ids"] == ids("a b c d e f")
    assert found["labels"] == [4, -100, 5, 6, -100, -100]
    with pytest.raises(InputError, match="Example 0 of the dataset: it has 4 labels of 3 words"):
        prepared([{**rows[0], "ner_tags": [4, 5, 6, 7]}], target="tokens")


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert(kind: str, **settings: Any) -> nn.Module:
    import transformers as hf

    torch.manual_seed(3)
    small = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    made: nn.Module = getattr(hf, kind)(configured(hf.BertConfig, **small, intermediate_size=10, **settings))
    return made


ROWS: list[dict[str, Any]] = [
    {"prompt": "a b ", "chosen": "c d", "rejected": "e"}, {"prompt": "a ", "chosen": "e e", "rejected": "c d a"},
    {"prompt": "f ", "chosen": "g", "rejected": "a a"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "task"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, ROWS, "preference.tasks.RewardModel"),
        (
            "BertForSequenceClassification",
            {"num_labels": 1},
            [{"text": "a b", "label": 0.5}, {"text": "c", "label": -1.0}, {"text": "d e f", "label": 2.0}],
            "classification.SequenceClassification",
        ),
        (
            "BertForSequenceClassification",
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [{"text": "a b", "labels": [1.0, 0.0, 1.0]}, {"text": "c", "labels": [0.0, 0.0, 1.0]}],
            "classification.SequenceClassification",
        ),
        (
            "BertForTokenClassification",
            {"num_labels": 3},
            [{"tokens": ["a", "b c"], "labels": [0, 2]}, {"tokens": ["d"], "labels": [1]}],
            "classification.TokenClassification",
        ),
    ],
)
def test_the_architecture_and_the_columns_choose_the_task(
    tmp_path: Path, kind: str, settings: dict[str, Any], rows: list[dict[str, Any]], task: str
) -> None:
    study = wf.study_from_pretrained(saved(tmp_path, bert(kind, **settings)), rows)
    scores = study.score(study.prepare(rows), wf.Diagonal())
    assert f"wherefrom.tasks.{task}" in scores.fingerprint["task"]
    assert (scores.values.diag() > 0).all()  # an example makes itself more likely


def test_an_adapter_trained_by_dpo_is_compared_with_its_base(tmp_path: Path) -> None:
    import peft

    base = saved_gpt2(tmp_path / "base")
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True
    )
    adapted: Any = peft.get_peft_model(gpt2().from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "dpo")
    task = wf.Preference(wf.DPO(beta=0.2), "base", measure="margin")
    study = wf.study_from_pretrained(tmp_path / "dpo", ROWS, task=task)
    assert {name.rsplit(".", 2)[1] for name in study.layers} == {"lora_A", "lora_B"}
    scores = study.score(study.prepare(ROWS[:1]), wf.EKFAC())
    rows: list[object] = [
        {
            "prompt_ids": ids(row["prompt"]),
            "chosen_ids": ids(row["chosen"] + " <end>"),
            "rejected_ids": ids(row["rejected"] + " <end>"),
        }
        for row in ROWS
    ]
    by_hand = wf.Preference(wf.DPO(beta=0.2), gpt2().from_pretrained(base).eval(), ["*lora_*"], "margin")
    hand = wf.Study(tmp_path / "hand", adapted.eval(), by_hand, train=rows)
    assert relative_error(scores.values, hand.score(rows[:1], wf.EKFAC()).values) < 1e-5
    with pytest.raises(InputError, match="nothing says with which loss .*task=wf.Preference"):
        wf.study_from_pretrained(base, ROWS)
