"""Language tasks: measurements against closed forms, scores of every architecture against brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, Case, gpt2, relative_error, token_rows
from tests.reference import BruteForce
from tests.runs import factored, only, with_factors
from wherefrom.engine.capture import Capture
from wherefrom.engine.loading import Examples, Loader
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, LayerError, MismatchError
from wherefrom.tasks.language import LanguageTask

STRATEGIES = ["identity", "diagonal", "kfac", "ekfac", "shampoo"]


def numbers(count: int, *shape: int, seed: int, high: int = VOCABULARY) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, high, shape, generator=generator).tolist() for _ in range(count)]


def configured(kind: Any, **settings: Any) -> Any:
    """A configuration with settings that its class takes and does not declare."""
    return kind(**settings)


def bert(classifier: bool = False) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    torch.manual_seed(2)
    config = configured(
        BertConfig,
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, initializer_range=0.4, num_labels=3,
    )  # fmt: skip
    return nn.Module.double(BertForSequenceClassification(config) if classifier else BertForMaskedLM(config))


def masked_rows(count: int, seed: int) -> list[object]:
    """Two masked tokens in each sequence; token 0 is the mask."""
    rows: list[object] = []
    for number, row in enumerate(token_rows(count, seed)):
        tokens = list(row["input_ids"])  # type: ignore[index]
        labels = [-100] * len(tokens)
        for place in (number % len(tokens), -1):
            labels[place], tokens[place] = row["input_ids"][place], 0  # type: ignore[index]
        rows.append({"input_ids": tokens, "labels": labels, "token_type_ids": [0] + [1] * (len(tokens) - 1)})
    return rows


def masked_case() -> Case:
    return Case(bert(), wf.MaskedLM(), masked_rows(10, 3), masked_rows(4, 4))


def classified_rows(count: int, seed: int) -> list[object]:
    return [{**row, "label": number % 3} for number, row in enumerate(token_rows(count, seed))]  # type: ignore[dict-item]


def classification_case() -> Case:
    return Case(bert(True), wf.SequenceClassification(), classified_rows(10, 3), classified_rows(4, 4))


def pair_rows(count: int, seed: int) -> list[object]:
    """Pairs of different lengths and of equal ones, so that batches of many have sides of equal length, too."""
    rows: list[object] = []
    for number in range(count):
        source, target = 2 + number % 6, 2 + (5 * number + seed) % 6
        inputs, labels = (numbers(1, size, seed=97 * seed + number + size)[0] for size in (source, target))
        if number % 4 == 0:
            labels[0] = -100  # not counted, and yet a token
        rows.append({"input_ids": inputs, "labels": labels})
    return rows


class Unextended(wf.Seq2Seq):
    """Without the decoder's further column, as one example alone needs none: what the brute force is of."""

    def collate(self, examples: Any) -> dict[str, Tensor]:
        batch = super().collate(examples)
        assert len(examples) == 1
        return {**batch, "labels": batch["labels"][:, : len(examples[0]["labels"])]}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(2)
    config = configured(
        T5Config,
        vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=10, num_layers=1, num_heads=2, dropout_rate=0,
        initializer_factor=1.0, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return nn.Module.double(T5ForConditionalGeneration(config))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(2)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=10, decoder_ffn_dim=10, max_position_embeddings=16, init_std=0.4,
        pad_token_id=0, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return nn.Module.double(BartForConditionalGeneration(config))


def t5_case() -> Case:
    return Case(t5(), wf.Seq2Seq(), pair_rows(12, 1), pair_rows(4, 2))


def bart_case() -> Case:
    return Case(bart(), wf.Seq2Seq(), pair_rows(12, 1), pair_rows(4, 2))


def completion_case() -> Case:
    def rows(count: int, seed: int) -> list[object]:
        return [{**row, "prompt_length": 2} for row in token_rows(count, seed)]  # type: ignore[dict-item]

    return Case(gpt2(), wf.CausalLM(["transformer.h.*"], measure="margin"), rows(10, 3), rows(4, 4))


CASES = [masked_case, classification_case, t5_case, bart_case, completion_case]


def reference_task(task: Any) -> Any:
    return Unextended(task.layers) if isinstance(task, wf.Seq2Seq) else task


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("seed", [None, 5])
def test_scores_equal_brute_force_and_do_not_depend_on_the_batch(
    tmp_path: Path, make: Callable[[], Case], seed: int | None
) -> None:
    case = make()
    layers = list(select_layers(case.model, case.task.layers, case.task.head(case.model)))
    brute = BruteForce(case.model, reference_task(case.task), layers, case.train, case.queries, seed)
    for size in (1, 5, len(case.train)):
        execution = wf.Execution(train_batch_size=size, query_batch_size=min(size, 4))
        study = wf.Study(tmp_path / str(size), case.model, case.task, train=case.train, execution=execution)
        assert list(study.layers) == layers
        for strategy in STRATEGIES:
            scores = study.score(case.queries, factored(strategy, empirical=seed is None, seed=seed or 0))
            assert relative_error(scores.values, brute.scores(strategy)) < 1e-6, (size, strategy)


def test_encoder_and_decoder_of_equal_length_are_told_apart() -> None:
    """A batch whose sides are padded to one length: each layer's tokens are counted on its own side."""
    task, model = wf.Seq2Seq(), t5()
    rows: list[object] = [
        {"input_ids": [3, 4, 5, 6], "labels": [7]},
        {"input_ids": [3, 4], "labels": [7, 8, 9, 10]},
    ]
    counts: dict[str, int] = {}
    layers = select_layers(model, None, task.head(model))
    with Loader(Examples(rows, task), torch.device("cpu")) as loader:
        batch, padding, _ = loader.load(range(2))
    with Capture(model, layers, lambda name, captured: counts.update({name: captured.tokens})) as capture:
        capture.run(lambda: task.train_loss(model, batch), 2, padding)
    for name, count in counts.items():
        encoder = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert count == (6 if encoder else 5), name


def test_masks_that_cannot_be_told_apart_are_refused() -> None:
    class Alike(wf.Seq2Seq):
        def collate(self, examples: Any) -> dict[str, Tensor]:
            batch = super().collate(examples)
            return {**batch, "labels": batch["labels"][:, : batch["input_ids"].shape[1]].contiguous()}

    rows: list[object] = [{"input_ids": [3, 4, 5], "labels": [7]}, {"input_ids": [3], "labels": [7, 8, 9]}]
    task, model = Alike(), t5()
    layers = select_layers(model, None, task.head(model))
    with Loader(Examples(rows, task), torch.device("cpu")) as loader:
        batch, padding, _ = loader.load(range(2))
    with (
        Capture(model, layers, lambda name, captured: None) as capture,
        pytest.raises(LayerError, match=r"2 masks of 3 tokens, and 1 call\(s\) of the model"),
    ):
        capture.run(lambda: task.train_loss(model, batch), 2, padding)


def test_token_scores_of_an_encoder(tmp_path: Path) -> None:
    case = t5_case()
    study = wf.Study(tmp_path, case.model, wf.Seq2Seq(["encoder.*.[qkvo]", "encoder.*.w[io]"]), train=case.train)
    tokens, scores = study.score(case.queries, wf.Dot(), keep=wf.Tokens()), study.score(case.queries, wf.Dot())
    assert tokens.lengths.tolist() == [len(row["input_ids"]) for row in case.train]  # type: ignore[index]
    assert relative_error(tokens.values.sum(2), scores.values) < 1e-9
    whole = wf.Study(tmp_path / "whole", case.model, wf.Seq2Seq(), train=case.train)
    with pytest.raises(LayerError, match="belongs to no single token"):
        whole.score(case.queries, wf.Dot(), keep=wf.Tokens())


def test_margin_is_minus_the_log_odds() -> None:
    model, rows = gpt2().eval(), token_rows(4)
    expected = 0.0
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])  # type: ignore[index]
        p = model(input_ids=tokens).logits[0, :-1].softmax(-1).gather(1, tokens[0, 1:, None])
        expected -= float((p / (1 - p)).log().sum().detach())
    task = wf.CausalLM(measure="margin")
    assert float(task.measurement(model, task.collate(rows)).detach()) == pytest.approx(expected, rel=1e-10)
    loss = wf.CausalLM().train_loss(model, task.collate(rows))
    assert float(task.train_loss(model, task.collate(rows)).detach()) == float(loss.detach())


