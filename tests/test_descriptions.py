"""Functions and classes that do something else are told apart, whatever they are called, and no others are."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import gpt2, mlp_case, relative_error, token_rows
from tests.test_magic import magic_scores
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.tasks.descriptions import described, described_class

Function = Callable[..., Any]
SCALE = 1.0


def scaled(value: float, by: float = 2.0) -> float:
    return value * by * SCALE


def written(source: str, **around: object) -> Function:
    """The function `f` of a module of that source."""
    names: dict[str, Any] = {"__name__": "written", **around}
    exec(source, names)
    return names["f"]  # type: ignore[no-any-return]


def closed(value: object) -> Function:
    return lambda: value


def with_default(value: object) -> Function:
    def f(given: object = value, *, named: object = value) -> object:
        return given, named

    return f


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Holder({self.value})"

    def method(self) -> object:
        return self.value


UNLIKE: dict[str, tuple[Function, Function]] = {
    "lambdas of one scope": (lambda batch: 4, lambda batch: 400),
    "lambdas that call other functions": (lambda batch: batch.sum(), lambda batch: batch.prod()),
    "what they close over": (closed(1), closed(2)),
    "tensors that they close over": (closed(torch.zeros(5000)), closed(torch.eye(5000)[0])),
    "functions that they close over": (closed(lambda: 1), closed(lambda: 2)),
    "defaults": (with_default(1), with_default(2)),
    "constants of their module": (written("def f(): return s", s=1), written("def f(): return s", s=2)),
    "functions of their module": (
        written("def g(): return 1\ndef f(): return g()"),
        written("def g(): return 2\ndef f(): return g()"),
    ),
    "functions within": (
        written("def f(): return [i + 1 for i in 'a']"),
        written("def f(): return [i + 2 for i in 'a']"),
    ),
    "partial calls": (functools.partial(scaled, by=2), functools.partial(scaled, by=3)),
    "partial calls of others": (functools.partial(lambda n: n, 1), functools.partial(lambda n: -n, 1)),
    "methods of other objects": (Holder(1).method, Holder(2).method),
    "built-in methods of other objects": ([1].count, [2].count),
    "objects that are called": (nn.Linear(2, 2), nn.Linear(2, 2)),
}  # fmt: skip
ALIKE: dict[str, tuple[Function, Function]] = {
    "one function": (scaled, scaled),
    "made twice": (closed(1), closed(1)),
    "other comments and lines": (
        written("def f(n):\n    return n + 1"),
        written("\n\n# a comment\ndef f(n):\n    # another\n    return (n\n            + 1)"),
    ),
    "other documentation": (
        written('def f(n):\n    "One."\n    return n'),
        written('def f(n):\n    "Two."\n    return n'),
    ),
    "partial calls": (functools.partial(scaled, by=2), functools.partial(scaled, by=2)),
    "methods of equal objects": (Holder(1).method, Holder(1).method),
    "calling itself": (
        written("def f(n): return f(n - 1) if n else 0"),
        written("def f(n): return f(n - 1) if n else 0"),
    ),
    "of a library": (nn.functional.relu, nn.functional.relu),
}  # fmt: skip


@pytest.mark.parametrize(("one", "other"), UNLIKE.values(), ids=UNLIKE)
def test_functions_that_do_something_else_are_told_apart(one: Function, other: Function) -> None:
    assert described("f", one) != described("f", other)


@pytest.mark.parametrize(("one", "other"), ALIKE.values(), ids=ALIKE)
def test_functions_that_do_the_same_are_the_same(one: Function, other: Function) -> None:
    assert described("f", one) == described("f", other)


def test_what_cannot_be_told_apart_is_refused_with_a_way_out() -> None:
    for value in (object(), closed(object()), functools.partial(print, object())):
        with pytest.raises(InputError, match=r"count is .*nothing tells it from another.* Give its class a __repr__"):
            described("count", value)


def test_descriptions_are_the_same_in_every_process() -> None:
    code = "from tests.test_descriptions import *; print([described('f', each[0]) for each in ALIKE.values()])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {f"{[described('f', each[0]) for each in ALIKE.values()]}\n"}


def task_of(scale: float) -> Any:
    class Scaled(wf.Classification):
        def train_loss(self, model: nn.Module, batch: Any, sampler: Any = None) -> Tensor:
            return scale * super().train_loss(model, batch, sampler)

    return Scaled()


def test_classes_that_do_something_else_are_told_apart(tmp_path: Path) -> None:
    assert task_of(1.0).settings() == task_of(1.0).settings() != task_of(2.0).settings()
    assert described_class(wf.CausalLM) == "wherefrom.tasks.language.CausalLM"  # a library's, whose version counts
    case = mlp_case()
    studies = [wf.Study(tmp_path, case.model, task_of(scale), train=case.train) for scale in (1.0, 3.0)]
    once, thrice = (study.score(case.queries, wf.Dot()).values for study in studies)
    assert relative_error(thrice, 9 * once) < 1e-10  # and not the other task's scores
    studies[0].score(case.queries, wf.Dot(), name="pinned")
    with pytest.raises(MismatchError, match="task: stored"):
        studies[1].score(case.queries, wf.Dot(), name="pinned")


def test_two_counts_are_two_results(tmp_path: Path) -> None:
    """MAGIC's scores with one count are not handed out for another."""
    model, train, queries = gpt2(layers=1), token_rows(4), token_rows(1, seed=4)
    recipe = wf.TrainingRecipe(batch_size=2, learning_rates=[0.01], epsilon=1e-3)
    four, many = (lambda batch: torch.tensor(4.0)), (lambda batch: torch.tensor(400.0))

    def scores(count: Function, name: str, recipe: wf.TrainingRecipe = recipe) -> Tensor:
        training = wf.ReplayableTraining(model, wf.CausalLM(), train, recipe, count)
        return magic_scores(tmp_path, training, queries, name=name).values

    found = scores(four, "four")
    with pytest.raises(MismatchError, match="count: stored"):
        scores(many, "four")
    assert not torch.equal(scores(many, "many"), found)
    partly = functools.partial(lambda batch, count: torch.tensor(count), count=4.0)
    assert torch.equal(scores(partly, "partly"), found)

    @dataclass(frozen=True)
    class Doubled(wf.TrainingRecipe):
        def update(self, state: Tensor, gradient: Tensor, step: int) -> Tensor:
            return super().update(state, 2 * gradient, step)

    with pytest.raises(MismatchError, match="recipe: stored"):
        scores(four, "four", Doubled(batch_size=2, learning_rates=[0.01], epsilon=1e-3))
