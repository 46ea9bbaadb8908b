"""The contract of all ways of scoring: the right answer, and the same one however the work is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.contract.answers import Answers, able
from tests.contract.methods import METHODS, Method, values
from tests.contract.settings import QUERIES, TRAIN, Setting, padded
from tests.models import relative_error
from wherefrom.runtime.errors import InputError

QUERY_ORDER, TRAIN_ORDER = [2, 0, 1], [4, 1, 5, 0, 3, 2]


def scored(name: str, run: Path, setting: Setting) -> Tensor:
    return values(METHODS[name].score(run, setting))


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_truth(name: str, answers: Answers) -> None:
    found, expected = answers.usual(name).values, METHODS[name].truth(answers.settings.usual())
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert relative_error(found, expected) < (1e-8 if found.dtype == torch.float64 else 1e-6)


@able("damping")
def test_it_is_the_truth_at_another_damping(name: str, answers: Answers) -> None:
    expected = METHODS[name].truth(answers.settings.other("damping"))
    assert relative_error(answers.other(name, "damping").values, expected) < 1e-8


@able("batch size")
@pytest.mark.parametrize("size", [1, 4, None])
def test_it_does_not_depend_on_the_batch_size(name: str, size: int | None, answers: Answers, tmp_path: Path) -> None:
    found = scored(name, tmp_path, replace(answers.settings.usual(), batch_size=size))
    assert relative_error(found, answers.usual(name).values) < 1e-9


def reordered(method: Method, expected: Tensor) -> Tensor:
    for axis, order in ((method.query_axis, QUERY_ORDER), (method.train_axis, TRAIN_ORDER)):
        if axis is not None:
            expected = expected.index_select(axis, torch.tensor(order))
    return expected


@able("order")
def test_it_does_not_depend_on_the_order_of_examples(name: str, answers: Answers, tmp_path: Path) -> None:
    """With the dataset's own targets: drawn ones are those of a position."""
    usual = answers.settings.usual()
    assert (len(QUERY_ORDER), len(TRAIN_ORDER)) == (QUERIES, TRAIN)
    train, queries = [usual.train[row] for row in TRAIN_ORDER], [usual.queries[row] for row in QUERY_ORDER]
    found = scored(name, tmp_path, replace(usual, train=train, queries=queries, empirical=True, batch_size=4))
    assert relative_error(found, reordered(METHODS[name], answers.usual(name, empirical=True).values)) < 1e-9


@able("padding")
def test_it_does_not_depend_on_padding(name: str, answers: Answers, tmp_path: Path) -> None:
    """Padding that the dataset itself brings, on the right, is as good as none."""
    usual = answers.settings.usual()
    train, queries = ([padded(each) for each in side] for side in (usual.train, usual.queries))
    found = scored(name, tmp_path, replace(usual, train=train, queries=queries))
    assert relative_error(found, answers.usual(name).values) < 1e-9


@able("half precision")
def test_half_precision_is_close(name: str, answers: Answers, tmp_path: Path) -> None:
    """With the dataset's own targets: rounding decides between drawn ones that are about as likely."""
    full = replace(answers.settings.usual(torch.float32), empirical=True)
    one, other = (scored(name, tmp_path / str(half), replace(full, half_precision=half)) for half in (False, True))
    assert one.dtype == other.dtype == torch.float32
    assert 0 < relative_error(other, one) < METHODS[name].half_precision


@pytest.mark.parametrize("name", [name for name, each in METHODS.items() if "half precision" in each.unsupported])
def test_half_precision_that_it_does_not_have_is_refused(name: str, answers: Answers, tmp_path: Path) -> None:
    missing = METHODS[name].unsupported["half precision"]
    half = replace(answers.settings.usual(torch.float32), half_precision=True)
    if missing.error is None:
        pytest.skip(missing.reason)
    with pytest.raises(missing.error, match=missing.message):
        METHODS[name].score(tmp_path, half)


@able("half precision")
def test_half_precision_of_double_precision_is_refused(name: str, answers: Answers, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="half_precision=True with a float64 model"):
        METHODS[name].score(tmp_path, replace(answers.settings.usual(), half_precision=True))