@pytest.mark.parametrize("position", [-1, 0, 2, -3])
@pytest.mark.parametrize("left", [False, True])
def test_chosen_token_is_minus_its_log_probability(position: int, left: bool) -> None:
    model, rows = gpt2().eval(), token_rows(4)
    task = wf.CausalLM(measure=wf.ChosenToken(7, position))
    expected = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]  # type: ignore[index]
        expected -= float(logits.log_softmax(-1)[position, 7].detach())
    batch = task.collate(rows)
    if left:  # padding on the left, which shifts positions, so the model is asked with the positions they have
        batch = {name: torch.stack([_rolled(batch, name, row) for row in range(4)]) for name in batch}
        ids = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        whole = _Positioned(model, ids)
        assert float(task.measurement(whole, batch).detach()) == pytest.approx(expected, rel=1e-9)
    else:
        assert float(task.measurement(model, batch).detach()) == pytest.approx(expected, rel=1e-9)


def _rolled(batch: dict[str, Tensor], name: str, row: int) -> Tensor:
    return batch[name][row].roll(int((batch["attention_mask"][row] == 0).sum()))


class _Positioned(nn.Module):
    def __init__(self, model: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, **inputs: Any) -> Any:
        return self.model(position_ids=self.positions, **inputs)


def test_chosen_tokens_that_are_not_there_are_refused() -> None:
    model = gpt2().eval()
    task = wf.CausalLM(measure=wf.ChosenToken(7, 3))
    with pytest.raises(InputError, match="position=3 of a query with 3 tokens"):
        task.measurement(model, task.collate([{"input_ids": [1, 2, 3, 4]}, {"input_ids": [1, 2, 3]}]))
    task = wf.CausalLM(measure=wf.ChosenToken(VOCABULARY))
    with pytest.raises(InputError, match="vocabulary has tokens 0 to 12"):
        task.measurement(model, task.collate([{"input_ids": [1, 2]}]))


