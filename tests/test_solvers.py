"""Solvers, and the scores of what they find, against dense solves in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.dense_gauss_newton import CASES, Logits, dense, gpt2_case, label_rows, study_of, system_of, token_logits
from tests.models import Case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored, labels
from tests.test_conditioning import numbers
from wherefrom.curvature.conditioning import adam_conditioning
from wherefrom.curvature.solvers.solver import MOST_RESIDUAL, Solver
from wherefrom.planning.plan import plan_scores
from wherefrom.report.reading import computed_by
from wherefrom.runtime.errors import InputError, LayerError, LossError, MismatchError
from wherefrom.scoring.results import Scores
from wherefrom.store.files import write_tensors
from wherefrom.store.recording import MOMENTS, ParameterGroup, RecordedCheckpoint


def dense_scores(case: Case, study: wf.Study[object], logits: Logits, damping: Mapping[str, Tensor | float]) -> Tensor:
    """g_q^T (H + D)^-1 g_t by a dense solve.

    Args:
        damping: D of each layer, a number or [out, in].
    """
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries)
    queries, train = brute.vectors(brute.queries), brute.vectors(brute.train)
    shapes = {name: brute.train[0][name].shape for name in brute.layers}
    added = torch.cat(
        [torch.as_tensor(damping[name], dtype=torch.float64).expand(shape).flatten() for name, shape in shapes.items()]
    )
    found: Tensor = queries @ torch.linalg.solve(dense(case, study, logits) + added.diag(), train.T)
    return found


EXACT = wf.ConjugateGradients(iterations=2000, tolerance=1e-11)


@pytest.mark.parametrize("name", ["classification", "gpt2"])
def test_scores_by_conjugate_gradients_equal_dense_solves(tmp_path: Path, name: str) -> None:
    make, logits = CASES[name]
    case = make()
    study = study_of(case, tmp_path)
    expected = dense_scores(case, study, logits, dict.fromkeys(study.layers, 1.0))
    found = study.score(case.queries, wf.EKFAC(solver=EXACT, damping=1.0))
    assert relative_error(found.values, expected) < 1e-8
    plain = study.score(case.queries, wf.EKFAC(damping=1.0))
    assert relative_error(plain.values, expected) > 0.01  # another matrix


def recorded(case: Case, folder: Path) -> list[RecordedCheckpoint]:
    """Two checkpoints, 7 steps at a rate of 0.1 and 5 at 0.02; both are the case's model, with second moments."""
    found = []
    for step, since, rate in ((7, 7, 0.1), (12, 5, 0.02)):
        path = folder / f"checkpoint-{step}"
        write_tensors(
            path / "model.safetensors",
            {name: each.clone() for name, each in case.model.state_dict().items()},
            {"format": "pt"},
        )
        write_tensors(path / MOMENTS, {name: each.square() for name, each in numbers(case.model).items()}, {})
        group = ParameterGroup(rate, (0.9, 0.99), 1e-8, 0.0)
        found.append(RecordedCheckpoint(path, step, 1.0, since, "AdamW", (group,)))
    return found


def test_without_a_damping_it_is_what_the_training_has_left_unused(tmp_path: Path) -> None:
    case, scale = mlp_case(), 0.25
    history = recorded(case, tmp_path)
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train, history=history)
    method = wf.Shampoo(adam=True, solver=EXACT, loss_scale=scale)
    natural = study.score(case.queries, method)
    damping = 1 / (scale * (7 * 0.1 + 5 * 0.02))
    same = study.score(case.queries, wf.Dot(adam=True, solver=EXACT, damping=damping))
    assert computed_by(same) == f"dot, ConjugateGradients, damping {damping}"  # which a plain dot product has not
    assert float(natural.fingerprint["damping"]) == pytest.approx(damping)
    preconditioner = adam_conditioning(history[-1])
    matrices = BruteForce(case.model, case.task, list(study.layers), [], [])
    added = {name: damping / matrices.matrix(name, preconditioner) for name in study.layers}
    expected = dense_scores(case, study, label_rows, added)
    assert relative_error(natural.values, expected) < 1e-8
    candidates = torch.arange(3).expand(len(case.queries), 3)
    two_stage = study.score(case.queries, wf.TwoStage(first=candidates, then=method), keep=wf.Top(3))
    assert relative_error(two_stage.values.sort().values, natural.values[:, :3].sort().values) < 1e-8


