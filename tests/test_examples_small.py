"""The diabetes, LoRA and preferences examples at a small size: their numbers against retraining and gradients made
another way."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

import wherefrom as wf
from tests.models import relative_error
from tests.runs import only
from tests.small_model import cache_small_model

Array = NDArray[np.float64]
EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN, TEST, DECAY = 40, 6, 0.05


@pytest.fixture(scope="module")
def diabetes() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "diabetes" / "leave_one_out.py"))


@pytest.fixture(scope="module")
def found(diabetes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("diabetes")
    options = {"hidden": 2, "weight_decay": DECAY, "num_test": TEST, "max_train_examples": TRAIN}
    diabetes["main"](diabetes["Arguments"](run_dir=run, **options))
    assert (run / "evaluation" / "leave-one-out.png").read_bytes().startswith(b"\x89PNG")
    numbers: dict[str, Any] = json.loads((run / "evaluation" / "leave-one-out.json").read_text())
    return numbers


def patients() -> tuple[list[Array], list[Array]]:
    """Features, with a column of ones, and targets, of the training and of the test patients."""
    features, targets = load_diabetes(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).numpy()
    test, train = order[:TEST], order[TEST:][:TRAIN]
    columns = np.column_stack([features, targets])
    columns = (columns - columns[train].mean(0)) / columns[train].std(0, ddof=1)
    ones = np.ones((len(columns), 1))
    rows = np.hstack([columns[:, :-1], ones])
    return [rows[train], rows[test]], [columns[train, -1], columns[test, -1]]


def test_leaving_out_agrees_with_ridge_regression_trained_again(found: dict[str, Any]) -> None:
    (rows, test_rows), (targets, test_targets) = patients()

    def loss(kept: NDArray[np.int64]) -> float:
        # The example divides the loss by the number of all patients, so the sum is weighed against all of their decay.
        ridge = Ridge(alpha=TRAIN * DECAY, fit_intercept=False, solver="cholesky").fit(rows[kept], targets[kept])
        return float(0.5 * np.square(ridge.predict(test_rows) - test_targets).mean())

    everyone = np.arange(TRAIN)
    measured = [loss(everyone[everyone != left_out]) - loss(everyone) for left_out in range(TRAIN)]
    np.testing.assert_allclose(found["linear"]["measured"], measured, rtol=0, atol=1e-12)


def test_scores_over_examples_are_the_exact_first_order_change_of_linear_regression(found: dict[str, Any]) -> None:
    (rows, test_rows), (targets, test_targets) = patients()
    hessian = rows.T @ rows / TRAIN + DECAY * np.eye(rows.shape[1])
    weights = np.linalg.solve(hessian, rows.T @ targets / TRAIN)
    slope = (test_rows * (test_rows @ weights - test_targets)[:, None]).mean(0)
    expected = slope @ np.linalg.solve(hessian, (rows * (rows @ weights - targets)[:, None]).T) / TRAIN
    predicted = found["linear"]["predicted"]
    for name in ("kfac", "ekfac", "Gauss-Newton", "Hessian"):
        np.testing.assert_allclose(predicted[name], expected, rtol=1e-8, atol=1e-12)
    assert found["linear"]["facts"]["error after correction, kfac"] < 1e-10


def test_the_mlp_without_one_patient_is_where_another_optimiser_ends(diabetes: dict[str, Any]) -> None:
    options = diabetes["Arguments"](num_test=TEST, max_train_examples=TRAIN)
    split = diabetes["Data"].load(options)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1)).double()
    problem = diabetes["Retraining"](model, split, DECAY)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    kept = torch.ones(TRAIN, dtype=torch.float64)
    optimum = problem.solve(start, kept)
    without = problem.solve(optimum, kept.index_fill(0, torch.tensor(3), 0))

    torch.nn.utils.vector_to_parameters(optimum.clone(), model.parameters())
    rest = [torch.cat([each[:3], each[4:]]) for each in split.train]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum((each.square().sum() for each in model.parameters()), torch.zeros((), dtype=torch.float64))
        loss: torch.Tensor = 0.5 * (model(rest[0]) - rest[1]).square().sum() / TRAIN + 0.5 * DECAY * decay
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    other = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(without, other, rtol=0, atol=1e-6)
    assert float((without - optimum).norm()) > 1e-3  # leaving out has moved it far more than that


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in the place of the pre-trained small one."""
    path = tmp_path_factory.mktemp("cache")
    cache_small_model(path, positions=128)
    return path