@pytest.mark.parametrize(
    "columns",
    [{"prompt_length": 2}, {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 1]},
     {"labels": [-100, -100, 3, 4]}, {"labels": [-100, 2, 3, 4], "prompt_length": 2}],
)  # fmt: skip
def test_every_way_to_count_only_a_completion(columns: dict[str, object]) -> None:
    batch = wf.CausalLM().collate([{"input_ids": [1, 2, 3, 4], **columns}, {"input_ids": [5], **_cut(columns)}])
    assert batch["labels"].tolist() == [[-100, -100, 3, 4], [-100] * 4]


def _cut(columns: dict[str, object]) -> dict[str, object]:
    return {name: value[:1] if isinstance(value, list) else value for name, value in columns.items()}


def test_classifying_decoders_find_their_last_token() -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = configured(
        GPT2Config,
        vocab_size=13, n_positions=12, n_embd=8, n_layer=1, n_head=2, num_labels=3, pad_token_id=11,
        initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = nn.Module.double(GPT2ForSequenceClassification(config)).eval()
    task = wf.SequenceClassification(pad_token=11)
    rows = [{"input_ids": [1, 2, 0], "labels": 1}, {"input_ids": [3, 4, 5, 6, 7], "labels": 2}]
    alone = sum(float(task.train_loss(model, task.collate([row])).detach()) for row in rows)
    assert float(task.train_loss(model, task.collate(rows)).detach()) == pytest.approx(alone, rel=1e-10)


def test_missing_and_mixed_columns_are_named() -> None:
    for task in (wf.MaskedLM(), wf.Seq2Seq()):
        with pytest.raises(InputError, match=r"needs examples with 'labels'.*found \['attention_mask', 'input_ids'\]"):
            task.collate([{"input_ids": [1, 2]}])
    with pytest.raises(InputError, match="needs examples with 'labels'"):
        wf.SequenceClassification().collate([{"input_ids": [1, 2]}])
    rows: list[object] = [{"input_ids": [1], "token_type_ids": [0], "label": 0}, {"input_ids": [1], "label": 0}]
    with pytest.raises(InputError, match="give all examples the same"):
        wf.SequenceClassification().collate(rows)
    with pytest.raises(InputError, match="has the measures 'loss' and 'margin'"):
        wf.MaskedLM(measure="accuracy")  # type: ignore[arg-type]


def test_a_task_of_your_own_is_its_predictions() -> None:
    class LastOnly(LanguageTask):
        def predictions(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return model(input_ids=batch["input_ids"][:, :-1]).logits[:, -1], batch["input_ids"][:, -1]

    model, task = gpt2().eval(), LastOnly()
    tokens = torch.tensor([[1, 2, 3]])
    expected = -model(input_ids=tokens[:, :2]).logits[0, -1].log_softmax(-1)[3].detach()
    assert float(task.measurement(model, task.collate([{"input_ids": [1, 2, 3]}])).detach()) == pytest.approx(
        float(expected), rel=1e-12
    )


def test_factors_serve_every_measurement(tmp_path: Path) -> None:
    """What is measured is the queries' business: no new fit, and no mixing of scores."""
    model, train, queries = gpt2(), token_rows(6), token_rows(2, seed=4)

    def study(measure: Any) -> wf.Study[Any]:
        return wf.Study(tmp_path, model, wf.CausalLM(measure=measure), train=train)

    factors = study("loss").fit(wf.EKFAC())
    loss = study("loss").score(queries, with_factors(factors), name="mine")
    file = only(tmp_path / "factors", "sampled") / "eigenvalues" / "tensors.safetensors"
    before = file.stat().st_mtime_ns
    with pytest.raises(MismatchError, match="measured: stored 'loss', now 'margin'"):
        study("margin").score(queries, wf.EKFAC(), name="mine")
    margin = study("margin").score(queries, with_factors(factors))
    assert file.stat().st_mtime_ns == before
    assert relative_error(margin.values, loss.values) > 1e-3
    assert torch.equal(
        study("margin").self_influence(with_factors(factors)), study("loss").self_influence(with_factors(factors))
    )
