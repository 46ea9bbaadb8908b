"""Gauss-Newton products against dense matrices made of Jacobians, and solvers against dense solves; all in float64."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests import solver_worker
from tests.models import Case, gpt2, mlp_case, relative_error, token_rows
from tests.reference import BruteForce
from wherefrom import gauss_newton
from wherefrom.curvature import EigenvalueCollector, Factors, Preconditioner
from wherefrom.errors import InputError, LayerError, LossError, MismatchError
from wherefrom.gauss_newton import DampedGaussNewton
from wherefrom.options import ScoreOptions
from wherefrom.sampling import Sampler
from wherefrom.scores import Scores
from wherefrom.solvers import Solver
from wherefrom.task import Batch, Task

Logits = Callable[[nn.Module, object], Tensor]
"""The rows [outputs, classes] that one example's loss is a function of."""


def regression_case() -> Case:
    case = mlp_case()
    generator = torch.Generator().manual_seed(5)
    examples: list[object] = [(each[0], torch.randn(3, generator=generator).double()) for each in case.train]  # type: ignore[index]
    return Case(case.model, wf.Regression(), examples, examples[:4])


def convolution_case() -> Case:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)
    ).double()
    examples: list[object] = [(torch.randn(2, 4, 4).double(), torch.randint(3, ())) for _ in range(6)]
    return Case(model, wf.Classification(["*"]), examples[:5], examples[5:])


def gpt2_case() -> Case:
    """Padded batches, a prompt that is not counted, an MLP and an attention."""
    rows = token_rows(9)
    assert isinstance(rows[0], dict)
    rows[0]["prompt_length"] = 1
    return Case(gpt2(layers=1), wf.CausalLM(["transformer.h.*"]), rows[:5], rows[5:])


def tied_case() -> Case:
    """The embedding, which is the head too, and a normalisation."""
    case = gpt2_case()
    return Case(case.model, wf.CausalLM(["lm_head", "transformer.ln_f", "transformer.h.0.mlp.c_fc"]), case.train, [])


def label_rows(model: nn.Module, example: object) -> Tensor:
    """The output for one example of pairs, as one row."""
    assert isinstance(example, tuple)
    row: Tensor = model(example[0].unsqueeze(0))
    return row


def token_logits(model: nn.Module, example: object) -> Tensor:
    """The logits of the positions whose next token is counted, of a sequence alone, without padding."""
    assert isinstance(example, dict)
    logits: Tensor = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    return logits[max(0, example.get("prompt_length", 0) - 1) : -1]


CASES: dict[str, tuple[Callable[[], Case], Logits]] = {
    "classification": (mlp_case, label_rows),
    "regression": (regression_case, label_rows),
    "convolution": (convolution_case, label_rows),
    "gpt2": (gpt2_case, token_logits),
    "tied": (tied_case, token_logits),
}


def study_of(case: Case, folder: Path) -> wf.Study[object]:
    return wf.Study(folder, case.model, case.task, train=case.train)


