"""LoGra, TRAK and TrackStar against dense projections and dense matrices in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import wherefrom as wf
from tests.models import Case, CaseMaker, Interrupted, Mlp, gpt2, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import results
from wherefrom.methods.projected.projections import Compression, Projection
from wherefrom.runtime.errors import InputError, MismatchError

RANK = 3
each_case = pytest.mark.parametrize("make_case", [mlp_case, gpt2_case])
each_damping = pytest.mark.parametrize("damping", [None, 1e-2])
Gradients = Sequence[Mapping[str, Tensor]]


class Margins(wf.Classification):
    """Measures minus the log-odds of the label."""

    def measurement(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        inputs, labels = batch
        return -_log_odds(model(inputs), labels).sum()


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    chances = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return (chances / (1 - chances)).log()


def margins_case(dtype: torch.dtype = torch.float64) -> Case:
    case = mlp_case(dtype)
    return Case(case.model, Margins(), case.train, case.queries)


def tiny_study(case: Case, path: Path) -> wf.Study[Any]:
    return wf.Study(path, case.model, case.task, train=case.train)


def projections(study: wf.Study[Any], factors: wf.Factors | None = None, seed: int = 0) -> dict[str, Projection]:
    """That they are orthonormal, leading or random is tested with the index."""
    directions: Any = "random" if factors is None else "eigenvectors"
    return Compression(directions=directions, rank=RANK, seed=seed).projections(study.layers, factors)


def projected(gradients: Gradients, found: Mapping[str, Projection]) -> dict[str, Tensor]:
    """By a dense matrix kron(P_S, P_A) on the flattened gradient: [examples, numbers] of each layer."""
    dense = {name: torch.kron(left.contiguous(), right.contiguous()) for name, (left, right) in found.items()}
    return {
        name: torch.stack([each[name].flatten() for each in gradients]).double() @ matrix.double()
        for name, matrix in dense.items()
    }


def damped(matrix: Tensor, damping: float | None) -> Tensor:
    added = 0.1 * matrix.diagonal().mean() if damping is None else damping
    return matrix + added * torch.eye(len(matrix), dtype=torch.float64)


def brute_force(case: Case, study: wf.Study[Any]) -> BruteForce:
    return BruteForce(case.model, case.task, list(study.layers), case.train, case.queries)


def measured(brute: BruteForce, examples: Sequence[object]) -> Gradients:
    return [brute.weight_gradients(each, measured=True) for each in examples]


@each_case
@each_damping
@pytest.mark.parametrize("kind", ["random", "eigenvectors"])
def test_logra(make_case: CaseMaker, damping: float | None, kind: Any, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = tiny_study(case, tmp_path)
    factors = study.fit(wf.KFAC()) if kind == "eigenvectors" else None
    found = study.score(case.queries, wf.LoGra(rank=RANK, damping=damping, directions=kind))
    brute, directions = brute_force(case, study), projections(study, factors)
    train, queries = (projected(each, directions) for each in (brute.train, brute.queries))
    expected = torch.zeros(len(case.queries), len(case.train), dtype=torch.float64)
    for name, rows in train.items():
        fisher = damped(rows.T @ rows / len(rows), damping)
        expected += queries[name] @ torch.linalg.solve(fisher, rows.T)
    assert relative_error(found.values, expected) < 1e-8
    assert found.method == "logra"


def trak_products(brute: BruteForce, case: Case, study: wf.Study[Any], damping: float | None) -> Tensor:
    """phi_q^T (Phi^T Phi + N damping)^-1 phi_t of one model."""
    directions = projections(study)
    outputs, queries = (
        torch.cat(list(projected(measured(brute, each), directions).values()), 1) for each in (case.train, case.queries)
    )
    kernel = damped(outputs.T @ outputs / len(outputs), damping) * len(outputs)
    products: Tensor = queries @ torch.linalg.solve(kernel, outputs.T)
    return products


def unlikelihoods(case: Case) -> Tensor:
    """1 - p of each training example of a classification, [train]."""
    inputs, labels = zip(*case.train, strict=True)
    chances = case.model(torch.stack(inputs)).softmax(-1)
    found: Tensor = 1 - chances.gather(-1, torch.stack(labels)[:, None]).squeeze(-1)
    return found


@each_damping
def test_trak_of_classifications(damping: float | None, tmp_path: Path) -> None:
    case = margins_case()
    study = tiny_study(case, tmp_path)
    found = study.score(case.queries, wf.Trak(rank=RANK, damping=damping))
    products = trak_products(brute_force(case, study), case, study, damping)
    assert relative_error(found.values, products * unlikelihoods(case)) < 1e-8


def test_trak_of_several_models_multiplies_means(tmp_path: Path) -> None:
    case = margins_case()
    study = tiny_study(case, tmp_path / "run")
    before = copy.deepcopy(case.model.state_dict())
    paths, products, weights = [], [], []
    for seed in (3, 4):
        torch.manual_seed(seed)
        other = Case(Mlp().double(), case.task, case.train, case.queries)
        paths.append(tmp_path / f"model{seed}.pt")
        torch.save(other.model.state_dict(), paths[-1])
        products.append(trak_products(brute_force(other, study), other, study, 1e-2))
        weights.append(unlikelihoods(other))
    found = study.score(case.queries, wf.Trak(checkpoints=paths, rank=RANK, damping=0.01))
    expected = torch.stack(products).mean(0) * torch.stack(weights).mean(0)
    assert relative_error(found.values, expected) < 1e-8
    assert all(torch.equal(each, before[name]) for name, each in case.model.state_dict().items())
    assert found.fingerprint["models"].count("model") == 2
    with pytest.raises(MismatchError, match="models: stored"):
        study.score(case.queries, wf.Trak(checkpoints=paths[:1], rank=RANK, damping=0.01), name=found.name)


def test_trak_of_sequences_has_the_least_squares_weight(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    case = Case(case.model, wf.CausalLM(["transformer.h.*"], measure="margin"), case.train, case.queries)
    study = tiny_study(case, tmp_path)
    found = study.score(case.queries, wf.Trak(rank=RANK, damping=0.01))
    brute, directions = brute_force(case, study), projections(study)
    outputs = torch.cat(list(projected(measured(brute, case.train), directions).values()), 1)
    losses = torch.cat(list(projected(brute.train, directions).values()), 1)
    fits = [torch.linalg.lstsq(o[:, None], each[:, None]).solution for o, each in zip(outputs, losses, strict=True)]
    weights = torch.stack(fits).flatten()
    assert relative_error(found.values, trak_products(brute, case, study, 1e-2) * weights) < 1e-8


def conditioning(case: Case, study: wf.Study[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random numbers by parameter, and the same laid out as each layer's gradient."""
    generator = torch.Generator().manual_seed(6)
    given = {
        name: torch.rand(each.shape, generator=generator, dtype=torch.float64) + 0.1
        for name, each in case.model.named_parameters()
    }
    of_weights = {id(each): given[name] for name, each in case.model.named_parameters()}
    factors = {}
    for name, layer in study.layers.items():
        factors[name] = layer.to_matrices(*(of_weights[id(each.parameter)][None] for each in layer.parts))[0]
    return given, factors


