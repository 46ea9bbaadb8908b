"""Columns that a model takes: packed sequences against their documents alone, and what is left out or not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, gpt2, relative_error, token_rows
from tests.reference import BruteForce
from tests.test_language import bart, bert, configured, masked_rows, pair_rows
from wherefrom.engine.loading import Examples, collated
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.tasks.task import Task

Row = dict[str, Any]


def llama() -> nn.Module:
    """Rotary positions, and grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = configured(
        LlamaConfig,
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=12, initializer_range=0.4,
    )  # fmt: skip
    return nn.Module.double(LlamaForCausalLM(config))


MODELS: dict[str, Callable[[], nn.Module]] = {"GPT-2": gpt2, "Llama": llama}


def documents(row: Row) -> list[Row]:
    """The documents of a packed sequence, each alone."""
    begins = [place for place, position in enumerate(row["position_ids"]) if position == 0]
    ends = [*begins[1:], len(row["input_ids"])]
    names = [name for name in ("input_ids", "labels", "completion_mask") if name in row]
    return [{name: row[name][begin:end] for name in names} for begin, end in zip(begins, ends, strict=True)]


def packed(rows: list[Any], together: tuple[int, ...], **columns: Callable[[int], list[int]]) -> list[Row]:
    """Rows of so many documents each, with the positions that TRL's collators give them."""
    found, start = [], 0
    for count in together:
        tokens = [row["input_ids"] for row in rows[start : start + count]]
        row: Row = {
            "input_ids": list(chain.from_iterable(tokens)),
            "position_ids": list(chain.from_iterable(range(len(each)) for each in tokens)),
        }
        found.append({**row, **{name: make(len(row["input_ids"])) for name, make in columns.items()}})
        start += count
    return found


def batch_of(model: nn.Module, task: Task[Any], rows: list[Any]) -> Any:
    return collated(Examples(rows, task), range(len(rows)), model)[0]


def loss_of(model: nn.Module, task: Task[Any], rows: list[Any]) -> float:
    return float(task.train_loss(model, batch_of(model, task, rows)).detach())


# Rows of one to four documents, so that batches are padded.
TOGETHER = (3, 1, 4, 2)


@pytest.mark.parametrize("columns", [{}, {"completion_mask": lambda tokens: [place % 2 for place in range(tokens)]}])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_scores_of_packed_rows_are_sums_of_their_documents(
    tmp_path: Path, make: Callable[[], nn.Module], columns: dict[str, Any]
) -> None:
    """Documents alone are scored the long way, in float64; whatever the batches and their padding."""
    model, task = make(), wf.CausalLM()
    train, queries = packed(token_rows(10), TOGETHER, **columns), packed(token_rows(4, seed=4), (2, 2))
    study = wf.Study(tmp_path, model, task, train=train)
    alone, queried = ([each for row in rows for each in documents(row)] for rows in (train, queries))
    brute = BruteForce(model, task, list(study.layers), alone, queried)
    of_documents = brute.scores("identity")
    expected = torch.stack([
        torch.stack([part.sum() for part in rows.split([len(documents(row)) for row in train], 1)])
        for rows in of_documents.split([len(documents(row)) for row in queries])
    ])  # fmt: skip
    for size in (1, 3):
        execution = wf.Execution(train_batch_size=size, query_batch_size=size)
        scores = study.score(queries, wf.Dot(), name=str(size), execution=execution)
        assert relative_error(scores.values, expected) < 1e-10, size


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_lengths_as_trl_packs_rows_say_the_same_as_positions(make: Callable[[], nn.Module]) -> None:
    model, task = make().eval(), wf.CausalLM()
    rows = packed(token_rows(10), TOGETHER)
    by_lengths = [
        {
            "input_ids": row["input_ids"],
            "seq_lengths": [len(each["input_ids"]) for each in documents(row)],
            "attention_mask": [1] * len(row["input_ids"]),
        }
        for row in rows
    ]
    losses = [loss_of(model, task, each) for each in (rows, by_lengths)]
    alone = sum(loss_of(model, task, [document]) for row in rows for document in documents(row))
    assert losses == pytest.approx([alone, alone], rel=1e-12)


def test_flattened_rows_as_transformers_makes_them_are_taken() -> None:
    from transformers import DataCollatorWithFlattening

    rows: list[Any] = token_rows(3)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows, return_tensors="pt")
    row = {name: each[0] if isinstance(each, Tensor) and each.dim() == 2 else each for name, each in batch.items()}
    model, task = llama().eval(), wf.CausalLM()
    expected = sum(loss_of(model, task, [each]) for each in rows)
    assert loss_of(model, task, [row]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="'cu_seq_lens_q' says where documents .* no 'position_ids'"):
        batch_of(model, task, [{name: each for name, each in row.items() if name != "position_ids"}])


