"""The leaderboard at a tiny size: its trainings, its figures against what it left on disk, and the published page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from leaderboard import page
from leaderboard.calibration import calibration
from leaderboard.methods import METHODS
from leaderboard.plots import frontier, score_against_cost
from leaderboard.retrainings import OnHalves, WithoutSome, removals
from leaderboard.setting import Setting, Size, record
from run_leaderboard import BOARDS, Arguments, merged, results
from safetensors.torch import load_file
from tables import README
from torch import Tensor
from workload import RESULTS

import wherefrom as wf
from tests.processes import forking_context
from tests.small_model import cache_small_model
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.retrain import Retraining, half_subsets
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.runtime.errors import MismatchError
from wherefrom.store.weights import load_weights

SIZE = Size(train=30, queries=4, tokens=16, batch_size=5, epochs=2, checkpoints=3)
CHOSEN = ("random", "ekfac", "magic")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    cache = tmp_path_factory.mktemp("cache")
    cache_small_model(cache, positions=16)
    return Setting(SIZE, cache)


@pytest.fixture(scope="module")
def run(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("leaderboard")
    forking_context()  # the server of which the benchmark forks the processes that it measures in
    arguments = Arguments(
        SIZE, folder, setting.cache_dir, masks=12, repeats=2, share=0.04, removal_queries=2, workers=1, methods=CHOSEN
    )
    return folder, json.loads(json.dumps(results(arguments)))


def losses(setting: Setting) -> Tensor:
    task = wf.CausalLM()
    return torch.stack([task.measurement(setting.start, task.collate([each])) for each in setting.queries]).detach()


def test_checkpoints_are_those_of_the_training(setting: Setting, tmp_path: Path) -> None:
    recorded = record(setting, tmp_path)
    assert [(each.step, each.steps) for each in recorded] == [(4, 4), (8, 4), (12, 4)]
    everything = Retraining(tuple(range(SIZE.train)), 0)
    found = WithoutSome(setting)([everything])[0]
    before = setting.start.state_dict()
    kept = {name: each.clone() for name, each in before.items()}
    load_weights(setting.start, recorded[-1].path)
    assert torch.allclose(losses(setting), found, rtol=1e-5)
    moments = load_file(recorded[-1].path / "adam_second_moments.safetensors")
    assert moments.keys() == {name for name, _ in setting.start.named_parameters()}
    setting.start.load_state_dict(kept)


def test_halves_and_removals_are_different_trainings(setting: Setting) -> None:
    everything = tuple(range(SIZE.train))
    whole, less = WithoutSome(setting)([Retraining(everything, 0), Retraining(everything[1:], 0)])
    assert not torch.equal(whole, less)
    torch.testing.assert_close(OnHalves(setting)([Retraining(everything, 0)])[0], whole)
    other = OnHalves(setting)([Retraining(everything, 1)])[0]
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("board", [2, 3])
def test_another_board_has_other_texts_and_queries_and_another_seed(setting: Setting, board: Literal[2, 3]) -> None:
    second = Setting(replace(SIZE, board=board), setting.cache_dir)
    assert (len(second.train), len(second.queries)) == (SIZE.train, SIZE.queries)
    for part in ("train", "queries"):
        first, other = ({str(each["input_ids"]) for each in getattr(which, part)} for which in (setting, second))
        assert not first & other
    assert (setting.seed, second.seed) == (0, 100 * (board - 1))
    assert setting.training().recipe.seed != second.training().recipe.seed
    assert setting.fingerprint() != second.fingerprint()


def test_removals_leave_out_a_share_and_begin_alike() -> None:
    masks = removals(300, 40, 0.01)
    assert (~masks).sum(1).tolist() == [3] * 40
    assert torch.equal(masks[:7], removals(300, 7, 0.01))
    assert len({tuple(each) for each in masks.tolist()}) == 40


def test_figures_are_those_of_the_scores_and_losses_on_disk(setting: Setting, run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = run
    scores = {name: load_file(folder / "methods" / name / "scores.safetensors")["values"] for name in CHOSEN}
    kept = removals(SIZE.train, 12, 0.04)
    trained = WithoutSome(setting)([Retraining(tuple(mask.nonzero().flatten().tolist()), 0) for mask in kept])
    expected = evaluate_lds(scores, GroundTruth(kept, trained.double()[:, None]))
    for name in CHOSEN:
        assert result["protocols"]["B"]["methods"][name]["value"] == pytest.approx(expected.means[name].value)
    halves = half_subsets(SIZE.train, 12)
    repeats = [
        OnHalves(setting)([Retraining(tuple(mask.nonzero().flatten().tolist()), seed) for seed in (1, 2)])
        for mask in halves
    ]
    expected = evaluate_lds(scores, GroundTruth(halves, torch.stack(repeats).double()))
    for name in CHOSEN:
        assert result["protocols"]["A"]["methods"][name]["value"] == pytest.approx(expected.means[name].value)
    top = scores["magic"][1].topk(1).indices.tolist()
    rest = tuple(each for each in range(SIZE.train) if each not in top)
    less, whole = WithoutSome(setting)([Retraining(rest, 0), Retraining(tuple(range(SIZE.train)), 0)])
    rise = float((less - whole)[1]) / (len(setting.queries[1]["input_ids"]) - 1)
    assert result["rises"]["magic"][1] == pytest.approx(rise, abs=1e-6)


def test_what_was_made_at_another_size_is_refused(run: tuple[Path, dict[str, Any]], setting: Setting) -> None:
    """As many checkpoints as before, or else a method's kept scores would be of others."""
    other = Arguments(replace(SIZE, checkpoints=2), run[0], setting.cache_dir, methods=("random",))
    with pytest.raises(MismatchError, match="'checkpoints': 3"):
        results(other)