def test_training_is_taken_to_have_averaged_over_what_a_loss_is_a_sum_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    damping, text = {}, gpt2_case()
    sequences = [each for each in text.train if isinstance(each, dict)]
    sequences[1]["prompt_length"] = 2
    for name, case in (("examples", mlp_case()), ("tokens", text)):
        study = wf.Study(
            tmp_path / name, case.model, case.task, train=case.train, history=recorded(case, tmp_path / name)
        )
        scores = study.score(case.queries, wf.Dot(adam=True, solver=wf.ConjugateGradients(1)))
        damping[name] = float(scores.fingerprint["damping"]) * (7 * 0.1 + 5 * 0.02)
    assert damping["examples"] == pytest.approx(1)
    tokens = [len(each["input_ids"]) - each.get("prompt_length", 1) for each in sequences]
    assert sum(tokens) < sum(len(each["input_ids"]) - 1 for each in sequences)
    assert damping["tokens"] == pytest.approx(sum(tokens) / len(tokens))
    (said,) = (each for each in caplog.messages if each.startswith("loss_scale="))
    assert f"an example has {sum(tokens) / len(tokens):.1f}" in said


@pytest.mark.parametrize(
    "method", [wf.Dot(adam=True), wf.TracIn(), wf.Source(segments=1)], ids=["adam", "tracin", "source"]
)
def test_a_history_of_another_model_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: wf.Method
) -> None:
    case = mlp_case()
    history = recorded(case, tmp_path)
    said = f"ends with {history[-1].path}, whose weights are not those of the model (first.bias for one)"
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train, history=history)
    before = study.score(case.queries, method)
    assert said not in caplog.text
    with torch.no_grad():
        case.model.get_parameter("first.bias").add_(1.0)
    after = study.score(case.queries, method)
    assert caplog.text.count(said) == 1
    if not isinstance(method, wf.Dot):  # which are about the history alone
        assert torch.equal(after.values, before.values)


def test_without_a_damping_each_layer_has_that_of_its_factors(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    added = {name: 0.1 * float(values.mean()) for name, values in study.fit().eigenvalues.items()}
    expected = dense_scores(case, study, label_rows, added)
    assert relative_error(study.score(case.queries, wf.EKFAC(solver=EXACT)).values, expected) < 1e-8
    with pytest.raises(InputError, match=r"damping=None with a solver: layer 'first' would have none"):
        study.score(case.queries, wf.Dot(solver=EXACT))


def test_in_adams_coordinates_a_damping_has_to_follow_from_something(tmp_path: Path) -> None:
    case = mlp_case()
    history = recorded(case, tmp_path)
    paths: list[Path | RecordedCheckpoint] = [history[0].path, history[1]]
    partly = wf.Study(tmp_path / "partly", case.model, case.task, train=case.train, history=paths)
    with pytest.raises(InputError, match=r"damping=None with the checkpoint .*says nothing of learning rates"):
        partly.score(case.queries, wf.Shampoo(adam=True, solver=EXACT, loss_scale=1.0))
    with pytest.raises(InputError, match="loss_scale=0"):
        wf.Shampoo(loss_scale=0.0)
    for unused in ({"adam": True}, {"solver": EXACT}, {"adam": True, "solver": EXACT, "damping": 0.1}):
        with pytest.raises(InputError, match=r"loss_scale=2\.0 says which damping a solver has"):
            wf.Shampoo(loss_scale=2.0, **unused)


# Embeddings of positions and of tokens, normalisations, and a head that is tied to the embedding.
LAYERS = {
    "mlp": None,
    "tied": ["lm_head", "transformer.wpe", "transformer.ln_f", "transformer.h.0.mlp.c_fc"],
    "embedding": ["transformer.wte", "transformer.wpe", "transformer.h.0.ln_1", "transformer.h.0.mlp.c_fc"],
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strategy", ["shampoo", "identity"])
def test_in_an_optimizers_coordinates_the_damping_is_divided_by_its_preconditioner(
    tmp_path: Path, name: str, strategy: str
) -> None:
    case, logits, layers = mlp_case(), label_rows, LAYERS[name]
    if layers is not None:
        case, logits = gpt2_case(), token_logits
        case = Case(case.model, wf.CausalLM(layers), case.train, case.queries)
    conditioning = numbers(case.model)
    study = study_of(case, tmp_path)
    matrices = BruteForce(case.model, case.task, list(study.layers), [], [])
    added = {name: 0.3 / matrices.matrix(name, conditioning) for name in study.layers}
    expected = dense_scores(case, study, logits, added)
    method = factored(strategy, conditioning=conditioning, solver=EXACT, damping=0.3)
    found = study.score(case.queries, method)
    assert relative_error(found.values, expected) < 1e-8
    top = study.score(case.queries, method, keep=wf.Top(2))
    assert relative_error(top.values.max(1).values, expected.max(1).values) < 1e-8
    total = study.score(case.queries, method, keep=wf.Aggregated(queries="sum"))
    assert relative_error(total.values[0], expected.sum(0)) < 1e-8


def test_an_embedding_that_learns_nothing_of_padding_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3)).double()
    examples: list[object] = [(torch.randint(7, (2,)), torch.tensor(1)) for _ in range(4)]
    study = wf.Study(tmp_path, model, wf.Classification(["0", "2"]), train=examples)
    with pytest.raises(LayerError, match=r"Layer '0' is an embedding with padding_idx=0"):
        study.score(examples, wf.EKFAC(solver=EXACT, damping=0.3))


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac"])
def test_any_preconditioner_leads_to_the_same_scores(tmp_path: Path, strategy: str) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    found = study.score(case.queries, factored(strategy, solver=EXACT, damping=0.3))
    expected = dense_scores(case, study, label_rows, dict.fromkeys(study.layers, 0.3))
    assert relative_error(found.values, expected) < 1e-8