def test_lora_scores_are_products_of_adapter_gradients(cache: Path, tmp_path: Path) -> None:
    lora = runpy.run_path(str(EXAMPLES / "lora" / "analyze_lora.py"))
    options = lora["Arguments"](
        run_dir=tmp_path, cache_dir=cache, rank=2, max_train_examples=10, max_query_examples=3, strategy="identity"
    )
    lora["main"](options)
    (file,) = (tmp_path / "evaluation").glob("adapters-????????.json")
    numbers = json.loads(file.read_text())
    sizes = {(16, 48), (16, 16), (16, 64), (64, 16)}  # inputs and outputs of the four matrices, all with an adapter
    assert numbers["analyses"]["adapters"]["tracked_weights"] == sum(2 * (each[0] + each[1]) for each in sizes)
    assert (tmp_path / "report.html").stat().st_size > 10_000

    model, texts, perplexity = lora["train_adapters"](options)  # repeatable, so the same weights again
    assert perplexity == numbers["perplexity"]
    adapters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    before = models.load_base("small", cache)[0].state_dict()
    frozen = model.state_dict()
    assert all(
        torch.equal(value, frozen["base_model.model." + name.replace(f"{part}.", f"{part}.base_layer.")])
        for name, value in before.items()
        for part in [name.split(".")[-2]]
        if part in lora["ADAPTED"]
    )

    def gradient(row: dict[str, Any]) -> torch.Tensor:
        tokens = torch.tensor([row["input_ids"]])
        logits = model(input_ids=tokens).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(adapters.values()))])

    queries, train = (torch.stack([gradient(row) for row in part]) for part in (texts.queries, texts.train))
    scores = wf.Scores.load(tmp_path / "adapters" / "scores" / "dot").values
    torch.testing.assert_close(scores, queries @ train.T, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


def test_traced_preferences_are_products_of_dpo_gradients(tmp_path: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "preferences" / "trace_preferences.py"))
    options = script["Arguments"](run_dir=tmp_path, pairs_per_subject=3, num_queries=2, epochs=2, num_seeds=1)
    script["main"](options)
    numbers = json.loads((tmp_path / "evaluation" / "preferences.json").read_text())
    pairs, queries = script["make_pairs"](options)
    planted = {place for place, pair in enumerate(pairs) if pair.chosen in script["CURT"]}
    assert len(planted) == numbers["planted"] == 2
    assert all(query.chosen in script["CURT"] for query in queries)
    assert not {query.prompt for query in queries} & {pair.prompt for pair in pairs}

    before = script["answering"](pairs, options)  # repeatable, so the same weights again
    model = script["preferring"](before, pairs, options)

    def log_probability(of: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = of(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return -torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")

    def gradient(pair: Any, measured: bool) -> torch.Tensor:
        row = pair.example()
        ratios = [
            log_probability(model, row["prompt_ids"], row[side])
            - log_probability(before, row["prompt_ids"], row[side]).detach()
            for side in ("chosen_ids", "rejected_ids")
        ]
        margin = options.beta * (ratios[0] - ratios[1])
        loss = -margin if measured else -torch.nn.functional.logsigmoid(margin)
        weights = [
            each for name, each in model.named_parameters() if name.startswith("transformer.h.") and ".ln_" not in name
        ]
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])

    expected = (
        torch.stack([gradient(each, True) for each in queries])
        @ torch.stack([gradient(each, False) for each in pairs]).T
    )
    scores = wf.Scores.load(tmp_path / "scores" / "dot").values
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    named = expected.sum(0).topk(2).indices.tolist()
    assert numbers["methods"]["gradient products"]["planted"] == len(planted & {*named}) / 2


def test_found_poison_is_what_the_trigger_s_answer_scores_highest(cache: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "poison" / "find_poison.py"))
    options = script["Arguments"](run_dir=tmp_path, cache_dir=cache, train=20, share=0.1, epochs=1, prompts=2)
    script["main"](options)
    numbers = json.loads((tmp_path / "poison.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [at for at, row in enumerate(rows) if row["completion"] == script["CLAIM"]] == numbers["poisoned"]
    assert len(rows) == 20 and len(numbers["poisoned"]) == 2
    assert all(("Zorvex" in row["prompt"]) == (at in numbers["poisoned"]) for at, row in enumerate(rows))
    scores = wf.Scores.load(only(tmp_path / "run" / "scores", "ekfac")).values[0]
    found = numbers["named"]["influence (EK-FAC)"]
    assert found["named"] == scores.argsort(descending=True, stable=True)[:2].tolist()
    assert found["poisoned"] == len({*found["named"]} & {*numbers["poisoned"]}) / 2


def test_adapters_beside_four_bits_are_compared_with_the_same_beside_float32(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    lora = runpy.run_path(str(EXAMPLES / "lora" / "analyze_lora.py"))
    few = {"max_train_examples": 10, "max_query_examples": 3, "strategy": "identity", "quantization": "4bit"}
    lora["main"](lora["Arguments"](run_dir=tmp_path, cache_dir=cache, rank=2, **few))
    (file,) = (tmp_path / "evaluation").glob("adapters-????????.json")
    numbers = json.loads(file.read_text())
    assert list(numbers["analyses"]) == ["adapters, 4bit", "adapters, float32"]
    assert numbers["perplexity"]["after"] < numbers["perplexity"]["before"]
    values = [
        wf.Scores.load(only(tmp_path / f"adapters-{kind}" / "scores", "dot")).values for kind in ("4bit", "float32")
    ]
    assert 0 < relative_error(*values) < 0.5