def test_magic_predicts_what_leaving_out_does(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    found = result["protocols"]["B"]["methods"]
    assert found["magic"]["value"] > 0.85
    assert abs(found["random"]["value"]) < 0.6


def test_costs_are_measured(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    costs = result["costs"]
    assert costs["magic"]["seconds"] > costs["random"]["seconds"] >= 0
    assert costs["magic"]["epochs"] > 1
    assert costs["magic"]["peak_bytes"] > 0
    assert costs["magic"]["failure"] is None


def test_the_frontier_is_what_nothing_beats() -> None:
    generator = torch.Generator().manual_seed(0)
    points = {str(place): (float(a), float(b)) for place, (a, b) in enumerate(torch.rand(40, 2, generator=generator))}
    expected = {
        name
        for name, (cost, score) in points.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    }
    found = frontier(points)
    assert set(found) == expected
    assert [points[name][0] for name in found] == sorted(points[name][0] for name in found)


def test_the_plot_names_every_method_and_numbers_its_points(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    *panels, names = score_against_cost(result).axes
    assert set(CHOSEN) <= {text.get_text() for text in names.texts}
    for axes in panels:
        assert {"1", "2", "3"} <= {text.get_text() for text in axes.texts}


def test_scores_of_twice_the_size_have_half_the_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(6, 40, generator=generator, dtype=torch.float64)  # of a linear world
    tokens = torch.tensor([3, 7, 5, 9, 4, 6])
    whole = torch.randn(6, generator=generator, dtype=torch.float64)
    kept = removals(40, 50, 0.1)
    truth = GroundTruth(kept, (whole + (~kept).double() @ effects.T)[:, None])
    found = calibration(2 * effects, truth, whole, tokens)
    assert found["slope"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert found["pearson"]["value"] == pytest.approx(1)
    predicted, measured = torch.tensor(found["curve"], dtype=torch.float64).T
    torch.testing.assert_close(measured, predicted / 2)
    assert predicted.mean() * 2 == pytest.approx(float(4 * ((~kept).double() @ effects.T / tokens).mean()))


def test_a_run_of_some_methods_leaves_the_others_as_they_are(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run

    def only(*names: str) -> dict[str, Any]:
        parts = {part: {name: result[part][name] for name in names} for part in ("rises", "costs")}
        parts["calibration"] = {name: each for name, each in result["calibration"].items() if name in names}
        ranked = {
            protocol: {**found, "methods": {name: found["methods"][name] for name in names}}
            for protocol, found in result["protocols"].items()
        }
        return {**result, **parts, "protocols": ranked}

    found = merged(only("random", "ekfac"), only("ekfac", "magic"))
    assert found == result
    assert list(found["protocols"]["B"]["methods"]) == list(result["protocols"]["B"]["methods"])
    assert merged({**only("random"), "setting": {}}, only("magic")) == only("magic")


def test_the_published_page_is_made_of_the_published_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = page.DOCUMENT.read_text()
    monkeypatch.setattr(page, "DOCUMENT", tmp_path / "leaderboard.md")
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    readme = README.read_text()
    (tmp_path / "README.md").write_text(readme)
    monkeypatch.setattr(page, "README", tmp_path / "README.md")
    first, *others = (json.loads((RESULTS / f"{name}.json").read_text()) for name in BOARDS)
    page.write_page(first, *others)
    assert (tmp_path / "leaderboard.md").read_text() == published
    assert (tmp_path / "README.md").read_text() == readme
    assert set(first["costs"]) == set(METHODS)


def test_every_row_names_its_damping_and_solves_their_residuals() -> None:
    published = json.loads((RESULTS / "leaderboard.json").read_text())
    rows = [line for line in page.DOCUMENT.read_text().splitlines() if line.startswith("|")]
    residuals = {name: cost.get("residual") for name, cost in published["costs"].items()}
    assert sum(each is not None for each in residuals.values()) >= 2
    for name, residual in residuals.items():
        damping = METHODS[name].damping
        assert any(f"| {name} | {damping} |" in row for row in rows)
        if residual is not None:
            assert any(row.startswith(f"| {name} |") and row.endswith(f"| {residual:.2f} |") for row in rows)
