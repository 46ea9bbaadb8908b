"""Removal on ridge regression, where the loss after any removal has a closed form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wherefrom as wf
from wherefrom.evaluate.removal import Removal, evaluate_removal, removal_masks
from wherefrom.evaluate.retrain import Retraining, retrain
from wherefrom.runtime.errors import InputError

TRAIN, QUERIES = 9, 3
GENERATOR = np.random.default_rng(0)
INPUTS, TARGETS = GENERATOR.normal(size=(TRAIN, 2)), GENERATOR.normal(size=TRAIN)
QUERY_INPUTS, QUERY_TARGETS = GENERATOR.normal(size=(QUERIES, 2)), GENERATOR.normal(size=QUERIES)
FINGERPRINT = {"model": "ridge regression"}


def ridge_losses(kept: Sequence[int], seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Each query's squared error by the normal equations; the seed moves the targets a little, as noise would."""
    inputs, targets = INPUTS[list(kept)], TARGETS[list(kept)] + 1e-3 * seed
    weights = np.linalg.solve(inputs.T @ inputs + 0.1 * np.eye(2), inputs.T @ targets)
    losses: np.ndarray[Any, np.dtype[np.float64]] = (QUERY_INPUTS @ weights - QUERY_TARGETS) ** 2
    return losses


class Ridge:
    """Solves the regression by least squares on extended data, another way than the normal equations."""

    def __init__(self) -> None:
        self.trained: list[Retraining] = []

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        self.trained += retrainings
        return torch.stack([self._losses(list(each.subset), each.seed) for each in retrainings])

    def _losses(self, kept: list[int], seed: int) -> Tensor:
        inputs = torch.cat([torch.tensor(INPUTS[kept]), 0.1**0.5 * torch.eye(2, dtype=torch.float64)])
        targets = torch.cat([torch.tensor(TARGETS[kept]) + 1e-3 * seed, torch.zeros(2, dtype=torch.float64)])
        weights = torch.linalg.lstsq(inputs, targets).solution
        losses: Tensor = (torch.tensor(QUERY_INPUTS) @ weights - torch.tensor(QUERY_TARGETS)).square()
        return losses


def without(*removed: int) -> tuple[int, ...]:
    return tuple(row for row in range(TRAIN) if row not in removed)


def exact_effects() -> Tensor:
    """[queries, train]: by how much leaving out the example raises the query's loss."""
    everything = ridge_losses(without(), 0)
    return torch.tensor(np.stack([ridge_losses(without(row), 0) - everything for row in range(TRAIN)], axis=1))


def run(path: Path, model: Ridge, **changes: Any) -> Removal:
    scores = {"exact": exact_effects(), "opposite": -exact_effects(), "random": None}
    arguments: dict[str, Any] = {
        "scores": scores, "counts": (0, 1, 3), "seeds": (5, 2), "fingerprint": FINGERPRINT, "workers": 1, **changes,
    }  # fmt: skip
    return evaluate_removal(path, model, **arguments)


def test_removal_masks_leave_out_the_highest_sums() -> None:
    values = torch.tensor([[1.0, 5.0, 2.0, 5.0, -9.0], [0.0, -4.0, 2.0, -4.0, 100.0]])
    masks = removal_masks(values, (0, 1, 2, 4))
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 3], [3]]
    masks = removal_masks(values, (1, 2, 3), queries=[0])
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[0, 2, 3, 4], [0, 2, 4], [0, 4]]


def test_the_most_influential_removal_is_found(tmp_path: Path) -> None:
    """For each query alone, no other removal of one example raises its loss more than the exact method's."""
    for query in range(QUERIES):
        found = run(tmp_path / "bank", Ridge(), seeds=[0], queries=[query], counts=[0, 1])
        every = [ridge_losses(without(row), 0)[query] for row in range(TRAIN)]
        losses = found.summary(lambda losses: losses.item())
        assert losses["exact"][1, 0] == pytest.approx(max(every), rel=1e-12)
        assert losses["opposite"][1, 0] == pytest.approx(min(every), rel=1e-12)
        assert losses["exact"][0, 0] == losses["random"][0, 0] == pytest.approx(ridge_losses(without(), 0)[query])


def test_losses_are_those_of_the_chosen_subsets(tmp_path: Path) -> None:
    model = Ridge()
    queries = [2, 0]
    found = run(tmp_path / "bank", model, queries=queries)
    assert (found.methods, found.counts, found.seeds, found.queries) == (
        ("exact", "opposite", "random"), (0, 1, 3), (5, 2), (2, 0),
    )  # fmt: skip
    assert found.losses.shape == (3, 3, 2, 2) and found.losses.dtype == torch.float64
    order = np.argsort(-exact_effects()[queries].sum(0).numpy())
    for method, ranked in (("exact", order), ("opposite", order[::-1])):
        for (place, count), (repeat, seed) in itertools.product(enumerate((0, 1, 3)), enumerate((5, 2))):
            expected = ridge_losses(without(*ranked[:count]), seed)[queries]
            losses = found.losses[found.methods.index(method), place, repeat]
            np.testing.assert_allclose(losses, expected, rtol=1e-11)