class Mixing(nn.Module):
    """Takes positions, and lets every token see all before it, as models do that are given a mask of ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        inputs["attention_mask"] = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, position_ids=position_ids, **inputs)


def test_a_model_that_mixes_documents_is_refused_and_not_without_cause(tmp_path: Path) -> None:
    rows = packed(token_rows(4), (2, 2))
    study = wf.Study(tmp_path / "mixing", Mixing(gpt2()), wf.CausalLM(), train=rows)
    with pytest.raises(
        InputError, match="Mixing lets the documents of one sequence see each other .* a sequence of its own"
    ):
        study.score(rows, wf.Dot())
    single = packed(token_rows(2), (1, 1))
    study = wf.Study(tmp_path / "single", Mixing(gpt2()), wf.CausalLM(), train=single)
    assert study.score(single, wf.Dot()).values.isfinite().all()
    with pytest.raises(InputError, match="Mixing lets the documents"):
        wf.ReplayableTraining(Mixing(gpt2()), wf.CausalLM(), rows, wf.TrainingRecipe(1, [0.1]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"position_ids": [0, 1, 0, 1], "attention_mask": [1, 1, 1, 1]},
            "start again within the sequence, and there is an",
        ),
        ({"position_ids": [1, 1, 0, 1], "attention_mask": [0, 0, 1, 1]}, "leaves out tokens before others"),
        ({"seq_lengths": [2, 2], "attention_mask": [1, 1, 1, 0]}, "start again within the sequence, and there is an"),
        ({"seq_lengths": [2, 1]}, "'seq_lengths' adds up to 3 in a sequence of 4 tokens"),
        ({"position_ids": [0, 1, 2]}, "'position_ids' has 3 numbers and 'input_ids' 4"),
        ({"position_ids": [[0, 1, 2, 3]] * 3}, "'position_ids' is torch.int64 .3, 4.: expected .* one sequence"),
        ({"position_ids": [0, 1, 2, 12]}, "'position_ids' holds 12, and the model has positions 0 to 11"),
        ({"token_type_ids": [0, 1, 2, 13]}, "'token_type_ids' holds 13"),
        ({"inputs_embeds": [[0.0] * 8] * 4}, "'inputs_embeds' is an input of GPT2LMHeadModel that cannot be passed on"),
        ({"past_key_values": [1]}, "'past_key_values' is an input .* without a cache"),
        ({"encoder_hidden_states": "image.png"}, "'encoder_hidden_states' .* it is a str"),
        ({"encoder_hidden_states": [[1.0], [1.0, 2.0]]}, "'encoder_hidden_states' cannot be made a tensor"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_by_name(columns: Row, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        batch_of(gpt2(), wf.CausalLM(), [{"input_ids": [1, 2, 3, 4], **columns}])


def test_lengths_are_refused_for_a_model_that_takes_no_positions() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> None:
            raise AssertionError

    with pytest.raises(InputError, match="Plain takes no 'position_ids'"):
        batch_of(Plain(), wf.CausalLM(), [{"input_ids": [1, 2, 3], "seq_lengths": [2, 1]}])
    batch = batch_of(Plain(), wf.CausalLM(), [{"input_ids": [1, 2], "position_ids": [0, 1]}])
    assert sorted(batch) == ["input_ids", "labels"]  # as a Trainer removes columns


def test_segments_are_passed_on_where_the_model_takes_them() -> None:
    model, task, rows = gpt2().eval(), wf.CausalLM(), [dict(row) for row in token_rows(4)]  # type: ignore[call-overload]
    for row in rows:
        row["token_type_ids"] = [place % 3 for place in range(len(row["input_ids"]))]
    expected = 0.0
    for row in rows:
        given = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        expected += float(model(**given, labels=given["input_ids"]).loss) * (len(row["input_ids"]) - 1)
    assert loss_of(model, task, rows) == pytest.approx(expected, rel=1e-6)  # transformers' loss is in float32
    without = [{"input_ids": row["input_ids"]} for row in rows]
    assert abs(loss_of(model, task, without) - expected) > 0.1


class Seeing(nn.Module):
    """A language model that looks at an image, and at a number for each token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.image = nn.Linear(6, 8).double()
        self.config = model.config

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, weights: Tensor, attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> Any:  # fmt: skip
        seen = self.image(pixel_values.flatten(1).double()).unsqueeze(1)  # [batch, 1, 8]
        embedded = self.model.get_input_embeddings()(input_ids) * weights.unsqueeze(2) + seen
        return self.model(inputs_embeds=embedded, attention_mask=attention_mask)