def test_other_kinds_of_scores_are_of_the_solutions_too(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    method = wf.EKFAC(solver=EXACT, damping=0.3)
    whole = study.score(case.queries, method, keep=wf.Pairs(layers=True))
    assert relative_error(sum(whole.layers.values(), torch.zeros(())), whole.values) < 1e-12
    total = study.score(case.queries, method, keep=wf.Aggregated(queries="sum"))
    assert relative_error(total.values[0], whole.values.sum(0)) < 1e-8
    top = study.score(case.queries, method, keep=wf.Top(2))
    assert relative_error(top.values.max(1).values, whole.values.max(1).values) < 1e-10


def test_astra_without_noise_converges_and_with_noise_comes_close(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    expected = dense_scores(case, study, label_rows, dict.fromkeys(study.layers, 1.0))
    exact = wf.Astra(iterations=150, batch_size=None, learning_rate=0.5, momentum=0.5, decay=1.0)
    found = study.score(case.queries, wf.EKFAC(solver=exact, damping=1.0))
    assert relative_error(found.values, expected) < 1e-8
    noisy = study.score(case.queries, wf.EKFAC(solver=wf.Astra(batch_size=6), damping=1.0))
    begun = study.score(case.queries, wf.EKFAC(damping=1.0))  # where it starts
    distances = [float((each.values - expected).norm() / expected.norm()) for each in (noisy, begun)]
    assert 1e-8 < distances[0] < 0.25 * distances[1]


def test_the_first_iteration_is_the_filters_own_answer(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    first = study.score(case.queries, wf.EKFAC(solver=wf.ConjugateGradients(1), damping=0.1)).values
    plain = study.score(case.queries, wf.EKFAC(damping=0.1)).values
    assert relative_error(first / first.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True)) < 1e-10


def test_each_query_is_solved_as_if_it_were_alone(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    system = system_of(study, case, 0.1, factors=study.fit(wf.EKFAC()))
    gradients = torch.randn(4, sum(system.space.sizes.values()), dtype=torch.float64)
    gradients[1] *= 1e-6
    gradients[2] = 0
    solver = wf.ConjugateGradients(200, 1e-9)
    together = solver.solve(system, gradients)
    assert together.vectors[2].count_nonzero() == 0 and together.accuracy["residuals"].max() <= 1e-9
    for row in (0, 1, 3):
        alone = solver.solve(system, gradients[row : row + 1])
        assert relative_error(together.vectors[row], alone.vectors[0]) < 1e-7


def test_blocks_make_the_best_of_the_directions_of_all_of_their_queries() -> None:
    """Against the minimum over the block's Krylov space, by dense algebra; the last block is a smaller one."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix, inverse = root @ root.T / 40 + 0.1 * torch.eye(40), torch.rand(40, generator=generator).double() + 0.5
    gradients = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    gradients[1] = 2 * gradients[0]  # a direction of another's

    class Dense:
        examples = 1
        damping = 0.1 * torch.ones(40, dtype=torch.float64)

        def product(self, vectors: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
            return vectors @ matrix

        def precondition(self, vectors: Tensor) -> Tensor:
            return vectors * inverse

    for iterations in (1, 2, 4):
        found = wf.ConjugateGradients(iterations, 0, block_size=3).solve(Dense(), gradients)
        for block in (gradients[:3], gradients[3:]):
            space = [inverse * block]
            for _ in range(iterations - 1):
                space.append(inverse * (space[-1] @ matrix))
            basis = torch.linalg.svd(torch.cat(space).T, full_matrices=False)
            span = basis.U[:, 1e-9 * basis.S[0] < basis.S]
            best = block @ span @ torch.linalg.solve(span.T @ matrix @ span, span.T)
            at = 0 if len(block) == 3 else 3
            assert relative_error(found.vectors[at : at + len(block)], best) < 1e-8
    solved = wf.ConjugateGradients(100, 1e-11, block_size=3).solve(Dense(), gradients)
    assert relative_error(solved.vectors, torch.linalg.solve(matrix, gradients.T).T) < 1e-9


def test_blocks_stay_together_whatever_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    method = wf.EKFAC(solver=wf.ConjugateGradients(2, 0, block_size=2), damping=0.1)
    expected = study_of(case, tmp_path / "whole").score(case.queries, method).values
    for block in (1, 3):
        with monkeypatch.context() as patched:
            patched.setattr("wherefrom.scoring.scoring.plan_scores", lambda job, block=block: replace(
                plan_scores(job), block=block))  # fmt: skip
            study = study_of(case, tmp_path / str(block))
            assert study.plan(case.queries, method).block == block
            assert relative_error(study.score(case.queries, method).values, expected) < 1e-12
    alone = replace(method, solver=wf.ConjugateGradients(2, 0))
    study = study_of(case, tmp_path / "alone")
    scores = study.score(case.queries, alone)
    assert scores.residuals is not None
    together = study.score(case.queries, method).residuals
    assert together is not None and together.mean() < scores.residuals.mean()


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
        system = system_of(study, case, 0.01, factors=study.fit(factored(strategy)))
        counts[strategy] = solver.solve(system, gradients).iterations
    assert counts["ekfac"] < 0.5 * counts["identity"]


def test_part_of_the_examples_is_drawn_by_the_seed(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    solvers = {
        "one": wf.ConjugateGradients(100, 1e-10, examples=6, seed=0),
        "same": wf.ConjugateGradients(100, 1e-10, examples=6, seed=0),
        "other": wf.ConjugateGradients(100, 1e-10, examples=6, seed=1),
        "all": wf.ConjugateGradients(100, 1e-10, examples=12),
        "whole": wf.ConjugateGradients(100, 1e-10),
    }
    found = {
        name: study.score(case.queries, wf.EKFAC(solver=solver, damping=1.0), name=name).values
        for name, solver in solvers.items()
    }
    assert torch.equal(found["one"], found["same"]) and torch.equal(found["all"], found["whole"])
    assert relative_error(found["other"], found["one"]) > 1e-3
    assert relative_error(found["one"], found["all"]) > 1e-3


def test_scores_are_kept_under_the_solvers_name_and_reused(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    three, four = (wf.EKFAC(solver=wf.ConjugateGradients(iterations), damping=0.1) for iterations in (3, 4))
    found = study.score(case.queries, three)
    assert (
        found.fingerprint["solver"].startswith("ConjugateGradients(") and "iterations=3" in found.fingerprint["solver"]
    )
    assert labels(tmp_path / "scores") == ["ekfac-cg"]
    assert torch.equal(study.score(case.queries, three).values, found.values)
    with pytest.raises(MismatchError, match="solver: stored .*iterations=3.* now .*iterations=4"):
        study.score(case.queries, four, name=found.name)
    study.score(case.queries, four)
    assert labels(tmp_path / "scores") == ["ekfac-cg", "ekfac-cg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": wf.Astra(), "query_rank": 2}, "query_rank=2 with a solver"),
        ({"solver": wf.Astra(), "damping": 0.0}, "damping=0 with a solver"),
        ({"solver": "cg"}, r"solver='cg': expected GradientFlow\(...\)"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        wf.EKFAC(**options)


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


def test_rates_at_which_astra_diverges_are_refused(tmp_path: Path) -> None:
    """The largest eigenvalue of P (H + D) decides, by a dense decomposition."""
    case = mlp_case()
    study = study_of(case, tmp_path)
    system = system_of(study, case, 0.1, factors=study.fit(wf.EKFAC()))
    matrix = dense(case, study, label_rows)
    matrix = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    largest = float(torch.linalg.eigvals(system.precondition(matrix)).abs().max())
    limit, gradients = 2 * 1.9 / largest, torch.randn(2, len(matrix)).double()
    stable, unstable = (wf.Astra(400, None, factor * limit, decay=1.0) for factor in (0.9, 1.3))
    assert float(stable.solve(system, gradients).accuracy["residuals"].max()) < 1e-3
    with pytest.raises(LossError, match=r"Astra: the iterations diverge with learning_rate="):
        unstable.solve(system, gradients)
    found = wf.Astra(400, None, decay=1.0).solve(system, gradients)
    assert float(found.accuracy["residuals"].max()) < 1e-3
    with pytest.raises(LossError, match=r"learning_rate=50.0"):
        study.score(case.queries, wf.EKFAC(solver=wf.Astra(learning_rate=50.0), damping=0.1))
    assert not list((tmp_path / "scores").glob("*/manifest.json"))


def test_divergence_is_an_error_and_nothing_is_stored(tmp_path: Path) -> None:
    """Of batches of one, where the rate is held against the only example that allows it."""
    generator = torch.Generator().manual_seed(0)
    inputs = 30 * torch.randn(12, 4, generator=generator).double()
    inputs[int(torch.randint(12, (1,), generator=torch.Generator().manual_seed(0)))] = 0
    train: list[object] = [(each, each[:1]) for each in inputs]
    study = wf.Study(tmp_path, nn.Linear(4, 1).double(), wf.Regression(), train=train)
    solver = wf.Astra(200, batch_size=1, learning_rate=0.9, momentum=0.0, decay=1.0, seed=0)
    with pytest.raises(LossError, match=r"Astra: the iterations diverge.* smaller learning_rate"):
        study.score(train[:1], wf.Dot(solver=solver, damping=1.0))
    assert not list((tmp_path / "scores").glob("*/manifest.json"))


def exact_residuals(study: wf.Study[object], case: Case, solver: Solver, damping: float) -> Tensor:
    """|g - (H + D) x| / |g| of each query, with a dense H and the solver's own x."""
    matrix = dense(case, study, label_rows)
    matrix = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, case.queries)
    gradients = brute.vectors(brute.queries)
    system = system_of(study, case, damping, factors=study.fit(wf.EKFAC()))
    found = solver.solve(system, gradients).vectors
    residuals: Tensor = (gradients - found @ matrix).norm(dim=1) / gradients.norm(dim=1)
    return residuals.detach()


@pytest.mark.parametrize(
    "solver", [wf.ConjugateGradients(3), wf.Astra(20, batch_size=4, learning_rate=0.05)], ids=["cg", "astra"]
)
def test_final_residuals_are_those_of_all_examples_and_part_of_every_result(
    tmp_path: Path, solver: Solver, caplog: pytest.LogCaptureFixture
) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    method = wf.EKFAC(solver=solver, damping=0.003)
    expected = exact_residuals(study, case, solver, 0.003)
    assert expected.max() > MOST_RESIDUAL
    with caplog.at_level(logging.WARNING, "wherefrom"):
        found = study.score(case.queries, method)
    assert found.residuals is not None
    assert relative_error(found.residuals, expected) < 1e-6
    assert str(solver) in caplog.text
    assert "has not converged" in caplog.text and "Give more iterations" in caplog.text
    # Conjugate gradients know that scores still move; a residual below 1 says nothing of the damping.
    assert ("larger damping than 0.003" in caplog.text) == isinstance(solver, wf.Astra)
    caplog.clear()
    execution = wf.Execution(memory_budget=1e-9)  # one query at a time
    small = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    again = small.score(case.queries, method)
    stored = Scores.load(tmp_path / "scores" / f"ekfac-{solver.label}").residuals
    assert again.residuals is not None and stored is not None
    assert torch.equal(again.residuals, stored)
    assert "has not converged" in caplog.text  # also when they were there
    top = small.score(case.queries, method, keep=wf.Top(2))
    total = small.score(case.queries, method, keep=wf.Aggregated(queries="sum"))
    chosen = torch.arange(3).expand(len(expected), 3)
    candidates = small.score(case.queries, wf.TwoStage(first=chosen, then=method), keep=wf.Top(3))
    for each in (top.residuals, candidates.residuals):
        assert each is not None and relative_error(each, expected) < 1e-6
    assert total.residuals is not None
    assert relative_error(total.residuals, expected.max()[None]) < 1e-6


def test_solves_that_have_converged_are_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    with caplog.at_level(logging.WARNING, "wherefrom"):
        found = study.score(case.queries, wf.EKFAC(solver=EXACT, damping=1.0))
        plain = study.score(case.queries)
    assert found.residuals is not None and float(found.residuals.max()) <= EXACT.tolerance
    assert plain.residuals is None and "converged" not in caplog.text
