"""Classifiers of every problem type: losses against transformers' own, scores against brute force in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.models import VOCABULARY, Case, relative_error, token_rows
from tests.reference import BruteForce
from tests.runs import factored
from tests.test_language import configured
from wherefrom.engine.loading import Examples, collated
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError


def bert(outputs: int, problem_type: str | None = None, tokens: bool = False) -> nn.Module:
    import transformers as hf

    torch.manual_seed(2)
    config = configured(
        hf.BertConfig, vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, initializer_range=0.4, num_labels=outputs,
        problem_type=problem_type,
    )  # fmt: skip
    return nn.Module.double(
        hf.BertForTokenClassification(config) if tokens else hf.BertForSequenceClassification(config)
    )


def labelled(count: int, seed: int, label: Callable[[int, int], object]) -> list[Any]:
    """Sequences with the label that a function makes of an example's number and length."""
    rows: list[Any] = token_rows(count, seed)
    return [{**row, "labels": label(number, len(row["input_ids"]))} for number, row in enumerate(rows)]


def number(position: int, _: int) -> float:
    return math.sin(position)


def several(position: int, _: int) -> list[float]:
    return [math.sin(position), math.cos(position), 0.1 * position]


def switches(position: int, _: int) -> list[int]:
    return [position % 2, position % 3 // 2, 1]


def yes_or_no(position: int, _: int) -> int:
    return position % 2


def entities(position: int, length: int) -> list[int]:
    return [(position + place) % 3 if place % 3 else -100 for place in range(length)]


Maker = Callable[[str], wf.Task[Any]]
MULTI: Any = "multi_label_classification"
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[int, int], object]]] = {
    "one number": (lambda: bert(1), wf.SequenceClassification, number),
    "numbers": (lambda: bert(3, "regression"), wf.SequenceClassification, several),
    "several classes": (lambda: bert(3, MULTI), wf.SequenceClassification, switches),
    "yes or no": (
        lambda: bert(1),
        lambda **options: wf.SequenceClassification(problem_type=MULTI, **options),
        yes_or_no,
    ),
    "entities": (lambda: bert(3, tokens=True), wf.TokenClassification, entities),
}


def case(name: str, **options: Any) -> Case:
    model, task, label = CASES[name]
    return Case(model(), task(**options), labelled(7, 3, label), labelled(3, 4, label))


@pytest.mark.parametrize(
    ("name", "scale"), [("one number", 1 / 2), ("numbers", 3 / 2), ("several classes", 3), ("yes or no", 1)]
)
def test_losses_are_those_of_transformers_but_for_their_scale(name: str, scale: float) -> None:
    found = case(name)
    model: Any = found.model.eval()
    model.config.problem_type = model.config.problem_type or getattr(found.task, "problem_type", None)
    expected = 0.0
    for row in found.train:
        assert isinstance(row, dict)
        labels = torch.tensor([row["labels"]], dtype=torch.float64).view(1, -1)
        expected += scale * float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.detach())
    batch = collated(Examples(found.train, found.task), range(len(found.train)), model)[0]
    assert float(found.task.train_loss(model, batch).detach()) == pytest.approx(expected, rel=1e-9)


def test_a_token_classifiers_loss_is_transformers_times_the_counted_tokens() -> None:
    found = case("entities")
    model: Any = found.model.eval()
    expected = 0.0
    for row in found.train:
        assert isinstance(row, dict)
        given = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
        expected += float(model(**given).loss.detach()) * int((given["labels"] != -100).sum())
    batch = collated(Examples(found.train, found.task), range(len(found.train)), model)[0]
    assert float(found.task.train_loss(model, batch).detach()) == pytest.approx(
        expected, rel=1e-6
    )  # theirs is in float32


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [None, 5])
def test_scores_equal_brute_force_and_do_not_depend_on_the_batch(tmp_path: Path, name: str, seed: int | None) -> None:
    options = {} if "number" in name else {"measure": "margin"}
    found = case(name, **options)
    layers = list(select_layers(found.model, found.task.layers, found.task.head(found.model)))
    brute = BruteForce(found.model, found.task, layers, found.train, found.queries, seed)
    for size in (1, 4):
        execution = wf.Execution(train_batch_size=size, query_batch_size=size)
        study = wf.Study(tmp_path / str(size), found.model, found.task, train=found.train, execution=execution)
        for strategy in ("identity", "ekfac"):
            scores = study.score(found.queries, factored(strategy, empirical=seed is None, seed=seed or 0))
            assert relative_error(scores.values, brute.scores(strategy)) < 1e-6, (size, strategy)


