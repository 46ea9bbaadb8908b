"""SOURCE: against dense matrix exponentials, and against unrolled training itself where its assumptions hold."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, mlp_case, relative_error
from tests.reference import BruteForce, dense
from tests.runs import only
from tests.test_checkpoints import moved
from tests.test_layers import CASES
from wherefrom.engine.modules.layers import select_layers
from wherefrom.methods.source import response_filter
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.store.recording import MOMENTS, ParameterGroup, RecordedCheckpoint

SEED = 3
BETA, EPS = 0.99, 1e-3
TIMES = [0.3, 0.05, 0.2, 0.1]


def saved(model: nn.Module, folder: Path, count: int = 4) -> tuple[list[Path], list[nn.Module]]:
    """Checkpoints of different weights, as safetensors files in the order of their names."""
    models = [moved(model, seed) for seed in range(count)]
    folder.mkdir()
    paths = [folder / f"{number}.safetensors" for number in range(count)]
    for path, each in zip(paths, models, strict=True):
        save_file({name: tensor.clone() for name, tensor in each.state_dict().items()}, path)
    return paths, models


Steps = Mapping[str, Tensor]
"""What a step multiplies gradients with, by parameter names."""


def by_matrix_exponentials(
    cuts: Sequence[Sequence[BruteForce]],
    times: Sequence[float],
    strategy: str = "ekfac",
    steps: Sequence[Steps] | None = None,
    weight_decay: float = 0.0,
) -> Tensor:
    """Scores [query, train] of segments of checkpoints, with dense curvature and no eigenvalue of it.

    Args:
        steps: P of each segment, whose dynamics stay in the weights' own coordinates here: d theta = -P H theta dt.
        weight_decay: in units of times.
    """
    last = cuts[-1][-1]
    total = torch.zeros(len(last.queries), len(last.train), dtype=torch.float64)
    for layer in last.layers:
        queries = torch.stack([each[layer].flatten() for each in last.queries])
        for number, (segment, time) in reversed(list(enumerate(zip(cuts, times, strict=True)))):
            given = {} if steps is None else steps[number]
            step = last.matrix(layer, given).flatten() if given else torch.ones(queries.shape[1], dtype=torch.float64)
            roots, conditioned = step.sqrt(), [brute.conditioned(given) if given else brute for brute in segment]
            curvature = averaged(conditioned, layer, strategy) / torch.outer(roots, roots)
            size = len(curvature)
            # exp([[-tM, tP], [0, 0]]) holds exp(-tM), and beside it the integral of exp(-sM) P from 0 to t.
            generator = step[:, None] * curvature + weight_decay * torch.eye(size, dtype=torch.float64)
            block = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
            block[:size, :size], block[:size, size:] = -time * generator, time * step.diag()
            decay, response = torch.linalg.matrix_exp(block)[:size].split(size, dim=1)
            trained = torch.stack([torch.stack([each[layer].flatten() for each in brute.train]) for brute in segment])
            total += queries @ response @ trained.mean(0).T
            queries = queries @ decay
    return total


def averaged(segment: Sequence[BruteForce], layer: str, strategy: str) -> Tensor:
    """Of several checkpoints: eigenvectors of the mean covariances, mean squares of gradients there."""
    matrices = torch.cat([torch.stack([each[layer] for each in brute.fisher]) for brute in segment])
    rows = matrices.flatten(1)
    if strategy != "ekfac":
        s, a = segment[0].whole_moments(layer, matrices)
        return dense(strategy, rows, a, s)
    activations, gradients = (
        torch.cat([each[layer][side] for brute in segment for each in brute.tokens]) for side in (0, 1)
    )
    a, s = (each.T @ each / len(each) for each in (activations, gradients))
    return dense("ekfac", rows, a, s)


@pytest.mark.parametrize("name", ["mlp", "embedding", "conv2d"])
@pytest.mark.parametrize("segments", [1, 3])
def test_scores_equal_dense_matrix_exponentials(tmp_path: Path, name: str, segments: int) -> None:
    makers: dict[str, Callable[[], Case]] = {**CASES, "mlp": mlp_case}
    case = makers[name]()
    paths, models = saved(case.model, tmp_path / "checkpoints")
    before = copy.deepcopy(case.model.state_dict())
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    method = wf.Source(checkpoints=paths, segments=segments, times=TIMES, seed=SEED)
    scores = study.score(case.queries, method, execution=wf.Execution(query_batch_size=2, train_batch_size=5))
    layers = list(select_layers(case.model, case.task.layers))
    brutes = [BruteForce(model, case.task, layers, case.train, case.queries, SEED) for model in models]
    cuts = {1: [brutes], 3: [brutes[:2], brutes[2:3], brutes[3:]]}[segments]
    times = {1: [sum(TIMES)], 3: [sum(TIMES[:2]), *TIMES[2:]]}[segments]
    assert relative_error(scores.values, by_matrix_exponentials(cuts, times)) < 1e-8
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    # With one resident query at a time, query gradients are made anew for each.
    small = wf.Study(tmp_path / "small", case.model, case.task, train=case.train)
    again = small.score(case.queries, method, execution=wf.Execution(memory_budget=1e-9))
    assert relative_error(again.values, scores.values) < 1e-9


def recorded(paths: Sequence[Path], models: Sequence[nn.Module], rates: Sequence[float]) -> list[RecordedCheckpoint]:
    """The same checkpoints as directories, as an AdamW run records them, with second moments of their own."""
    group = ParameterGroup(0.0, (0.9, BETA), EPS, 0.3)
    found = []
    for number, (path, model, rate) in enumerate(zip(paths, models, rates, strict=True), start=1):
        generator = torch.Generator().manual_seed(number)
        folder = path.parent / f"checkpoint-{number}"
        folder.mkdir()
        path.rename(folder / "model.safetensors")
        squares = {
            name: torch.rand(each.shape, dtype=torch.float64, generator=generator)
            for name, each in model.named_parameters()
        }
        save_file(squares, folder / MOMENTS)
        found.append(RecordedCheckpoint(folder, number, 1.0, 1, "AdamW", (replace(group, learning_rate=rate),)))
    return found


def adam_steps(checkpoints: Sequence[RecordedCheckpoint]) -> dict[str, Tensor]:
    """The mean over checkpoints of 1 / (sqrt(v / (1 - beta2^step)) + eps)."""
    moments = [load_file(each.path / MOMENTS) for each in checkpoints]
    return {
        name: torch.stack(
            [
                1 / ((each[name] / (1 - BETA**checkpoint.step)).sqrt() + EPS)
                for each, checkpoint in zip(moments, checkpoints, strict=True)
            ]
        ).mean(0)
        for name in moments[0]
    }


@pytest.mark.parametrize("name", ["mlp", "embedding", "conv2d"])
@pytest.mark.parametrize("strategy", ["shampoo", "diagonal"])
def test_adams_steps_equal_dense_matrix_exponentials(tmp_path: Path, name: str, strategy: Any) -> None:
    makers: dict[str, Callable[[], Case]] = {**CASES, "mlp": mlp_case}
    case = makers[name]()
    paths, models = saved(case.model, tmp_path / "checkpoints")
    checkpoints = recorded(paths, models, TIMES)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train, history=checkpoints)
    method = wf.Source(segments=3, adam=True, strategy=strategy, loss_scale=0.5, seed=SEED)
    scores = study.score(case.queries, method)
    layers = list(select_layers(case.model, case.task.layers))
    brutes = [BruteForce(model, case.task, layers, case.train, case.queries, SEED) for model in models]
    cuts = [brutes[:2], brutes[2:3], brutes[3:]]
    steps = [adam_steps(checkpoints[:2]), adam_steps(checkpoints[2:3]), adam_steps(checkpoints[3:])]
    times = [0.5 * each for each in (sum(TIMES[:2]), *TIMES[2:])]
    expected = by_matrix_exponentials(cuts, times, strategy, steps, weight_decay=0.3 / 0.5)
    assert relative_error(scores.values, expected) < 1e-8
    # Each of the three has its part in it.
    for other in (
        by_matrix_exponentials(cuts, times, strategy, weight_decay=0.6),
        by_matrix_exponentials(cuts, times, strategy, steps),
        by_matrix_exponentials(cuts, times, strategy, [steps[0]] * 3, weight_decay=0.6),
    ):
        assert relative_error(scores.values, other) > 1e-3


class UnitFisher(wf.Regression):
    """Least squares whose drawn gradient at the output is 1: E[g g^T] is the Hessian of the mean loss, exactly."""

    def train_loss(self, model: nn.Module, batch: Any, sampler: Any = None) -> Tensor:
        return super().train_loss(model, batch, None) if sampler is None else model(batch[0]).sum()


EXAMPLES, WIDTH, STEPS = 10, 3, 600


Rows = list[tuple[Tensor, Tensor]]


def least_squares() -> tuple[nn.Module, Rows, Rows]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES + 4, WIDTH, dtype=torch.float64, generator=generator)
    rows = [(x, torch.randn(1, dtype=torch.float64, generator=generator)) for x in inputs]
    return nn.Sequential(nn.Linear(WIDTH, 1, bias=False)).double(), rows[:EXAMPLES], rows[EXAMPLES:]


ONES = torch.ones(WIDTH, dtype=torch.float64)


def descended(
    weight: Tensor,
    train: Rows,
    examples: Tensor,
    steps: int,
    rate: float,
    multiplied: Tensor = ONES,
    weight_decay: float = 0.0,
) -> list[Tensor]:
    """Every weight [in] of descent on the sum over examples of their weights x half squared errors, over N.

    Args:
        multiplied: P [in], of each step's gradient.
    """
    inputs, targets = torch.stack([x for x, _ in train]), torch.cat([y for _, y in train])
    path = [weight]
    for _ in range(steps):
        gradient = inputs.T @ (examples * (inputs @ path[-1] - targets)) / len(train)
        path.append((1 - rate * weight_decay) * path[-1] - rate * multiplied * gradient)
    return path


def unrolled(
    weight: Tensor,
    train: Rows,
    queries: Rows,
    steps: int,
    rate: float,
    multiplied: Tensor = ONES,
    weight_decay: float = 0.0,
) -> Tensor:
    """Minus the derivative of each query's half squared error, times N, in each example's weight: [query, train]."""

    def losses(examples: Tensor) -> Tensor:
        last = descended(weight, train, examples, steps, rate, multiplied, weight_decay)[-1]
        return torch.stack([(x @ last - y[0]).square() / 2 for x, y in queries])

    found: Tensor = torch.func.jacrev(losses)(torch.ones(len(train), dtype=torch.float64))
    return -len(train) * found


def sourced(
    folder: Path,
    path: Sequence[Tensor],
    chosen: Sequence[int],
    rate: float,
    segments: int,
    multiplied: Tensor | None = None,
    weight_decay: float | None = None,
) -> Tensor:
    """SOURCE from the weights after these steps; times are those of steps since the one before.

    Args:
        multiplied: P [in] of Adam's steps, which its second moments are made from; None is gradient descent.
    """
    model, train, queries = least_squares()
    records, before = [], 0
    for step in chosen:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        save_file({"0.weight": path[step][None].clone()}, folder / f"checkpoint-{step}" / "model.safetensors")
        groups = (ParameterGroup(rate, (0.9, BETA), EPS, weight_decay),)
        if multiplied is not None:
            squares = (1 / multiplied - EPS).square() * (1 - BETA**step)
            save_file({"0.weight": squares[None]}, folder / f"checkpoint-{step}" / MOMENTS)
        records.append(RecordedCheckpoint(folder / f"checkpoint-{step}", step, 0.0, step - before, "any", groups))
        before = step
    study = wf.Study(folder / "run", model, UnitFisher(), train=train)
    return study.score(queries, wf.Source(checkpoints=records, segments=segments, adam=multiplied is not None)).values


def test_at_the_minimum_it_is_unrolled_training(tmp_path: Path) -> None:
    """There gradients are constant, and all that is approximate is (1 - eta H)^K as exp(-eta K H), to order eta."""
    _, train, queries = least_squares()
    inputs, targets = torch.stack([x for x, _ in train]), torch.stack([y for _, y in train])
    minimum = torch.linalg.lstsq(inputs, targets).solution[:, 0]
    errors = []
    for steps in (STEPS // 4, STEPS):
        rate = 3.0 / steps
        path = descended(minimum, train, torch.ones(EXAMPLES, dtype=torch.float64), steps, rate)
        thirds = [steps // 3, 2 * steps // 3, steps]
        found = sourced(tmp_path / str(steps), path, thirds, rate, 3)
        errors.append(relative_error(found, unrolled(minimum, train, queries, steps, rate)))
    assert errors[0] < 0.02
    assert 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("multiplied", [None, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)], ids=["sgd", "adam"])
def test_at_rest_it_is_unrolled_training_with_adams_steps_and_weight_decay(
    tmp_path: Path, multiplied: Tensor | None
) -> None:
    """Where decay and the step cancel, gradients are constant, too: the same order of eta is all that is left."""
    _, train, queries = least_squares()
    inputs, targets = torch.stack([x for x, _ in train]), torch.cat([y for _, y in train])
    steps_of = ONES if multiplied is None else multiplied
    decay = 0.4  # at rest: P X^T (X w - y) / N + decay w = 0
    rest = torch.linalg.solve(
        steps_of[:, None] * inputs.T @ inputs / EXAMPLES + decay * torch.eye(WIDTH).double(),
        steps_of * (inputs.T @ targets) / EXAMPLES,
    )
    errors = []
    for steps in (STEPS // 4, STEPS):
        rate = 3.0 / steps
        path = descended(rest, train, torch.ones(EXAMPLES, dtype=torch.float64), steps, rate, steps_of, decay)
        assert relative_error(path[-1], rest) < 1e-12
        thirds = [steps // 3, 2 * steps // 3, steps]
        found = sourced(tmp_path / str(steps), path, thirds, rate, 3, multiplied, decay)
        errors.append(relative_error(found, unrolled(rest, train, queries, steps, rate, steps_of, decay)))
    assert errors[0] < 0.03
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_far_from_the_minimum_more_segments_come_closer_to_unrolled_training(tmp_path: Path) -> None:
    _, train, queries = least_squares()
    start, rate = torch.full((WIDTH,), 2.0, dtype=torch.float64), 1.5 / STEPS
    path = descended(start, train, torch.ones(EXAMPLES, dtype=torch.float64), STEPS, rate)
    expected = unrolled(start, train, queries, STEPS, rate)
    errors = []
    for count in (2, 4, 8):
        ends = [STEPS * (number + 1) // count for number in range(count)]
        errors.append(relative_error(sourced(tmp_path / str(count), path, ends, rate, count), expected))
    # A gradient from the end of a segment stands for all of it: first order in its length.
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    assert errors[2] < 0.2


def test_what_is_finished_is_reused_and_what_differs_is_refused(tmp_path: Path) -> None:
    case = mlp_case()
    paths, _ = saved(case.model, tmp_path / "checkpoints")
    run = tmp_path / "run"
    study = wf.Study(run, case.model, case.task, train=case.train)
    method, other = (wf.Source(checkpoints=paths, segments=segments, times=TIMES) for segments in (2, 1))
    first = study.score(case.queries, method, name="mine")
    files = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in paths}
    assert torch.equal(study.score(case.queries, method, name="mine").values, first.values)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == files
    for different in (replace(method, times=[1, *TIMES[1:]]), other):
        with pytest.raises(MismatchError, match="made from something else"):
            study.score(case.queries, different, name="mine")
    changed = study.score(case.queries, other, name="mine", overwrite=True)
    assert relative_error(changed.values, study.score(case.queries, other).values) < 1e-12
    assert first.method == "source"


def test_other_second_moments_are_another_result(tmp_path: Path) -> None:
    case = mlp_case()
    checkpoints = recorded(*saved(case.model, tmp_path / "checkpoints"), TIMES)
    run = tmp_path / "run"
    study = wf.Study(run, case.model, case.task, train=case.train)
    method = wf.Source(checkpoints=checkpoints, segments=2, adam=True)
    first = study.score(case.queries, method, name="mine")
    files = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    again = study.score(case.queries, method, name="mine")
    assert torch.equal(again.values, first.values)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == files
    for other in (
        replace(method, adam=False),
        replace(method, strategy="diagonal"),
        replace(method, weight_decay=0.0),
    ):
        with pytest.raises(MismatchError, match="made from something else"):
            study.score(case.queries, other, name="mine")
    moments = {name: 2 * each for name, each in load_file(checkpoints[0].path / MOMENTS).items()}
    save_file(moments, checkpoints[0].path / MOMENTS)
    with pytest.raises(MismatchError, match="made from something else"):
        study.score(case.queries, method, name="mine")


def test_factors_in_adams_coordinates_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = mlp_case()
    checkpoints = recorded(*saved(case.model, tmp_path / "checkpoints"), TIMES)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    method = wf.Source(checkpoints=checkpoints, segments=2, adam=True)
    for each in (replace(method, adam=False), replace(method, strategy="diagonal"), method):
        assert "less well than EKFAC" not in caplog.text
        study.score(case.queries, each)
    assert "less well than EKFAC" in caplog.text


def test_eigenvalues_of_a_basis_that_is_gone_are_computed_anew(tmp_path: Path) -> None:
    """A segment's basis and its checkpoints' eigenvalues are in different folders, and belong together."""
    case = mlp_case()
    paths, _ = saved(case.model, tmp_path / "checkpoints", 2)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    method = wf.Source(checkpoints=paths, segments=1, times=TIMES[:2])
    study.score(case.queries, method)
    kept = sorted(tmp_path.rglob("eigenvalues/tensors.safetensors"))
    before = [file.stat().st_mtime_ns for file in kept]
    shutil.rmtree(only(tmp_path / "run" / "factors", "source-1") / "eigenbasis")
    study.score(case.queries, method, overwrite=True)
    assert len(kept) == 2
    assert all(file.stat().st_mtime_ns > time for file, time in zip(kept, before, strict=True))


def test_some_of_the_recorded_checkpoints_stand_for_all_of_the_training(tmp_path: Path) -> None:
    case = mlp_case()
    checkpoints = recorded(*saved(case.model, tmp_path / "checkpoints"), TIMES)
    chosen = [checkpoints[1], checkpoints[3]]
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    found = study.score(case.queries, wf.Source(checkpoints=chosen, segments=2))
    times = [2 * TIMES[1], 2 * TIMES[3]]
    paths = [each.path for each in chosen]
    method = wf.Source(checkpoints=paths, segments=2, times=times, weight_decay=0.3)
    expected = study.score(case.queries, method, name="other")
    assert relative_error(found.values, expected.values) < 1e-12
    with pytest.raises(InputError, match=r"of the steps \[4, 2\]; expected them in the order of one training"):
        study.score(case.queries, wf.Source(checkpoints=chosen[::-1], segments=2))


def test_the_response_to_curvature_that_vanishes_is_the_time() -> None:
    small = torch.tensor([0.0, 1e-44, 1e-40, 1e-30], dtype=torch.float32)
    assert relative_error(response_filter(small, 1e-6), torch.full((4,), 1e-6)) < 1e-6


def test_loss_scale_is_a_scale_of_times(tmp_path: Path) -> None:
    case = mlp_case()
    paths, _ = saved(case.model, tmp_path / "checkpoints", 2)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    halved = study.score(case.queries, wf.Source(checkpoints=paths, segments=2, times=[0.4, 0.2], loss_scale=0.5))
    expected = study.score(case.queries, wf.Source(checkpoints=paths, segments=2, times=[0.2, 0.1]), name="other")
    assert relative_error(halved.values, expected.values) < 1e-12


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    case = mlp_case()
    paths, models = saved(case.model, tmp_path / "checkpoints", 2)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    method = wf.Source(checkpoints=paths, segments=2, times=TIMES[:2])
    with pytest.raises(InputError, match="loss_scale=0"):
        wf.Source(loss_scale=0)
    with pytest.raises(InputError, match="weight_decay=-1"):
        wf.Source(weight_decay=-1)
    for strategy, adam in (("kfac", False), ("identity", False), ("ekfac", True)):
        with pytest.raises(InputError, match=f"strategy='{strategy}' with adam={adam}: expected"):
            wf.Source(strategy=strategy, adam=adam)  # type: ignore[arg-type]
    checkpoints = recorded(paths, models, TIMES[:2])
    unlike = replace(checkpoints[0], groups=(replace(checkpoints[0].groups[0], weight_decay=0.1),))
    refused: list[tuple[wf.Source, str]] = [
        (replace(method, segments=3), "segments=3: expected 1 to 2"),
        (replace(method, times=None), "a path says nothing of learning rates"),
        *((replace(method, times=times), "times=") for times in ([1.0], [1.0, -1.0], [1.0, float("nan")])),
        (replace(method, adam=True), "a path says nothing of Adam's second moments"),
        (
            wf.Source(checkpoints=[unlike, checkpoints[1]], segments=2),
            r"weight_decay=None, and \[0.1, 0.3\] were recorded",
        ),
    ]
    for each, message in refused:
        with pytest.raises(InputError, match=message):
            study.score(case.queries, each)
    assert not list((tmp_path / "run").glob("*/*"))
