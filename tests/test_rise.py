"""Scores as predicted rises of a query's loss: against retraining in closed form, and the tokens that they are by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, gpt2
from wherefrom.runtime.errors import InputError

TRAIN, SIZE, DAMPING = 300, 4, 0.05


class Ridge:
    """Linear regression whose weights minimise mean_i w_i (x_i theta - y_i)^2 / 2 + damping |theta|^2 / 2."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(TRAIN + 5, SIZE, generator=generator, dtype=torch.float64)
        noise = torch.randn(TRAIN + 5, 1, generator=generator, dtype=torch.float64)
        self.targets = self.inputs @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64) + noise

    def solved(self, weights: Tensor) -> Tensor:
        """Theta [size, 1] of weights [train] in closed form."""
        inputs, targets = self.inputs[:TRAIN], self.targets[:TRAIN]
        curvature = inputs.T @ (weights[:, None] * inputs) / TRAIN + DAMPING * torch.eye(SIZE, dtype=torch.float64)
        found: Tensor = torch.linalg.solve(curvature, inputs.T @ (weights[:, None] * targets) / TRAIN)
        return found

    def losses(self, theta: Tensor) -> Tensor:
        """Of the queries, [5]."""
        return (self.inputs[TRAIN:] @ theta - self.targets[TRAIN:]).square().squeeze(1) / 2

    def rises(self, removed: float) -> Tensor:
        """Of each query's loss where each example in turn loses a part of its weight, [query, train]."""
        whole = self.losses(self.solved(torch.ones(TRAIN, dtype=torch.float64)))
        found = []
        for example in range(TRAIN):
            weights = torch.ones(TRAIN, dtype=torch.float64)
            weights[example] -= removed
            found.append(self.losses(self.solved(weights)) - whole)
        return torch.stack(found, 1)

    def study(self, run: Path) -> tuple[wf.Study[Any], list[object]]:
        model = nn.Sequential(nn.Linear(SIZE, 1, bias=False, dtype=torch.float64))
        model[0].weight.data = self.solved(torch.ones(TRAIN, dtype=torch.float64)).T.contiguous()
        examples: list[object] = list(zip(self.inputs, self.targets, strict=True))
        return wf.Study(run, model, wf.Regression(), train=examples[:TRAIN]), examples[TRAIN:]


def test_predicted_rises_are_those_of_retraining_to_first_order(tmp_path: Path) -> None:
    ridge = Ridge()
    study, queries = ridge.study(tmp_path)
    scores = study.score(queries, wf.EKFAC(solver=wf.ConjugateGradients(tolerance=1e-10), damping=DAMPING))
    assert scores.unit == "nats"
    slight = 1e-5
    torch.testing.assert_close(scores.predicted_rise, ridge.rises(slight) / slight, rtol=1e-3, atol=1e-7)
    removed, predicted = ridge.rises(1.0).flatten(), scores.predicted_rise.flatten()
    slope = float(predicted @ removed / predicted.square().sum())
    assert 0.9 < slope < 1.1
    assert float((removed - predicted).abs().mean()) < 0.1 * float(removed.abs().mean())
    loaded = wf.Scores.load(tmp_path / "scores" / scores.name)
    torch.testing.assert_close(loaded.predicted_rise, scores.predicted_rise, rtol=0, atol=0)
    best = study.score(
        queries, wf.EKFAC(solver=wf.ConjugateGradients(tolerance=1e-10), damping=DAMPING), keep=wf.Top(3)
    )
    expected = scores.predicted_rise.topk(3).values
    torch.testing.assert_close(best.predicted_rise, expected, rtol=1e-6, atol=1e-12)


def test_methods_without_such_a_scale_say_so(tmp_path: Path) -> None:
    study, queries = Ridge().study(tmp_path)
    for method in (wf.Dot(), wf.KFAC(), wf.Cosine(), wf.Random(), wf.TracIn(weights=[1.0], checkpoints=[])):
        assert method.rise(10) is None
    assert wf.Magic(training=None).rise(10) == 1.0  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"predicted_rise of dot: .* no such scale"):
        _ = study.score(queries, wf.Dot()).predicted_rise
    normal = study.score(queries, wf.EKFAC(), keep=wf.Pairs(self_influence=True))
    assert bool(normal.predicted_rise.isfinite().all())
    with pytest.raises(InputError, match="no such scale"):
        _ = normal.normalized("cosine").predicted_rise


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
COUNTED: list[tuple[wf.Task[Any], Mapping[str, Any], int]] = [
    (wf.CausalLM(), {"input_ids": TOKENS}, 7),
    (wf.CausalLM(), {"input_ids": TOKENS, "labels": [-100, -100, 4, -100, 5, 9, 2, -100]}, 4),
    (wf.CausalLM(), {"input_ids": TOKENS, "prompt_length": 5}, 3),
    (wf.CausalLM(), {"input_ids": TOKENS, "seq_lengths": [3, 5]}, 6),
    (wf.CausalLM(measure=wf.ChosenToken(2)), {"input_ids": TOKENS}, 1),
    (wf.CausalLM(), {"input_ids": TOKENS, "attention_mask": [1, 1, 1, 1, 1, 0, 0, 0]}, 4),
]


@pytest.mark.parametrize(("task", "example", "count"), COUNTED, ids=range(len(COUNTED)))
def test_counted_tokens_are_those_of_the_loss(task: wf.Task[Any], example: Mapping[str, Any], count: int) -> None:
    """Where all logits are equal, each counted token has the loss log(vocabulary)."""
    model = gpt2()
    model.transformer.wte.weight.data.zero_()
    batch = task.collate([task.select(model, example)])
    assert task.counted(model, batch) == count
    assert float(task.measurement(model, batch).detach()) == pytest.approx(count * math.log(VOCABULARY))


def test_rises_are_by_the_queries_tokens(tmp_path: Path) -> None:
    train = [{"input_ids": [(3 * number + each) % VOCABULARY for each in range(5)]} for number in range(6)]
    queries = [{"input_ids": TOKENS}, {"input_ids": TOKENS, "prompt_length": 6}]
    study = wf.Study(tmp_path, gpt2(), wf.CausalLM(), train=train)
    scores = study.score(queries, wf.EKFAC())
    assert scores.unit == "nats a token"
    expected = scores.values.double() / 6 / torch.tensor([[7.0], [2.0]], dtype=torch.float64)
    torch.testing.assert_close(scores.predicted_rise, expected, rtol=1e-12, atol=0)
    for keep, tokens in ((wf.Aggregated(queries="sum"), 9.0), (wf.Aggregated(queries="mean"), 4.5)):
        together = study.score(queries, wf.EKFAC(), keep=keep)
        torch.testing.assert_close(together.predicted_rise, together.values.double() / 6 / tokens)