def dense(case: Case, study: wf.Study[object], logits: Logits) -> Tensor:
    """The Gauss-Newton matrix [weights, weights]: J^T (d^2 loss / d z^2) J, one example and one output at a time."""
    brute = BruteForce(case.model, case.task, list(study.layers), [], [])
    names, weights = zip(*brute.model.named_parameters(), strict=True)
    total = torch.zeros(())
    for example in case.train:
        rows = logits(brute.model.requires_grad_(), example)
        for row in rows:
            parts = [torch.autograd.grad(each, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
                     for each in row]  # fmt: skip
            gradients = [dict(zip(names, part, strict=True)) for part in parts]
            jacobian = torch.stack(
                [torch.cat([brute._matrix(name, each).flatten() for name in brute.layers]) for each in gradients]
            )
            p = row.detach().softmax(0)
            inner = torch.eye(len(row)) if isinstance(case.task, wf.Regression) else p.diag() - torch.outer(p, p)
            total = total + jacobian.T @ inner.double() @ jacobian
    return total / len(case.train)


def system_of(
    study: wf.Study[object], case: Case, damping: float = 0.1, pairs: int = 1000, factors: Factors | None = None
) -> DampedGaussNewton[object]:
    preconditioner = Preconditioner({}, {}) if factors is None else factors.preconditioner(damping)
    return DampedGaussNewton(study._sweep, preconditioner, case.train, damping, pairs)


@pytest.mark.parametrize(("make", "logits"), CASES.values(), ids=CASES)
def test_products_equal_dense_matrices(tmp_path: Path, make: Callable[[], Case], logits: Logits) -> None:
    case = make()
    study = study_of(case, tmp_path)
    before = [(each.clone(), each.requires_grad) for each in case.model.parameters()]
    matrix = dense(case, study, logits)
    vectors = torch.randn(5, len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = vectors @ matrix + 0.1 * vectors
    for pairs in (1000, 7, 2):  # all at once; a batch of one example; fewer than the vectors
        assert relative_error(system_of(study, case, pairs=pairs).product(vectors), expected) < 1e-10
    alone = torch.cat([system_of(study, case).product(each.unsqueeze(0)) for each in vectors])
    assert relative_error(alone, expected) < 1e-10
    for (value, required), now in zip(before, case.model.parameters(), strict=True):
        assert torch.equal(value, now) and required == now.requires_grad and now.grad is None


def test_some_examples_count_as_often_as_they_are_named(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    few = Case(case.model, case.task, [case.train[place] for place in (3, 1, 3)], [])
    vectors = torch.randn(2, len(dense(few, study, label_rows)), dtype=torch.float64)
    expected = vectors @ dense(few, study, label_rows) + 0.1 * vectors
    assert relative_error(system_of(study, case).product(vectors, [3, 1, 3]), expected) < 1e-10


def test_a_product_goes_on_in_halves_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    system = system_of(study_of(case, tmp_path), case)
    vectors = torch.randn(5, sum(system.space.sizes.values()), dtype=torch.float64)
    expected = system.product(vectors)
    whole, sizes = gauss_newton.batch_product, []

    def small_device(loss: Callable[[], Tensor], *arguments: object) -> Tensor:
        found = whole(loss, *arguments)  # type: ignore[arg-type]
        sizes.append(len(found))
        if len(found) > 2:
            raise torch.OutOfMemoryError("too much")
        return found

    monkeypatch.setattr(gauss_newton, "batch_product", small_device)
    assert relative_error(system.product(vectors), expected) < 1e-12
    sizes.clear()
    system.product(vectors)
    assert max(sizes) <= 2  # what did not fit is not tried again


def dense_scores(case: Case, study: wf.Study[object], logits: Logits, damping: Mapping[str, float]) -> Tensor:
    """g_q^T (H + D)^-1 g_t by a dense solve."""
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries)
    rows = [
        torch.stack([torch.cat([each[name].flatten() for name in brute.layers]) for each in gradients]).detach()
        for gradients in (brute.queries, brute.train)
    ]
    added = torch.cat([torch.full_like(brute.train[0][name].flatten(), damping[name]) for name in brute.layers])
    found: Tensor = rows[0] @ torch.linalg.solve(dense(case, study, logits) + added.diag(), rows[1].T)
    return found


def dampings(factors: Factors) -> dict[str, float]:
    return {name: 0.1 * float(values.mean()) for name, values in factors.eigenvalues.items()}


EXACT = wf.ConjugateGradients(iterations=500, tolerance=1e-11)


@pytest.mark.parametrize("name", ["classification", "gpt2"])
def test_scores_by_conjugate_gradients_equal_dense_solves(tmp_path: Path, name: str) -> None:
    make, logits = CASES[name]
    case = make()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    expected = dense_scores(case, study, logits, dict.fromkeys(study.layers, 1.0))
    found = study.score(case.queries, factors, solver=EXACT, damping=1.0)
    assert relative_error(found.values, expected) < 1e-8
    assert relative_error(study.score(case.queries, factors, damping=1.0).values, expected) > 0.01  # another matrix


def test_without_a_damping_each_layer_has_that_of_its_factors(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    expected = dense_scores(case, study, label_rows, dampings(factors))
    assert relative_error(study.score(case.queries, factors, solver=EXACT).values, expected) < 1e-8


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac"])
def test_any_preconditioner_leads_to_the_same_scores(tmp_path: Path, strategy: str) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    found = study.score(case.queries, study.fit(strategy), solver=EXACT, damping=0.3)
    expected = dense_scores(case, study, label_rows, dict.fromkeys(study.layers, 0.3))
    assert relative_error(found.values, expected) < 1e-8


def test_other_kinds_of_scores_are_of_the_solutions_too(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    whole = study.score(case.queries, factors, solver=EXACT, damping=0.3, per_layer=True)
    assert relative_error(sum(whole.layers.values(), torch.zeros(())), whole.values) < 1e-12
    total = study.score(case.queries, factors, solver=EXACT, damping=0.3, aggregate_queries="sum")
    assert relative_error(total.values[0], whole.values.sum(0)) < 1e-8
    top = study.score_top(case.queries, factors, 2, solver=EXACT, damping=0.3)
    assert relative_error(top.values.max(1).values, whole.values.max(1).values) < 1e-10


def test_astra_without_noise_converges_and_with_noise_comes_close(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    expected = dense_scores(case, study, label_rows, dict.fromkeys(study.layers, 1.0))
    exact = wf.Astra(iterations=150, batch_size=None, learning_rate=0.5, momentum=0.5, decay=1.0)
    found = study.score(case.queries, factors, solver=exact, damping=1.0, name="exact")
    assert relative_error(found.values, expected) < 1e-8
    noisy = study.score(case.queries, factors, solver=wf.Astra(batch_size=6), damping=1.0)
    begun = study.score(case.queries, factors, damping=1.0)  # where it starts
    distances = [float((each.values - expected).norm() / expected.norm()) for each in (noisy, begun)]
    assert 1e-8 < distances[0] < 0.25 * distances[1]


def test_the_first_iteration_is_the_filters_own_answer(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    first = study.score(case.queries, factors, solver=wf.ConjugateGradients(1)).values
    plain = study.score(case.queries, factors).values
    assert relative_error(first / first.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True)) < 1e-10


def test_each_query_is_solved_as_if_it_were_alone(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    system = system_of(study, case, 0.1, factors=study.fit("ekfac"))
    gradients = torch.randn(4, sum(system.space.sizes.values()), dtype=torch.float64)
    gradients[1] *= 1e-6
    gradients[2] = 0
    solver = wf.ConjugateGradients(200, 1e-9)
    together = solver.solve(system, gradients)
    assert together.vectors[2].count_nonzero() == 0 and together.residuals[-1].max() <= 1e-9
    for row in (0, 1, 3):
        alone = solver.solve(system, gradients[row : row + 1])
        assert relative_error(together.vectors[row], alone.vectors[0]) < 1e-7


def test_factors_save_iterations_where_directions_differ(tmp_path: Path) -> None:
    """Inputs of very different sizes: what a Kronecker factor can tell."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-1, 2, 20, dtype=torch.float64)
    inputs, targets = (torch.randn(200, size, generator=generator).double() for size in (20, 3))
    examples: list[object] = list(zip(inputs * sizes, targets, strict=True))
    case = Case(nn.Linear(20, 3).double(), wf.Regression(), examples, examples[:3])
    study = study_of(case, tmp_path)
    gradients = torch.randn(3, 63, generator=generator).double()
    solver, counts = wf.ConjugateGradients(2000, 1e-6), {}
    for strategy in ("ekfac", "identity"):
        system = system_of(study, case, 1e-2, factors=study.fit(strategy))
        counts[strategy] = len(solver.solve(system, gradients).residuals)
    assert counts["ekfac"] < 0.5 * counts["identity"]


def test_the_matrix_is_what_sampled_eigenvalues_estimate(tmp_path: Path) -> None:
    """Squared gradients of sampled targets, on average over many draws, are the diagonal of the matrix."""
    case = gpt2_case()
    study = study_of(case, tmp_path)
    sweep = study._sweep
    total = torch.zeros(())
    draws = 150
    for seed in range(draws):
        collector = EigenvalueCollector(study.layers, {}, len(case.train), sweep.dtype, sweep.device)
        sweep.run("draw", case.train, collector, sampled(seed), batch_size=len(case.train))
        total = total + torch.cat([each.flatten() for each in collector.means().values()]) / draws
    diagonal = dense(case, study, token_logits).diagonal()
    assert abs(float(total.sum() / diagonal.sum()) - 1) < 0.05
    assert torch.corrcoef(torch.stack([total, diagonal]))[0, 1] > 0.97


def sampled(seed: int) -> Callable[[nn.Module, Any, Sequence[int]], Tensor]:
    return lambda model, batch, rows: wf.CausalLM().train_loss(model, batch, Sampler(seed, rows))


def test_part_of_the_examples_is_drawn_by_the_seed(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    solvers = {
        "one": wf.ConjugateGradients(100, 1e-10, 6, seed=0),
        "same": wf.ConjugateGradients(100, 1e-10, 6, seed=0),
        "other": wf.ConjugateGradients(100, 1e-10, 6, seed=1),
        "all": wf.ConjugateGradients(100, 1e-10, 12),
        "whole": wf.ConjugateGradients(100, 1e-10),
    }
    found = {
        name: study.score(case.queries, factors, name=name, solver=solver, damping=1.0).values
        for name, solver in solvers.items()
    }
    assert torch.equal(found["one"], found["same"]) and torch.equal(found["all"], found["whole"])
    assert relative_error(found["other"], found["one"]) > 1e-3
    assert relative_error(found["one"], found["all"]) > 1e-3


def test_processes_share_the_products(tmp_path: Path) -> None:
    solver_worker.scores(tmp_path / "alone")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.solver_worker", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, cwd=Path(__file__).parents[1], env={**shared, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for name in solver_worker.SOLVERS:
        alone, together = (Scores.load(tmp_path / run / "scores" / f"ekfac-{name}").values for run in ("alone", "two"))
        assert relative_error(together, alone) < 1e-9


def test_scores_are_kept_under_the_solvers_name_and_reused(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    factors = study.fit("ekfac")
    found = study.score(case.queries, factors, solver=wf.ConjugateGradients(3))
    assert found.fingerprint["solver"].startswith("ConjugateGradients(iterations=3")
    assert {each.name for each in (tmp_path / "scores").iterdir()} == {"ekfac-cg"}
    assert torch.equal(study.score(case.queries, factors, solver=wf.ConjugateGradients(3)).values, found.values)
    with pytest.raises(MismatchError, match="solver: stored .*iterations=3.* now .*iterations=4"):
        study.score(case.queries, factors, solver=wf.ConjugateGradients(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": wf.Astra(), "half_precision": True}, "half_precision=True with a solver"),
        ({"solver": wf.Astra(), "query_rank": 2}, "query_rank=2 with a solver"),
        ({"solver": wf.Astra(), "damping": 0.0}, "damping=0 with a solver"),
        ({"solver": "cg"}, r"solver='cg': expected ConjugateGradients\(...\)"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: ScoreOptions, message: str) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    with pytest.raises(InputError, match=message):
        study.score(case.queries, study.fit("ekfac"), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wf.ConjugateGradients(0), "iterations=0"),
        (lambda: wf.ConjugateGradients(tolerance=-1), "tolerance=-1"),
        (lambda: wf.ConjugateGradients(examples=0), "examples=0"),
        (lambda: wf.Astra(learning_rate=0), "learning_rate=0"),
        (lambda: wf.Astra(momentum=1), "momentum=1"),
        (lambda: wf.Astra(decay=2), "decay=2"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Solver], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_divergence_is_an_error_and_nothing_is_kept(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    with pytest.raises(LossError, match=r"Astra: the iterations diverge.* smaller learning_rate"):
        study.score(case.queries, study.fit("ekfac"), solver=wf.Astra(learning_rate=50.0))
    assert not list((tmp_path / "scores").glob("*/tensors.safetensors"))


class OwnLoss(Task[dict[str, Tensor]]):
    """Takes the loss that the model has computed."""

    def train_loss(self, model: nn.Module, batch: dict[str, Tensor], sampler: Sampler | None = None) -> Tensor:
        loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
        return loss


class Penalised(wf.Classification):
    """Adds a penalty on the weights."""

    def train_loss(self, model: nn.Module, batch: object, sampler: Sampler | None = None) -> Tensor:
        return super().train_loss(model, batch, sampler) + model.first.weight.square().sum()  # type: ignore[arg-type,operator,union-attr]


class Inside(wf.Classification):
    """Calls parts of the model rather than the model."""

    def train_loss(self, model: nn.Module, batch: object, sampler: Sampler | None = None) -> Tensor:
        return super().train_loss(nn.Sequential(model.first, model.plain), batch, sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (OwnLoss(["transformer.h.*"]), "no curvature in what the model returns"),
        (Penalised(), "in another way than through what the model returns"),
        (Inside(["first", "plain"]), "does not depend on what calling the model returns"),
    ],
)
def test_losses_that_are_no_function_of_the_output_are_refused(tmp_path: Path, task: Task[Batch], message: str) -> None:
    case = mlp_case()
    if isinstance(task, OwnLoss):
        case = Case(gpt2(layers=1), task, [{"input_ids": torch.tensor([1, 2, 3])}] * 2, [])
    elif isinstance(task, Inside):
        case.model.first = nn.Linear(4, 5).double()
    study = wf.Study(tmp_path, case.model, task, train=case.train)
    system = system_of(study, case)  # type: ignore[arg-type]
    with pytest.raises(LossError, match=message):
        system.product(torch.ones(1, sum(system.space.sizes.values()), dtype=torch.float64))


def test_layers_and_dampings_without_a_solution_are_refused(tmp_path: Path) -> None:
    case = gpt2_case()
    study = wf.Study(tmp_path, case.model, wf.CausalLM(["transformer.wpe"]), train=case.train)
    with pytest.raises(LayerError, match=r"'transformer\.wpe' is an embedding"):
        system_of(study, case)  # type: ignore[arg-type]
    case = mlp_case()
    other = study_of(case, tmp_path)
    with pytest.raises(InputError, match=r"damping=None with a solver: layer 'first' would have none"):
        other.score(case.queries, other.fit("identity"), solver=EXACT)