def test_random_removals_differ_from_seed_to_seed_and_contain_each_other(tmp_path: Path) -> None:
    """What was left out is found by comparing the losses with those of every possible removal."""
    seeds = tuple(range(6))
    found = run(tmp_path / "bank", Ridge(), seeds=seeds)
    chosen = []
    for repeat, seed in enumerate(seeds):
        removed = [set(_removed(found.losses[2, place, repeat], count, seed)) for place, count in enumerate((0, 1, 3))]
        assert removed[1] < removed[2]
        chosen.append(frozenset(removed[2]))
    assert len(set(chosen)) >= 4


def _removed(losses: Tensor, count: int, seed: int) -> tuple[int, ...]:
    """The one removal of so many examples that leads to these losses."""
    (removed,) = [
        rows
        for rows in itertools.combinations(range(TRAIN), count)
        if np.allclose(ridge_losses(without(*rows), seed), losses, rtol=1e-9, atol=0)
    ]
    return removed


def test_equal_removals_are_trained_once_and_nothing_twice(tmp_path: Path) -> None:
    model = Ridge()
    scores = {"one": exact_effects(), "two": 2 * exact_effects(), "random": None}
    found = run(tmp_path / "bank", model, scores=scores)
    assert torch.equal(found.losses[0], found.losses[1])
    assert len(model.trained) == len(set(model.trained))
    assert len([each for each in model.trained if each.subset == without()]) == 2  # count 0, once for each seed
    assert len(model.trained) <= 2 * (1 + 2 + 2)
    before = len(model.trained)
    again = run(tmp_path / "bank", model, scores=dict(reversed(scores.items())), counts=(3, 0), seeds=(2,))
    assert len(model.trained) == before
    assert torch.equal(again.losses.flip(0), found.losses[:, [2, 0]][:, :, [1]])


class Effects:
    """Stands for a study: its methods are factors of the exact effects."""

    def score(self, queries: object, factor: float) -> wf.Scores:
        return wf.Scores(factor * exact_effects(), {})


def test_methods_are_scored_and_removed_in_one_call(tmp_path: Path) -> None:
    found = wf.evaluate.counterfactual(
        Effects(), [0, 1, 2], [1.0, None, -1.0], Ridge(), (0, 1), (5, 2), path=tmp_path / "bank", chosen=[2, 0],
        fingerprint=FINGERPRINT, workers=1,
    )  # fmt: skip
    assert (found.methods, found.queries) == (("1.0", "-1.0", "random"), (2, 0))
    order = np.argsort(-exact_effects()[[2, 0]].sum(0).numpy())
    for losses, removed in ((found.losses[0], order[0]), (found.losses[1], order[-1])):
        for repeat, seed in enumerate((5, 2)):
            np.testing.assert_allclose(losses[0, repeat], ridge_losses(without(), seed)[[2, 0]], rtol=1e-11)
            np.testing.assert_allclose(losses[1, repeat], ridge_losses(without(removed), seed)[[2, 0]], rtol=1e-11)
    again = run(tmp_path / "bank", Ridge(), counts=(0, 1), queries=[2, 0])
    assert torch.equal(found.losses, again.losses)  # random removals too


def test_a_bank_of_subsets_can_be_shared(tmp_path: Path) -> None:
    model = Ridge()
    everything = torch.ones(1, TRAIN, dtype=torch.bool)
    bank = retrain(tmp_path / "bank", model, everything, (5, 2), fingerprint=FINGERPRINT, workers=1)
    found = run(tmp_path / "bank", model)
    assert torch.equal(found.losses[0, 0], bank.losses[0])
    assert len([each for each in model.trained if each.subset == without()]) == 2


def test_summary_and_json_hold_the_numbers(tmp_path: Path) -> None:
    found = run(tmp_path / "bank", Ridge())
    summary = found.summary(lambda losses: float(losses.mean().exp()))
    assert list(summary) == ["exact", "opposite", "random"]
    np.testing.assert_allclose(summary["opposite"], np.exp(found.losses[1].numpy().mean(-1)), rtol=1e-14)
    read: Any = json.loads(json.dumps(found.to_json()))
    assert (read["counts"], read["seeds"], read["queries"]) == ([0, 1, 3], [5, 2], [0, 1, 2])
    assert read["losses"]["random"] == found.losses[2].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [0, TRAIN]}, "from 0 to 8"),
        ({"counts": [1, 1]}, "different numbers"),
        ({"counts": []}, "counts="),
        ({"queries": [QUERIES]}, "from 0 to 2"),
        ({"queries": []}, "queries="),
        ({"seeds": [1, 1]}, "none of them twice"),
        ({"scores": {"random": None}}, "at least one method"),
        ({"scores": {"a": torch.zeros(3, 9), "b": torch.zeros(3, 8)}}, "all of one shape"),
        ({"scores": {"a": torch.full((3, 9), torch.nan)}}, "expected finite"),
        ({"scores": {"a": torch.zeros(2, 9)}}, "train measures 3 queries, but the scores have 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path / "bank", Ridge(), **change)
