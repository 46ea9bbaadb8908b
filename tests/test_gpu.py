"""On a GPU: scores are those of float64 on the CPU, however they are planned, batched, kept or drawn, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_stages import correctness, robustness
from gpu_stages.report import Figures, Report, Setting
from torch import nn

import wherefrom as wf
from tests.models import gpt2, relative_error, token_rows
from wherefrom.curvature.factors import STRATEGIES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", correctness.CASES)
def test_scores_are_those_of_float64_on_the_cpu(name: str, strategy: str, half: bool) -> None:
    limit = correctness.HALF_LIMIT if half else correctness.FULL_LIMIT
    assert correctness.error(name, strategy, "cuda", half) < limit


@pytest.mark.parametrize("way", correctness.WAYS)
def test_scores_do_not_depend_on_where_things_are_kept(way: str) -> None:
    error, limit = correctness.WAYS[way]
    assert error("cuda", correctness.WIDTH) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 0.0), (torch.float32, 1e-3)])
def test_targets_are_drawn_as_on_the_cpu(dtype: torch.dtype, limit: float) -> None:
    assert correctness.draw_figures("cuda", 4096, 50257, dtype, limit)["passed"]


@pytest.mark.parametrize(("half", "tolerance"), [(False, 2e-5), (True, 3e-2)])
def test_scores_do_not_depend_on_the_batch(
    tmp_path_factory: pytest.TempPathFactory, half: bool, tolerance: float
) -> None:
    model = gpt2(torch.float32)
    nn.Module.to(model, "cuda")
    found = []
    for size in (1, 7):
        folder = tmp_path_factory.mktemp("run")
        execution = wf.Execution(train_batch_size=size, query_batch_size=size, half_precision=half)
        study = wf.Study(folder, model, wf.CausalLM(), train=token_rows(14), execution=execution)
        found.append(study.score(token_rows(5, seed=4), wf.EKFAC()).values)
    assert relative_error(*found) < tolerance


@pytest.mark.parametrize("stage", [robustness.resume, robustness.memory, robustness.two_processes])
def test_runs_that_are_disturbed_end_as_those_that_are_not(
    tmp_path: Path, stage: Callable[[Report, Setting], None]
) -> None:
    report = Report(tmp_path / "report.json", "stage")
    stage(report, Setting(scratch=str(tmp_path)))
    found: dict[str, Figures | object] = {name: part.get("figures", part) for name, part in report.parts.items()}
    assert all(isinstance(each, dict) and each.get("passed") for each in found.values()), found