def test_images_are_stacked_and_numbers_of_tokens_padded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    rows: list[Any] = [
        {
            **row,  # type: ignore[dict-item]
            "pixel_values": torch.randn(1, 2, 3, generator=generator, dtype=torch.float64),
            "weights": torch.rand(len(row["input_ids"]), generator=generator).double().numpy(),  # type: ignore[index]
            "text": "metadata", "id": number, "offsets": [[0, 1]] * number, "meta": {"source": np.ones(number)},
        }
        for number, row in enumerate(token_rows(6))
    ]  # fmt: skip
    model = Seeing(gpt2())
    task = wf.CausalLM()
    study = wf.Study(tmp_path, model, task, train=rows)
    needed = [{name: row[name] for name in ("input_ids", "pixel_values", "weights")} for row in rows]
    expected = BruteForce(model, task, list(study.layers), needed, needed[:2]).scores("identity")
    for size in (1, 4):
        found = study.score(rows[:2], wf.Dot(), name=str(size), execution=wf.Execution(train_batch_size=size))
        assert relative_error(found.values, expected) < 1e-10
    changed = [{**row, "pixel_values": row["pixel_values"] + 1} for row in rows]
    other = wf.Study(tmp_path, model, task, train=changed)
    with pytest.raises(MismatchError, match="training data"):
        other.score(rows[:2], wf.Dot(), name="1")


def test_images_of_different_sizes_are_refused_by_name() -> None:
    rows: list[Any] = [
        {"input_ids": [1] * 4, "pixel_values": torch.zeros(1, 2, size), "weights": [1.0] * 4} for size in (2, 3)
    ]
    with pytest.raises(InputError, match=r"'pixel_values' has the shapes \[1, 2, 2\], \[1, 2, 3\] in examples of 4, 4"):
        batch_of(Seeing(gpt2()), wf.CausalLM(), rows)


def with_positions(row: Row) -> Row:
    return {**row, "position_ids": [len(row["input_ids"]) - place for place in range(len(row["input_ids"]))]}


@pytest.mark.parametrize("classifier", [False, True])
def test_other_tasks_pass_positions_on_whatever_the_padding(classifier: bool) -> None:
    model = bert(classifier).eval()
    task: Task[Any] = wf.SequenceClassification() if classifier else wf.MaskedLM()
    rows: list[Any] = [with_positions(dict(row)) for row in masked_rows(4, 3)]  # type: ignore[call-overload]
    if classifier:
        rows = [{**row, "labels": number % 3} for number, row in enumerate(rows)]
    expected = 0.0
    for row in rows:
        given = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids", "position_ids")}
        labels = torch.tensor([row["labels"]])
        counted = int((labels != -100).sum())
        expected += float(model(**given, labels=labels).loss) * counted
    assert loss_of(model, task, rows) == pytest.approx(expected, rel=1e-6)
    without = [{name: each for name, each in row.items() if name != "position_ids"} for row in rows]
    assert abs(loss_of(model, task, without) - expected) > 0.01


def test_the_decoders_own_inputs_are_passed_on() -> None:
    model, task = bart().eval(), wf.Seq2Seq()
    rows: list[Any] = pair_rows(6, 1)
    rows = [{**row, "decoder_input_ids": [abs(each + 1) % VOCABULARY for each in row["labels"]]} for row in rows]
    expected = 0.0
    for row in rows:
        given = {name: torch.tensor([row[name]]) for name in ("input_ids", "decoder_input_ids")}
        logits = model(**given).logits[0]
        expected += float(nn.functional.cross_entropy(logits, torch.tensor(row["labels"]), reduction="sum"))
    assert loss_of(model, task, rows) == pytest.approx(expected, rel=1e-10)
    assert abs(loss_of(model, task, [{**row, "decoder_input_ids": None} for row in rows]) - expected) > 0.1
    with pytest.raises(InputError, match="'decoder_input_ids' has 1 numbers and 'labels'"):
        batch_of(model, task, [{**rows[0], "decoder_input_ids": [1]}])


def test_adapters_take_what_their_model_takes() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    rows = packed(token_rows(4), (2, 2))
    alone = [document for row in rows for document in documents(row)]
    assert loss_of(model, wf.CausalLM(), rows) == pytest.approx(loss_of(model, wf.CausalLM(), alone), rel=1e-10)


def test_a_task_of_your_own_reads_columns_that_the_model_does_not_take() -> None:
    class Weighted(wf.CausalLM):
        def collate(self, examples: Any) -> dict[str, Tensor]:
            batch = super().collate(examples)
            return {**batch, "weight": torch.tensor([float(each["weight"]) for each in examples])}

        def train_loss(self, model: nn.Module, batch: dict[str, Tensor], sampler: Any = None) -> Tensor:
            return batch["weight"].sum() * super().train_loss(model, batch, sampler)

    model, row = gpt2().eval(), {"input_ids": [1, 2, 3], "weight": 3}
    assert loss_of(model, Weighted(), [row]) == pytest.approx(3 * loss_of(model, wf.CausalLM(), [row]))


