"""The plots draw the numbers that they are given, and are written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from wherefrom.evaluate import plots
from wherefrom.evaluate.agreement import compare_scores
from wherefrom.evaluate.datamodels import IntervalEstimate, LdsReport
from wherefrom.runtime.errors import InputError, StorageError

COUNTS = [0, 50, 100]


def report(ceiling: IntervalEstimate | None) -> LdsReport:
    means = {
        "random": IntervalEstimate(0.01, -0.03, 0.05),
        "ekfac": IntervalEstimate(0.44, 0.41, 0.47),
        "mine, with a rather long name": IntervalEstimate(0.3, 0.27, 0.33),
    }
    return LdsReport({name: torch.zeros(4) for name in means}, means, {}, ceiling, 100, 5, 10, 1000)


def scores() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(30, 200, generator=generator) ** 3
    return reference, reference + 0.1 * torch.randn(30, 200, generator=generator)


def curves() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(24, 1, (3, 4)) for name in ("ekfac", "random", "mine")}


def every_plot() -> dict[str, Figure]:
    reference, other = scores()
    return {
        "scatter": plots.scatter(reference[0], other[0].bfloat16(), ("fp32", "bf16"), "Query 0"),
        "histogram": plots.correlation_histogram(compare_scores(reference, other)),
        "equal": plots.correlation_histogram(compare_scores(reference, reference)),
        "bars": plots.lds_bars(report(IntervalEstimate(0.8, 0.75, 0.85))),
        "removal": plots.removal_curves(COUNTS, curves(), "Query perplexity"),
        "one repeat": plots.removal_curves([10], {"a": np.ones((1, 1))}, "Query perplexity"),
    }


@pytest.mark.parametrize("name", list(every_plot()))
def test_every_plot_is_a_png_with_all_its_text_inside(name: str) -> None:
    figure = every_plot()[name]
    content = plots.png(figure)
    height, width, _ = matplotlib.image.imread(io.BytesIO(content)).shape
    box = figure.get_tightbbox().padded(-0.02)  # inches; a line's end may stand half its width outside
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 * plots.RESOLUTION <= width
    assert box.y1 * plots.RESOLUTION <= height
    assert content == plots.png(every_plot()[name])


def test_scatter_draws_every_pair_and_gives_spearman() -> None:
    reference, other = scores()
    (axes,) = plots.scatter(reference[3], other[3], ("fp32", "bf16"), "Query 3").axes
    points = np.asarray(axes.collections[0].get_offsets())
    assert points == pytest.approx(torch.stack([reference[3], other[3]], 1).numpy())
    assert f"{compare_scores(reference, other).spearman.values[3]:.4f}" in axes.get_title(loc="left")
    line = axes.lines[0]
    assert np.array_equal(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    with pytest.raises(InputError, match="shape"):
        plots.scatter(reference[3], other[3, :7], ("fp32", "bf16"), "Query 3")


def test_histogram_counts_every_query_once() -> None:
    for pair in (scores(), (scores()[0], scores()[0])):
        (axes,) = plots.correlation_histogram(compare_scores(*pair)).axes
        drawn = [patch.get_data()[0].sum() for patch in axes.patches if isinstance(patch, StepPatch)]
        assert drawn == [30] * 4  # an area and an outline for each of Spearman and Pearson


@pytest.mark.parametrize("ceiling", [None, IntervalEstimate(0.8, 0.75, 0.85)])
def test_bars_are_sorted_and_carry_intervals_and_the_ceiling(ceiling: IntervalEstimate | None) -> None:
    given = report(ceiling)
    (axes,) = plots.lds_bars(given).axes
    (bars,) = (each for each in axes.containers if isinstance(each, BarContainer))
    (errors,) = (each for each in axes.containers if isinstance(each, ErrorbarContainer))
    order = ["random", "mine, with a rather long name", "ekfac"]  # from the bottom up
    assert [label.get_text() for label in axes.get_yticklabels()] == order
    assert [bar.get_width() for bar in bars] == pytest.approx([given.means[name].value for name in order])
    spans = [segment[:, 0].tolist() for segment in errors[2][0].get_segments()]
    assert np.array(spans) == pytest.approx(np.array([[given.means[n].low, given.means[n].high] for n in order]))
    dashed = [line.get_xdata() for line in axes.lines if line.is_dashed()]
    assert [list(np.asarray(each)) for each in dashed] == ([[0.8, 0.8]] if ceiling else [])
    # The same method has the same colour everywhere, whatever stands beside it.
    (removal,) = plots.removal_curves(COUNTS, curves(), "Query perplexity").axes
    line = next(each for each in removal.containers if each.get_label() == "ekfac")
    assert isinstance(line, ErrorbarContainer)
    assert to_hex(bars[2].get_facecolor()) == to_hex(line[0].get_color())


def test_removal_draws_means_and_standard_deviations() -> None:
    given = curves()
    (axes,) = plots.removal_curves(COUNTS, given, "Query perplexity").axes
    assert "standard deviation of 4" in axes.get_xlabel()
    drawn = {each.get_label(): each for each in axes.containers if isinstance(each, ErrorbarContainer)}
    assert set(drawn) == set(given)
    for name, curve in given.items():
        assert np.asarray(drawn[name][0].get_ydata()) == pytest.approx(curve.mean(1))
        lengths = [np.ptp(segment[:, 1]) for segment in drawn[name][2][0].get_segments()]
        assert lengths == pytest.approx([2 * np.std(row, ddof=1) for row in curve])
        assert np.asarray(drawn[name][0].get_xdata()) == pytest.approx(COUNTS, abs=2)
    assert len({each[0].get_marker() for each in drawn.values()}) == len(given)
    with pytest.raises(InputError, match=r"curves\['a'\]: shape \[2, 4\]"):
        plots.removal_curves(COUNTS, {"a": np.ones((2, 4))}, "Query perplexity")
    with pytest.raises(InputError, match="no methods"):
        plots.removal_curves(COUNTS, {}, "Query perplexity")


def test_a_plot_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    figure, same = plots.lds_bars(report(None)), plots.lds_bars(report(None))
    plots.save_png(figure, tmp_path / "new" / "bars.png")
    # matplotlib before 3.11 moves what it draws a second time a little.
    assert (tmp_path / "new" / "bars.png").read_bytes() == plots.png(same)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(StorageError, match=r"taken\.png"):
        plots.save_png(figure, tmp_path / "taken.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "taken.png"]