@each_case
@pytest.mark.parametrize(("mixing", "damping", "divided"), [(0.9, None, True), (0.3, 1e-2, True), (0.9, None, False)])
def test_trackstar(make_case: CaseMaker, mixing: float, damping: float | None, divided: bool, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = tiny_study(case, tmp_path)
    given, factors = conditioning(case, study)
    method = wf.TrackStar(conditioning=given if divided else None, mixing=mixing, rank=RANK, damping=damping)
    found = study.score(case.queries, method)
    brute, directions = brute_force(case, study), projections(study)

    def rows(gradients: Gradients) -> dict[str, Tensor]:
        if divided:
            gradients = [{name: each * factors[name] for name, each in one.items()} for one in gradients]
        return projected(gradients, directions)

    train, queries = rows(brute.train), rows(brute.queries)
    sides: dict[str, list[Tensor]] = {"queries": [], "train": []}
    for name, each in train.items():
        queried = queries[name]
        mixed = damped(mixing * queried.T @ queried / len(queried) + (1 - mixing) * each.T @ each / len(each), damping)
        values, vectors = torch.linalg.eigh(mixed)
        root = vectors @ (values**-0.5).diag() @ vectors.T
        sides["queries"].append(queried @ root)
        sides["train"].append(each @ root)
    expected = functional.cosine_similarity(
        torch.cat(sides["queries"], 1)[:, None], torch.cat(sides["train"], 1)[None], dim=2
    )
    assert relative_error(found.values, expected) < 1e-8
    assert float(found.values.abs().max()) <= 1 + 1e-12


METHODS = (wf.LoGra, wf.Trak, wf.TrackStar)
each_method = pytest.mark.parametrize("kind", METHODS, ids=[each.name for each in METHODS])


@each_method
def test_batches_shards_and_blocks_change_nothing_but_rounding(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case(torch.float64)
    study = tiny_study(case, tmp_path)
    whole = study.score(case.queries, kind(rank=RANK))
    row = len(study.layers) * RANK**2 * 8
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._SHARD_BYTES", 5 * row)
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._BLOCK_BYTES", 2 * row)
    parts = study.score(case.queries, kind(rank=RANK), name="parts", execution=wf.Execution(train_batch_size=3))
    assert relative_error(parts.values, whole.values) < 1e-9


@each_method
def test_an_interrupted_call_goes_on_to_the_same_bits(kind: Any, tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    task = Interrupted(["transformer.h.*"])
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=2)
    one, other = (
        wf.Study(tmp_path / name, case.model, task, train=case.train, execution=execution) for name in ("one", "other")
    )
    expected = one.score(case.queries, kind(rank=RANK))
    for allowed in (2, 4, 3):
        task._left = allowed
        with pytest.raises(KeyboardInterrupt):
            other.score(case.queries, kind(rank=RANK))
    task._left = 10**9
    found = other.score(case.queries, kind(rank=RANK))
    assert torch.equal(found.values, expected.values)
    assert results(tmp_path / "other").keys() - {f"scores/{found.name}/rise_per_score"} == {
        f"scores/{found.name}/values"
    }  # nothing is left beside them
    task._left = 0
    again = other.score(case.queries, kind(rank=RANK))  # loaded: no pass
    assert torch.equal(again.values, expected.values)


@each_method
def test_another_rank_is_another_result(kind: Any, tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = tiny_study(case, tmp_path)
    first = study.score(case.queries, kind(rank=2), name="mine")
    with pytest.raises(MismatchError, match="rank: stored 2, now 3"):
        study.score(case.queries, kind(rank=3), name="mine")
    replaced = study.score(case.queries, kind(rank=3), name="mine", overwrite=True)
    assert not torch.equal(replaced.values, first.values)


@each_method
def test_without_enough_examples_no_damping_is_refused(kind: Any, tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = tiny_study(case, tmp_path)
    with pytest.raises(InputError, match="damping=0: too small to invert the projected curvature"):
        study.score(case.queries, kind(rank=5, damping=0.0))
    assert not list((tmp_path / "scores").glob(f"{kind.name}-????????/manifest.json"))


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = tiny_study(case, tmp_path)
    for kind in METHODS:
        with pytest.raises(InputError, match="rank=0"):
            kind(rank=0)
        with pytest.raises(InputError, match=r"damping=-1\.0"):
            kind(damping=-1.0)
        with pytest.raises(InputError, match="name='a.blocks'"):
            study.score(case.queries, kind(), name="a.blocks")
        with pytest.raises(InputError, match="queries is empty"):
            study.score([], kind())
    diagonal = wf.LoGra(factors=study.fit(wf.Diagonal()), directions="eigenvectors")
    with pytest.raises(InputError, match="of 'diagonal' factors"):
        study.score(case.queries, diagonal)
    constant = {name: torch.ones_like(each) for name, each in case.model.named_parameters()}
    conditioned = wf.LoGra(factors=study.fit(wf.Shampoo(conditioning=constant)), directions="eigenvectors")
    with pytest.raises(InputError, match="factors are conditioned"):
        study.score(case.queries, conditioned)
    with pytest.raises(InputError, match=r"mixing=1\.5"):
        wf.TrackStar(mixing=1.5)
    with pytest.raises(InputError, match="conditioning: has nothing for"):
        study.score(case.queries, wf.TrackStar(conditioning={"elsewhere": torch.ones(5, 5)}))
    assert not (tmp_path / "scores").exists()


def test_a_model_with_an_embedding_is_conditioned_column_by_column(tmp_path: Path) -> None:
    """One-hot layers hold only some columns of a gradient."""
    model = gpt2(torch.float64)
    case = Case(model, wf.CausalLM(["transformer.wte", "transformer.h.0.*"]), gpt2_case().train, gpt2_case().queries)
    study = tiny_study(case, tmp_path)
    given, factors = conditioning(case, study)
    found = study.score(case.queries, wf.TrackStar(conditioning=given, rank=RANK))
    brute, directions = brute_force(case, study), projections(study)
    sides = []
    curvature: dict[str, Tensor] = {}
    for weight, gradients in ((0.9, brute.queries), (0.1, brute.train)):
        divided = [{name: each * factors[name] for name, each in one.items()} for one in gradients]
        sides.append(projected(divided, directions))
        for name, each in sides[-1].items():
            curvature[name] = curvature.get(name, 0) + weight * each.T @ each / len(each)
    joined = []
    for side in sides:
        parts = []
        for name, each in side.items():
            values, vectors = torch.linalg.eigh(damped(curvature[name], None))
            parts.append(each @ vectors @ (values**-0.5).diag())
        joined.append(functional.normalize(torch.cat(parts, 1), dim=1))
    assert relative_error(found.values, joined[0] @ joined[1].T) < 1e-8
