"""From checkpoint directories and datasets to scores: against the same made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import wherefrom as wf
from tests.models import relative_error
from tests.runs import with_factors
from tests.test_language import configured
from wherefrom.hf.formats import Target
from wherefrom.hf.preparation import Preparation, read_examples
from wherefrom.runtime.errors import InputError

WORDS = ["<pad>", "<end>", "<mask>", "a", "b", "c", "d", "e", "user", "assistant", ":", "f", "g"]
NUMBER = {word: number for number, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' : ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    " <end>{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(NUMBER, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", mask_token="<mask>", chat_template=template
    )


def ids(text: str) -> list[int]:
    return [NUMBER[word] for word in text.split()]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = configured(
        GPT2Config, vocab_size=len(WORDS), n_positions=12, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def saved_gpt2(folder: Path, template: str | None = None) -> Path:
    gpt2().save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


TEXTS = ["a b c d", "b c", "e d c b a", "a a b", "c d e"]


def test_three_lines_give_the_scores_of_a_study_by_hand(tmp_path: Path) -> None:
    folder = saved_gpt2(tmp_path / "checkpoint-5")
    study = wf.study_from_pretrained(folder, TEXTS)
    factors = study.fit()
    scores = study.score(study.prepare(["a b d", "c c"]), with_factors(factors))

    def rows(texts: list[str]) -> list[object]:
        return [{"input_ids": ids(text + " <end>")} for text in texts]

    hand = wf.Study(tmp_path / "hand", gpt2(), wf.CausalLM(), train=rows(TEXTS))
    expected = hand.score(rows(["a b d", "c c"]), wf.EKFAC())
    assert relative_error(scores.values, expected.values) < 1e-6
    assert study.path == folder / "wherefrom"
    assert study.prepare(TEXTS)[0]["text"] == "a b c d"  # type: ignore[index]
    page = study.report(scores, study.prepare(["a b d", "c c"]), tokenizer=study.tokenizer)
    assert "e d c b a" in page.read_text()


@pytest.mark.parametrize("kind", ["file", "saved", "dataset", "rows", "tokenised"])
def test_datasets_of_every_kind_give_the_same_scores(tmp_path: Path, kind: str) -> None:
    folder = saved_gpt2(tmp_path / "model")
    rows = [{"text": text} for text in TEXTS]
    data: Any = rows
    if kind == "file":
        data = tmp_path / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "saved":
        data = tmp_path / "saved"
        Dataset.from_list(rows).save_to_disk(str(data))
    elif kind == "dataset":
        data = Dataset.from_list(rows)
    elif kind == "tokenised":
        data = [{"input_ids": ids(text + " <end>")} for text in TEXTS]
    study = wf.study_from_pretrained(folder, data, run=tmp_path / "run")
    assert [row["input_ids"] for row in study.train] == [ids(text + " <end>") for text in TEXTS]  # type: ignore[attr-defined]
    assert study.score(study.prepare(["a b"]), wf.Dot()).values.shape == (1, 5)


def prepared(rows: Any, template: str | None = None, target: Target = "causal", **options: Any) -> list[dict[str, Any]]:
    return list(Preparation(**options).prepare(read_examples(rows), target, tokenizer(template)))  # type: ignore[call-overload, no-any-return]


def counted(row: dict[str, Any]) -> list[str]:
    """The words whose prediction the loss is of."""
    labels = wf.CausalLM().collate([row])["labels"][0, 1:].tolist()
    return [WORDS[label] for label in labels if label != -100]


def test_texts_are_cut_to_what_the_model_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved_gpt2(tmp_path)
    study = wf.study_from_pretrained(folder, ["a b " * 20, "a"])
    assert [len(row["input_ids"]) for row in study.train] == [12, 2]  # type: ignore[attr-defined]
    short = wf.study_from_pretrained(folder, ["a b " * 20], max_length=5)
    assert len(short.prepare(["c d " * 20])[0]["input_ids"]) == 5  # type: ignore[index]
    short.prepare([{"prompt": "a a a a a a ", "completion": "b"}])
    assert "1 of the 1 examples of the dataset have no counted token and score 0; the first is 0" in caplog.text


def test_masks_are_drawn_once_and_cover_what_they_should() -> None:
    rows = [{"text": "a b c d e f g " * 3}, {"text": "a"}]
    first, second = prepared(rows, target="masked"), prepared(rows, target="masked")
    assert first == second
    for row, text in zip(first, rows, strict=True):
        original, count = ids(text["text"]), 0
        for found, label, token in zip(row["input_ids"], row["labels"], original, strict=True):
            assert (found, label) in {(token, -100), (NUMBER["<mask>"], token)}
            count += label != -100
        assert count == max(1, round(0.15 * len(original)))


def saved_other(folder: Path, kind: str) -> None:
    import transformers as hf

    torch.manual_seed(3)
    small = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    model: Any
    if kind == "Seq2Seq":
        config = configured(
            hf.T5Config, vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=10, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        model = hf.T5ForConditionalGeneration(config)
    elif kind == "MaskedLM":
        model = hf.BertForMaskedLM(configured(hf.BertConfig, **small, intermediate_size=10))
    else:
        model = hf.BertForSequenceClassification(configured(hf.BertConfig, **small, intermediate_size=10))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("MaskedLM", [{"text": text} for text in TEXTS]),
        ("Seq2Seq", [{"prompt": text, "completion": text[:3]} for text in TEXTS]),
        ("SequenceClassification", [{"text": text, "label": row % 2} for row, text in enumerate(TEXTS)]),
    ],
)
def test_the_architecture_chooses_the_task(tmp_path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    saved_other(tmp_path, kind)
    study = wf.study_from_pretrained(tmp_path, rows)
    scores = study.score(study.prepare(rows[:2]), wf.Diagonal())
    assert scores.values.shape == (2, 5)
    module = "classification" if kind == "SequenceClassification" else "language"
    assert f"wherefrom.tasks.{module}.{kind}" in scores.fingerprint["task"]
    assert float(scores.values[0, 0]) > 0  # an example makes itself more likely


def test_adapters_are_put_on_their_model(tmp_path: Path) -> None:
    import peft

    base = saved_gpt2(tmp_path / "base")
    model = gpt2().from_pretrained(base)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, generator=generator)
    adapted.save_pretrained(tmp_path / "checkpoint-3")
    study = wf.study_from_pretrained(tmp_path / "checkpoint-3", TEXTS)
    assert [name.rsplit(".", 2)[1] for name in study.layers] == ["lora_A", "lora_B"]
    scores = study.score(study.prepare(["a b"]), wf.EKFAC())
    rows: list[object] = [{"input_ids": ids(text + " <end>")} for text in [*TEXTS, "a b"]]
    hand = wf.Study(tmp_path / "hand", adapted.eval(), wf.CausalLM(["*lora_*"]), train=rows[:5])
    expected = hand.score(rows[5:], wf.EKFAC())
    assert relative_error(scores.values, expected.values) < 1e-5
    chosen = wf.study_from_pretrained(
        tmp_path / "checkpoint-3", TEXTS, task=wf.CausalLM(["*.lora_A.*"], measure="margin"), run=tmp_path / "other"
    )
    assert len(chosen.layers) == 1


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        wf.study_from_pretrained(tmp_path / "nowhere", TEXTS)
    with pytest.raises(InputError, match="run=None with the model 'owner/name', which is no folder"):
        wf.study_from_pretrained("owner/name", TEXTS)
    folder = saved_gpt2(tmp_path / "model")
    with pytest.raises(InputError, match="device='cuda:99' is not available here"):
        wf.study_from_pretrained(folder, TEXTS, device="cuda:99")
    with pytest.raises(
        InputError, match=r"columns \['words'\]: expected 'input_ids'.*'messages', or .*'prompt' and 'com"
    ):
        wf.study_from_pretrained(folder, [{"words": 5}])
    with pytest.raises(InputError, match="dataset is empty"):
        wf.study_from_pretrained(folder, [])
    with pytest.raises(InputError, match="dataset is empty"):
        wf.study_from_pretrained(folder, {})
    with pytest.raises(InputError, match="Example 1 of the dataset has no token"):
        wf.study_from_pretrained(folder, ["a", ""], end_token=False)
    with pytest.raises(InputError, match="Example 1 of the dataset has no 'completion'"):
        wf.study_from_pretrained(folder, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}])
    with pytest.raises(
        InputError, match=r"IterableDataset, whose examples have no positions.*read_stream\(stream, lim"
    ):
        wf.study_from_pretrained(folder, Dataset.from_list([{"text": "a"}]).to_iterable_dataset())
    bare = tmp_path / "bare"
    gpt2().save_pretrained(bare)
    with pytest.raises(InputError, match="no tokenizer: pass tokenizer="):
        wf.study_from_pretrained(bare, TEXTS)
    assert len(wf.study_from_pretrained(bare, [{"input_ids": [1, 2, 3]}]).train) == 1
    assert len(wf.study_from_pretrained(bare, TEXTS, tokenizer=tokenizer()).train) == 5
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2ForQuestionAnswering"]}))
    with pytest.raises(InputError, match="architecture is GPT2ForQuestionAnswering"):
        wf.study_from_pretrained(bare, TEXTS)
    (bare / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not name the model that the adapter belongs to"):
        wf.study_from_pretrained(bare, TEXTS)


def test_the_engine_does_without_transformers() -> None:
    """Neither `import wherefrom` nor a task imports it."""
    import subprocess
    import sys

    script = "import sys, wherefrom; wherefrom.CausalLM(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = wf.Nothing  # type: ignore[attr-defined]
