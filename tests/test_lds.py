"""The linear datamodeling score against scipy, closed forms, simulations with a known answer, and a real file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

import wherefrom as wf
from tests.models import mlp_case
from wherefrom.evaluate import datamodels
from wherefrom.evaluate.datamodels import (
    IntervalEstimate,
    LdsReport,
    evaluate_lds,
    linear_datamodeling_scores,
)
from wherefrom.evaluate.plots import lds_tables
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.runtime.errors import DamagedError, InputError

PUBLISHED = Path(__file__).parents[2] / "shared" / "ground_truth" / "gpt2-wikitext2-lds.npz"


def half_subsets(subsets: int, train: int, generator: torch.Generator) -> Tensor:
    return torch.rand(subsets, train, generator=generator).argsort(1) < train // 2


def one_example_each(outcomes: Tensor) -> GroundTruth:
    """Subsets of one example, so that scores [queries, subsets] are themselves what is held against the losses."""
    return GroundTruth(torch.eye(outcomes.shape[1], dtype=torch.bool), -outcomes.T[:, None].double())


def whole_numbers(rows: int, columns: int) -> st.SearchStrategy[NDArray[np.float64]]:
    return arrays(np.float64, (rows, columns), elements=st.integers(-3, 3).map(float))


@st.composite
def tied_pairs(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    queries, subsets = draw(st.integers(1, 4)), draw(st.integers(3, 9))
    return draw(whole_numbers(queries, subsets)), draw(whole_numbers(queries, subsets))


def scipy_spearman(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(stats.spearmanr(left, right).statistic)


@given(tied_pairs())
@settings(max_examples=80, deadline=None)
def test_scores_are_scipys_spearman_with_ties(pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    values, outcomes = (torch.from_numpy(side) for side in pair)
    truth = one_example_each(outcomes)
    expected = [scipy_spearman(left, right) for left, right in zip(*pair, strict=True)]
    assert linear_datamodeling_scores(values, truth).tolist() == pytest.approx(expected, abs=1e-12)


@given(tied_pairs(), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_resamples_are_scipys_spearman_of_the_subsets_drawn(
    pair: tuple[NDArray[np.float64], NDArray[np.float64]], seed: int
) -> None:
    subsets = pair[0].shape[1]
    drawn = np.random.default_rng(seed).integers(subsets, size=(5, subsets))
    counts = np.stack([np.bincount(row, minlength=subsets) for row in drawn], axis=1).astype(np.float64)
    found = datamodels._spearman(pair[0][None], pair[1][None], counts)[0]  # [queries, resamples]
    for query, (left, right) in enumerate(zip(*pair, strict=True)):
        expected = [scipy_spearman(left[row], right[row]) for row in drawn]
        assert found[query].tolist() == pytest.approx(expected, abs=1e-12)


def test_kept_examples_are_summed_and_repeats_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = half_subsets(20, 12, generator)
    losses = torch.randn(20, 3, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(4, 12, generator=generator)
    found = linear_datamodeling_scores(values, GroundTruth(masks, losses))
    for query in range(4):
        sums = [sum(values[query, t].item() for t in range(12) if masks[s, t]) for s in range(20)]
        means = [losses[s, :, query].mean().item() for s in range(20)]
        assert found[query].item() == pytest.approx(stats.spearmanr(sums, [-mean for mean in means]).statistic)


def test_scores_that_do_not_vary_predict_nothing() -> None:
    # 0.1 has no exact binary form: sums of it in another order differ in the last bits, but must tie.
    generator = torch.Generator().manual_seed(0)
    masks = half_subsets(40, 1001, generator)
    truth = GroundTruth(masks, torch.randn(40, 1, 2, generator=generator, dtype=torch.float64))
    values = torch.full((2, 1001), 0.1)
    values[1] = 0.1 * (torch.arange(1001) == 3)  # so its sums have two values
    found = linear_datamodeling_scores(values, truth)
    assert found[0].item() == 0
    expected = stats.spearmanr(masks[:, 3].numpy(), -truth.losses[:, 0, 1].numpy()).statistic
    assert found[1].item() == pytest.approx(expected)


def world(subsets: int, queries: int, generator: torch.Generator) -> tuple[Tensor, GroundTruth]:
    """Losses that are linear in the kept examples, with noise; queries of different predictability; noisy scores."""
    train = 60
    scale = 1 / math.sqrt(train / 4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = normal(queries, train) * scale * 2 * torch.rand(queries, 1, generator=generator)
    shared = 0.5 * normal(1, train) * scale
    masks = half_subsets(subsets, train, generator)
    losses = -masks.double() @ (own + shared).T + normal(subsets, queries) + 0.5 * normal(subsets, 1)
    return own + 0.7 * shared + normal(queries, train) * scale, GroundTruth(masks, losses[:, None])


def test_intervals_cover_the_truth_and_are_not_wider_than_need_be() -> None:
    large, truth = world(1000, 500, torch.Generator().manual_seed(1))
    expected = linear_datamodeling_scores(large, truth).mean().item()
    reports = []
    for seed in range(150):
        values, truth = world(40, 25, torch.Generator().manual_seed(100 + seed))
        reports.append(evaluate_lds({"one": values}, truth, resamples=200, seed=seed).means["one"])
    covered = sum(each.low <= expected <= each.high for each in reports) / len(reports)
    assert all(each.low < each.value < each.high for each in reports)
    assert 0.91 <= covered <= 0.99
    # For a normal estimate, 95% are within 1.96 standard deviations of it.
    spread = float(np.std([each.value for each in reports]))
    half_width = float(np.mean([each.high - each.low for each in reports])) / 2
    assert 0.85 * 1.96 * spread <= half_width <= 1.35 * 1.96 * spread


def test_differences_are_paired() -> None:
    generator = torch.Generator().manual_seed(3)
    values, truth = world(50, 30, generator)
    methods = {
        "good": values,
        "same": values * 2,
        "near": values + 0.01 * torch.randn(values.shape, generator=generator, dtype=torch.float64),
        "noise": torch.randn(values.shape, generator=generator),
    }
    report = evaluate_lds(methods, truth, resamples=200)
    assert set(report.differences) == {
        ("good", "same"), ("good", "near"), ("good", "noise"), ("same", "near"), ("same", "noise"), ("near", "noise"),
    }  # fmt: skip
    assert report.differences["good", "same"] == IntervalEstimate(0.0, 0.0, 0.0)
    near, mean = report.differences["good", "near"], report.means["good"]
    assert near.high - near.low < 0.2 * (mean.high - mean.low)
    apart = report.differences["good", "noise"]
    assert apart.value == pytest.approx(mean.value - report.means["noise"].value)
    assert apart.low > 0
    assert report.difference("good", "noise") == apart
    assert report.difference("noise", "good") == IntervalEstimate(-apart.value, -apart.high, -apart.low)
    for name, scores in methods.items():
        assert torch.equal(report.queries[name], linear_datamodeling_scores(scores, truth))
        assert report.means[name].value == pytest.approx(report.queries[name].mean().item())


@pytest.mark.parametrize("repeats", [2, 3, 5, 10])
@pytest.mark.parametrize("signal", [0.4, 1.0, 3.0])
def test_ceiling_is_what_the_true_expected_loss_reaches(repeats: int, signal: float) -> None:
    generator = torch.Generator().manual_seed(repeats)
    expected = signal * torch.randn(120, 150, generator=generator, dtype=torch.float64)  # [subsets, queries]
    noise = torch.randn(120, repeats, 150, generator=generator, dtype=torch.float64)
    truth = GroundTruth(torch.eye(120, dtype=torch.bool), expected[:, None] + noise)
    report = evaluate_lds({"true": -expected.T}, truth, resamples=50)
    assert report.ceiling is not None
    # Normal variables: Pearson's correlation with the mean of R, and Spearman's (6 / pi) asin(r / 2).
    pearson = math.sqrt(signal**2 / (signal**2 + 1 / repeats))
    assert report.ceiling.value == pytest.approx(6 / math.pi * math.asin(pearson / 2), abs=0.03)
    assert report.ceiling.value == pytest.approx(report.means["true"].value, abs=0.03)
    assert report.ceiling.low <= report.ceiling.value <= report.ceiling.high


def test_ceiling_is_low_without_signal_and_absent_without_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 4, 50, generator=generator, dtype=torch.float64)
    masks = torch.eye(60, dtype=torch.bool)
    scores = {"noise": torch.randn(50, 60, generator=generator)}
    found = evaluate_lds(scores, GroundTruth(masks, noise), resamples=50).ceiling
    assert found is not None
    assert found.low == 0
    assert evaluate_lds(scores, GroundTruth(masks, noise[:, :1]), resamples=50).ceiling is None


def small_report(repeats: int) -> LdsReport:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(8, repeats, 3, generator=generator, dtype=torch.float64)
    scores = {name: torch.randn(3, 10, generator=generator) for name in ("one [x]", "two")}
    return evaluate_lds(scores, GroundTruth(half_subsets(8, 10, generator), losses), resamples=20)


def test_report_as_json_and_in_the_terminal() -> None:
    report = small_report(2)
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert stored["methods"]["two"]["value"] == report.means["two"].value
    assert stored["methods"]["two"]["queries"] == report.queries["two"].tolist()
    assert stored["differences"][0]["low"] == report.differences["one [x]", "two"].low
    assert report.ceiling is not None
    assert stored["ceiling"]["high"] == report.ceiling.high
    assert (stored["subsets"], stored["repeats"], stored["train"], stored["resamples"]) == (8, 2, 10, 20)

    console = Console(width=100)
    with console.capture() as capture:
        console.print(lds_tables(report))
    lines = capture.get().splitlines()
    best, other = sorted(report.means, key=lambda name: -report.means[name].value)
    placed = [number for number, line in enumerate(lines) if f"{report.means[best].value:.3f}" in line]
    assert best in lines[placed[0]]
    assert f"{report.means[other].value:.3f}" in next(line for line in lines[placed[0] + 1 :] if other in line)
    assert f"{report.ceiling.value:.3f}" in next(line for line in lines if "ceiling" in line)
    # The table has the better method first, whichever way round the report has the pair.
    difference = abs(report.means[best].value - report.means[other].value)
    assert any(best in line and other in line and f"+{difference:.3f}" in line for line in lines)


@dataclass(frozen=True)
class Given:
    """A method whose scores are there already."""

    name: str
    values: Tensor

    def __str__(self) -> str:
        return self.name


class Precomputed:
    """Stands for a study that can score these queries alone."""

    def __init__(self, queries: Sequence[object]) -> None:
        self.queries = queries

    def score(self, queries: object, method: Given) -> wf.Scores:
        assert queries is self.queries
        return wf.Scores(method.values, {})


def test_methods_are_scored_and_named_in_one_call() -> None:
    values, truth = world(20, 6, torch.Generator().manual_seed(3))
    methods = [Given("EKFAC()", values), Given("BM25()", -values), Given("EKFAC()", values + 1)]
    queries = [object()] * 6
    found = wf.evaluate.lds(Precomputed(queries), queries, methods, truth, resamples=30, seed=2)
    names = ["EKFAC()", "BM25()", "EKFAC() (2)"]
    assert list(found.means) == names
    expected = evaluate_lds(
        {name: each.values for name, each in zip(names, methods, strict=True)}, truth, resamples=30, seed=2
    )
    assert found.to_json() == expected.to_json()
    # Of the opposite scores every rank is the opposite.
    assert torch.equal(found.queries["BM25()"], -found.queries["EKFAC()"])
    with pytest.raises(InputError, match="no methods"):
        wf.evaluate.lds(Precomputed(queries), queries, [], truth)


def test_scores_of_a_study_predict_what_they_add_up_to(tmp_path: Path) -> None:
    """Losses that are made of one method's own scores are predicted by it without an error, and worse by another."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    own = study.score(case.queries, wf.Dot()).values.double()
    masks = half_subsets(12, len(case.train), torch.Generator().manual_seed(0))
    truth = GroundTruth(masks, -(masks.double() @ own.T)[:, None])
    found = wf.evaluate.lds(study, case.queries, [wf.Dot(), wf.EKFAC(), wf.Dot()], truth, resamples=30)
    assert list(found.means) == ["Dot()", "EKFAC()", "Dot() (2)"]
    assert found.means["Dot()"].value == found.means["Dot() (2)"].value == pytest.approx(1)
    assert found.difference("Dot()", "EKFAC()").low > 0