def test_the_margin_of_several_classes_is_minus_their_log_odds() -> None:
    found = case("several classes", measure="margin")
    expected = 0.0
    for row in found.train:
        assert isinstance(row, dict)
        p = found.model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].sigmoid()
        labels = torch.tensor(row["labels"])
        right = torch.where(labels == 1, p, 1 - p)
        expected -= float((right / (1 - right)).log().sum().detach())
    batch = collated(Examples(found.train, found.task), range(7), found.model)[0]
    assert float(found.task.measurement(found.model, batch).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "options", "label", "message"),
    [
        (lambda: bert(1), {}, 1, "one output, which is no choice between classes. Give problem_type='regression', or"),
        (lambda: bert(3), {}, [1.0, 0.0], r"a label is of shape \[2\], and the model has 3 output\(s\); .* 3 number"),
        (lambda: bert(3), {"problem_type": "regression"}, 0.5, "a label is a real number, and the model has 3 output"),
        (
            lambda: bert(1),
            {"problem_type": "single_label_classification"},
            0,
            "expected a class number, of a model with several",
        ),
        (lambda: bert(3, MULTI), {}, [0.0, 1.5, 1.0], "a label is 1.5: expected 0 or 1 for each output"),
        (lambda: bert(1), {}, math.nan, "expected finite numbers"),
        (lambda: bert(1), {}, [[0.5]], "expected finite numbers, one for each output"),
        (lambda: bert(1), {"measure": "margin"}, 0.5, "regression has no classes"),
    ],
)
def test_labels_that_do_not_suit_the_model_are_refused(
    model: Callable[[], nn.Module], options: dict[str, Any], label: object, message: str
) -> None:
    task, made = wf.SequenceClassification(**options), model()
    with pytest.raises(InputError, match=message):
        task.measurement(made, collated(Examples([{"input_ids": [1, 2], "labels": label}], task), [0], made)[0])


def test_decoders_that_look_for_other_padding_are_refused() -> None:
    """They classify by the last token before it, and would take padding for one."""
    from tests.test_preference import reward_model

    model, rows = reward_model(decoder=True), labelled(3, 3, number)
    task = wf.SequenceClassification(pad_token=7)
    with pytest.raises(InputError, match="pad_token=7, and the model, .* looks for 0 there. Give pad_token=0"):
        collated(Examples(rows, task), range(3), model)


def test_problem_types_are_those_of_transformers() -> None:
    with pytest.raises(InputError, match="problem_type='ranking': expected one of"):
        wf.SequenceClassification(problem_type="ranking")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="have the shapes"):
        wf.SequenceClassification().collate([{"input_ids": [1], "labels": [1.0]}, {"input_ids": [1], "labels": 1.0}])


def test_several_classes_of_plain_models(tmp_path: Path) -> None:
    """The Gauss-Newton matrix of a linear model's logistic losses is known: drawn targets have it on average."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(3, 2, bias=False).double()
    inputs = torch.randn(3, generator=generator, dtype=torch.float64)
    task, draws = wf.MultiLabel(), 4000
    p = model(inputs).sigmoid().detach()
    batch = [inputs.expand(draws, 3), torch.zeros(draws, 2)]
    logits = model(batch[0]).detach().requires_grad_()
    loss = task.train_loss(nn.Identity(), [logits, batch[1]], wf.Sampler(0, range(draws)))
    (slopes,) = torch.autograd.grad(loss, logits)
    found = slopes.T @ slopes / draws
    assert (found - (p * (1 - p)).diag()).abs().max() < 5 / math.sqrt(draws)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).sum()
    assert float(task.train_loss(model, [inputs[None], labels[None]]).detach()) == pytest.approx(
        float(expected), rel=1e-12
    )
    with pytest.raises(InputError, match=r"MultiLabel: the model's output has shape \[1, 2\] and the targets \[1\]"):
        task.train_loss(model, [inputs[None], torch.tensor([1.0])])
    rows: list[object] = [(inputs, labels), (inputs, labels + 1)]
    with pytest.raises(InputError, match="Example 1 of the dataset: a label is 2: expected 0 or 1"):
        wf.Study(tmp_path, model, task, train=rows).fit(wf.EKFAC())