def with_lengths(rows: list[Row]) -> list[Row]:
    """What TRL's packing writes: lengths of documents in the place of positions, and a mask of ones."""
    return [
        {
            **{name: value for name, value in row.items() if name != "position_ids"},
            "seq_lengths": [len(each["input_ids"]) for each in documents(row)],
            "attention_mask": [1] * len(row["input_ids"]),
        }
        for row in rows
    ]


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_unpacked_documents_add_up_to_their_packed_examples(
    tmp_path: Path, make: Callable[[], nn.Module], lengths: bool
) -> None:
    columns: dict[str, Any] = {"completion_mask": lambda tokens: [place % 2 for place in range(tokens)]}
    rows, model, queries = packed(token_rows(10), TOGETHER, **columns), make(), token_rows(3, seed=4)
    rows = with_lengths(rows) if lengths else rows
    execution = wf.Execution(train_batch_size=3)
    whole = wf.Study(tmp_path / "packed", model, wf.CausalLM(), train=rows, execution=execution)
    view = wf.unpacked(rows)
    study = wf.Study(tmp_path / "unpacked", model, wf.CausalLM(), train=view, execution=execution)
    assert len(view) == 10 and [each.example for each in view.documents] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    of_documents = study.score(queries, wf.Dot()).values
    found = torch.stack([part.sum(1) for part in of_documents.split(TOGETHER, 1)], 1)
    assert relative_error(found, whole.score(queries, wf.Dot()).values) < 1e-10
    alone = [
        {"input_ids": each["input_ids"], "completion_mask": each["completion_mask"]}
        for row in packed(token_rows(10), TOGETHER, **columns)
        for each in documents(row)
    ]
    brute = BruteForce(model, wf.CausalLM(), list(study.layers), alone, queries)
    assert relative_error(of_documents, brute.scores("identity")) < 1e-10


def test_unpacked_datasets_of_every_kind_have_the_same_documents_and_digest() -> None:
    from datasets import Dataset

    from wherefrom.store.fingerprint import dataset_digest

    rows: list[Row] = [
        {**row, "labels": [-each for each in row["input_ids"]], "id": number, "text": "both", "pair": [number, 7]}
        for number, row in enumerate(packed(token_rows(4), (3, 1)))
    ]
    expected = [
        {**each, "position_ids": list(range(len(each["input_ids"]))), "id": number, "pair": [number, 7]}
        for number, row in enumerate(rows)
        for each in documents(row)
    ]
    views = [wf.unpacked(rows), wf.unpacked(Dataset.from_list(rows))]
    for view in views:
        assert [view[position] for position in range(4)] == expected
        assert [view[position] for position in (3, 0, 2)] == [expected[position] for position in (3, 0, 2)]
        assert dataset_digest(view) == dataset_digest(expected)
    tensors: Any = wf.unpacked(Dataset.from_list(rows).with_format("torch"))
    assert [tensors[position]["input_ids"].tolist() for position in range(4)] == [row["input_ids"] for row in expected]


def test_padding_is_no_document() -> None:
    rows = [{"input_ids": [1, 2, 3, 0, 0], "position_ids": [0, 1, 2, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}]
    (only,) = list(map(wf.unpacked(rows).__getitem__, range(1)))
    assert only == {"input_ids": [1, 2, 3], "position_ids": [0, 1, 2], "attention_mask": [1, 1, 1]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "neither 'position_ids' nor 'seq_lengths'"),
        (
            {"position_ids": [0, 1, 0, 1], "attention_mask": [1, 1, 1, 1]},
            "start again within the sequence, and there is an",
        ),
        ({"seq_lengths": [2, 1]}, "'seq_lengths' adds up to 3 in a sequence of 4 tokens"),
        ({"position_ids": [0, 1, 0]}, "'position_ids' has 3 numbers and 'input_ids' 4"),
        ({"input_ids": None}, "no dict with 'input_ids'"),
        ({"seq_lengths": [2, 2], "prompt_length": 1}, "'prompt_length' is of all its documents together"),
    ],
)
def test_rows_that_do_not_say_what_is_in_them_are_not_unpacked(columns: Row, message: str) -> None:
    rows = [{"input_ids": [1, 2], "position_ids": [0, 1]}, {"input_ids": [1, 2, 3, 4], **columns}]
    with pytest.raises(InputError, match=f"Example 1 of the packed dataset.*{message}"):
        wf.unpacked(rows)