def test_ground_truth_is_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks, losses = half_subsets(5, 6, generator), torch.randn(5, 2, 3, generator=generator)
    np.savez_compressed(tmp_path / "truth.npz", masks=masks.numpy(), losses=losses.numpy())
    save_file({"masks": masks, "losses": losses[:, 0].contiguous()}, tmp_path / "truth.safetensors")
    for name, expected in (("truth.npz", losses), ("truth.safetensors", losses[:, :1])):
        found = GroundTruth.load(tmp_path / name)
        assert torch.equal(found.masks, masks)
        assert torch.equal(found.losses, expected.double())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"masks": np.ones((5, 6), bool)}, "no losses; it holds masks"),
        ({"masks": np.ones((5, 6)), "losses": np.ones((5, 3))}, r"masks: float64 \[5, 6\]; expected bool"),
        ({"masks": np.ones((5, 6), bool), "losses": np.ones((4, 3))}, "4 subsets, but 5 in masks"),
        ({"masks": np.ones((5, 6), bool), "losses": np.ones(5)}, r"losses: float64 \[5\]"),
        ({"masks": np.ones((5, 6), bool), "losses": np.ones((5, 0))}, "none of them empty"),
        ({"masks": np.ones((5, 6), bool), "losses": np.full((5, 3), np.nan)}, r"losses\[0, 0, 0\] is nan"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, content: dict[str, NDArray[np.generic]], message: str
) -> None:
    file = tmp_path / "truth.npz"
    np.savez(file, **content)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message) as caught:
        GroundTruth.load(file)
    assert str(file) in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", masks=np.ones((5, 600), bool), losses=np.ones((5, 3)))
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[400] ^= 1
    (tmp_path / "altered.npz").write_bytes(content)
    (tmp_path / "cut.npz").write_bytes(content[:300])
    (tmp_path / "text.safetensors").write_text("losses")
    np.savez(tmp_path / "pickled.npz", masks=np.array([{}], dtype=object), losses=np.ones(1))
    for name in ("altered.npz", "cut.npz", "text.safetensors", "pickled.npz"):
        with pytest.raises(DamagedError, match=name):
            GroundTruth.load(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        GroundTruth.load(tmp_path / "absent.npz")
    with pytest.raises(InputError, match="'.csv'"):
        GroundTruth.load(tmp_path / "truth.csv")


def test_scores_that_do_not_fit_are_named() -> None:
    values, truth = world(10, 4, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="4 queries and 60 training"):
        linear_datamodeling_scores(values.T, truth)
    with pytest.raises(InputError, match=r"mine\[1, 2\] is inf"):
        evaluate_lds(
            {"mine": values.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(np.inf).double())}, truth
        )
    with pytest.raises(InputError, match="no methods"):
        evaluate_lds({}, truth)
    with pytest.raises(InputError, match="resamples=1"):
        evaluate_lds({"mine": values}, truth, resamples=1)
    few = GroundTruth(truth.masks[:2], truth.losses[:2])
    with pytest.raises(InputError, match="2 subsets"):
        evaluate_lds({"mine": values}, few)
    with pytest.raises(InputError, match="2 subsets"):
        linear_datamodeling_scores(values, few)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no ../shared/ground_truth beside the repository")
def test_a_fit_of_half_of_the_published_retrainings_predicts_the_other_half() -> None:
    truth = GroundTruth.load(PUBLISHED)
    fitted, held_out = truth.masks[:50].double(), GroundTruth(truth.masks[50:], truth.losses[50:])
    outcomes = truth.outcomes[:, :50]
    kernel = (fitted - 0.5) @ (fitted - 0.5).T
    # Ridge regression in its dual form: 50 subsets against thousands of examples.
    weights = torch.linalg.solve(
        kernel + kernel.diagonal().mean() * torch.eye(50), (outcomes - outcomes.mean(1, True)).T
    )
    methods = {
        "ridge": ((fitted - 0.5).T @ weights).T,
        "random": torch.randn(481, 4656, generator=torch.Generator().manual_seed(0)),
    }
    report = evaluate_lds(methods, held_out, resamples=100)
    print({name: str(mean) for name, mean in report.means.items()})
    assert report.differences["ridge", "random"].low > 0
