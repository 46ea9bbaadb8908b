"""The index of compressed gradients, against brute force and against scores of whole gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wherefrom as wf
from tests.models import CaseMaker, Interrupted, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored, results, with_factors
from wherefrom.methods.projected.index import GradientIndex
from wherefrom.methods.projected.projections import Directions, Quantization, packed, unpacked
from wherefrom.runtime.errors import DamagedError, InputError, MismatchError, StorageError

WHOLE = 99  # more than any side of the small models has
each_case = pytest.mark.parametrize("make_case", [mlp_case, gpt2_case])
each_direction = pytest.mark.parametrize("directions", ["eigenvectors", "random"])


def all_scores(found: wf.TopScores) -> Tensor:
    """Top scores that hold every training example, in the order of the examples."""
    return torch.zeros_like(found.values).scatter_(1, found.train, found.values)


def stored_gradients(index: GradientIndex[Any]) -> Tensor:
    files = sorted(shard_files(index), key=lambda file: int(file.parent.name.split("-")[0]))
    return torch.cat([load_file(file)["gradients"] for file in files])


def shard_files(index: GradientIndex[Any]) -> list[Path]:
    return list(index.path.glob("[0-9]*/tensors.safetensors"))


@each_case
@each_direction
def test_stored_gradients_are_projected(make_case: CaseMaker, directions: Directions, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    index = study.index(wf.EKFAC(), wf.Compression(directions=directions, rank=3, quantization="float32"))
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, [])
    expected = torch.stack(
        [
            torch.cat(
                [(p.left.T @ example[name] @ p.right).flatten() for name, p in index.gradients.projections.items()]
            )
            for example in brute.train
        ]
    )
    assert relative_error(stored_gradients(index), expected) < 1e-12
    for projection in index.gradients.projections.values():
        for side in projection:
            assert relative_error(side.T @ side, torch.eye(side.shape[1], dtype=torch.float64)) < 1e-12
    if directions == "eigenvectors":  # the leading ones: no direction of the same rank has more of the covariance
        for name, basis in factors.bases.items():
            assert basis.activations is not None
            values = basis.activation_eigenvalues.sort(descending=True).values[:3]
            covariance = basis.activations @ basis.activation_eigenvalues.diag() @ basis.activations.T
            right = index.gradients.projections[name].right
            assert relative_error((right.T @ covariance @ right).diagonal(), values) < 1e-9


@each_case
@pytest.mark.parametrize(
    ("directions", "strategy"),
    [
        ("eigenvectors", "kfac"),
        ("eigenvectors", "ekfac"),
        ("random", "identity"),
        ("random", "diagonal"),
        ("random", "kfac"),
        ("random", "ekfac"),
    ],
)
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_at_full_rank_scores_are_those_of_whole_gradients(
    make_case: CaseMaker, directions: Directions, strategy: str, damping: float | None, tmp_path: Path
) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    compression = wf.Compression(directions=directions, rank=WHOLE, quantization="float32")
    index = study.index(factored(strategy), compression)
    found = index.query(case.queries, k=len(case.train), damping=damping)
    expected = study.score(case.queries, factored(strategy, damping=damping)).values
    assert relative_error(all_scores(found), expected) < 1e-9
    assert torch.equal(found.lowest_train, found.train.flip(1))


def test_batches_and_shards_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    compression = wf.Compression(rank=2, quantization="float32")
    whole = study.index(wf.EKFAC(), compression)
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._SHARD_BYTES", 5 * whole.gradients.size * 8)
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._BLOCK_BYTES", 2 * whole.gradients.size * 8)
    parts = study.index(wf.EKFAC(), compression, name="parts", execution=wf.Execution(train_batch_size=3))
    assert len(shard_files(parts)) == 3
    assert relative_error(stored_gradients(parts), stored_gradients(whole)) < 1e-12
    one, other = (index.query(case.queries, k=4) for index in (whole, parts))
    assert torch.equal(one.train, other.train)
    assert relative_error(other.values, one.values) < 1e-12
    assert torch.equal(one.lowest_train, other.lowest_train)


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_an_interrupted_build_goes_on_to_the_same_bits(
    quantization: Quantization, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case(torch.float32)
    task = Interrupted(["transformer.h.*"])
    compression = wf.Compression(rank=3, quantization=quantization)
    # Shards of six examples of eight layers.
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._SHARD_BYTES", 6 * 8 * 9 * 4)
    execution = wf.Execution(train_batch_size=2, checkpoint_seconds=0)
    one, other = (
        wf.Study(tmp_path / name, case.model, task, train=case.train, execution=execution) for name in ("one", "other")
    )
    method = with_factors(one.fit(wf.EKFAC()))
    expected = one.index(method, compression)
    for allowed in (1, 2, 3):  # stops in the first shard, then in the second, then at its end
        task._left = allowed
        with pytest.raises(KeyboardInterrupt):
            other.index(method, compression)
    task._left = 10**9
    found = other.index(method, compression)
    tensors, wanted = results(found.path), results(expected.path)
    assert tensors.keys() == wanted.keys()
    assert len(shard_files(found)) == 3
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)
    assert not list(found.path.glob("*partial*"))


def test_what_was_made_from_something_else_is_refused(tmp_path: Path) -> None:
    case, other = gpt2_case(torch.float32), gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    leading = wf.Compression(directions="eigenvectors", rank=2)
    study.index(wf.EKFAC(), leading, name="mine")
    with pytest.raises(MismatchError, match="rank: stored 2, now 3"):
        study.index(wf.EKFAC(), replace(leading, rank=3), name="mine")
    with torch.no_grad():
        next(other.model.parameters()).mul_(2)
    changed = wf.Study(tmp_path, other.model, case.task, train=case.train)
    with pytest.raises(MismatchError, match="model: stored"):
        changed.index(with_factors(study.fit(wf.EKFAC())), leading, name="mine")
    with pytest.raises(MismatchError, match="model: stored"):
        changed.index(wf.EKFAC(), leading, name="mine")
    # Factors of the same kind whose eigenvectors point elsewhere, as a fit on other targets gives.
    with pytest.raises(MismatchError, match="directions: stored eigenvectors"):
        study.index(wf.EKFAC(seed=1), leading, name="mine")
    replaced = study.index(wf.EKFAC(seed=1), leading, name="mine", overwrite=True)
    assert replaced.query(case.queries, k=1).train.shape == (5, 1)
    longer = wf.Study(tmp_path, case.model, case.task, train=case.train * 2)
    with pytest.raises(MismatchError, match="training data: stored 14 examples"):
        longer.index(with_factors(study.fit(wf.EKFAC(seed=1))), leading, name="mine")


@pytest.mark.parametrize("damaged", ["[0-9]*", "projections"])
def test_damaged_files_are_refused(damaged: str, tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    file = next(study.index(wf.Dot()).path.glob(f"{damaged}/tensors.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{file.parent.name}.*has changed"):
        study.index(wf.Dot()).query(case.queries)


def test_an_index_that_is_there_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.index(wf.Dot(), wf.Compression(rank=2)).query(case.queries)
    monkeypatch.setattr("wherefrom.store.space.free_space", lambda folder: 0)
    again = study.index(wf.Dot(), wf.Compression(rank=2)).query(case.queries)
    assert torch.equal(again.values, expected.values)
    with pytest.raises(StorageError, match="Not enough space for compressed gradients"):
        study.index(wf.Dot(), wf.Compression(rank=2), name="other")


def test_what_changes_under_an_open_index_is_refused(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    first, second = (wf.Compression(rank=2, seed=seed) for seed in (0, 1))
    index = study.index(wf.Dot(), first, name="mine")
    study.index(wf.Dot(), second, name="mine", overwrite=True)  # gradients of the same size
    with pytest.raises(MismatchError, match="directions: stored random, seed 1, now random, seed 0"):
        index.query(case.queries)
    index = study.index(wf.Dot(), second, name="mine")
    before = index.query(case.queries)
    weight = next(case.model.parameters())
    for writable in (weight.detach(), weight.data):  # writing to the latter counts as no new version
        writable.mul_(2)
        with pytest.raises(MismatchError, match="weights have changed"):
            index.query(case.queries)
        writable.div_(2)
        assert torch.equal(index.query(case.queries).values, before.values)


def test_a_step_of_a_fused_optimizer_is_a_change(tmp_path: Path) -> None:
    """It writes to weights without counting it as a new version of theirs."""
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    index = study.index(wf.Dot(), wf.Compression(rank=2))
    index.query(case.queries)
    parameters = list(case.model.parameters())
    for each in parameters:
        each.grad = torch.ones_like(each)
    torch.optim.AdamW(parameters, fused=True).step()
    with pytest.raises(MismatchError, match="weights have changed"):
        index.query(case.queries)


def test_answers_say_which_factors_they_are_of(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = [study.index(wf.EKFAC(seed=seed)).query(case.queries, k=3).fingerprint for seed in (0, 1)]
    assert [each["targets"] for each in found] == ["sampled, seed 0", "sampled, seed 1"]
    whole = study.score(case.queries, wf.EKFAC(), keep=wf.Top(3)).fingerprint
    assert whole.items() <= found[0].items()  # and what the index adds


def test_random_directions_serve_any_factors(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    compression = wf.Compression(rank=WHOLE, quantization="float32")
    found = [study.index(method, compression).query(case.queries, k=3) for method in (wf.EKFAC(), wf.Dot())]
    assert [each.method for each in found] == ["ekfac", "dot"]
    assert len(list((tmp_path / "index").iterdir())) == 1
    assert not torch.equal(found[0].values, found[1].values)


def test_without_curvature_random_directions_are_unbiased(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    total, count = torch.zeros(()), 200
    for seed in range(count):
        index = study.index(wf.Dot(), wf.Compression(rank=2, quantization="float32", seed=seed))
        total = total + all_scores(index.query(case.queries, k=len(case.train)))
    expected = study.score(case.queries, wf.Dot()).values
    assert relative_error(total / count, expected) < 0.3  # one alone is off by more than this


@pytest.mark.parametrize("quantization", ["bfloat16", "int8"])
def test_fewer_bits_are_off_by_their_rounding(quantization: Quantization, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 10) * torch.logspace(-6, 6, 7).unsqueeze(1)
    rows[3] = 0
    parts = {"one": slice(0, 4), "other": slice(4, 10)}
    stored = packed(rows, quantization, parts)
    error = (unpacked(stored, torch.float32, parts) - rows).abs()
    if quantization == "bfloat16":
        assert bool((error <= rows.abs() * 2.0**-8).all())
    else:
        for part in parts.values():
            half_step = rows[:, part].abs().amax(1, keepdim=True) / 127 / 2
            assert bool((error[:, part] <= half_step * (1 + 1e-5)).all())
    assert bool((error[3] == 0).all())
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    few = study.index(wf.EKFAC(), wf.Compression(rank=4, quantization=quantization))
    many = study.index(wf.EKFAC(), wf.Compression(rank=4, quantization="float32"))
    one, other = (all_scores(each.query(case.queries, k=len(case.train))) for each in (few, many))
    assert 0 < relative_error(one, other) < 0.02
    assert few.bytes_per_example * (2 if quantization == "bfloat16" else 3) <= many.bytes_per_example
    kept = {name: each for name, each in results(few.path).items() if not name.startswith("projections")}
    taken = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert taken == few.bytes_per_example * len(few)


def test_reranked_scores_are_exact(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, wf.EKFAC(), keep=wf.Top(10))
    index = study.index(wf.EKFAC(), wf.Compression(rank=1))
    plain = index.query(case.queries, k=10)
    assert not torch.equal(plain.train, expected.train)
    before = results(tmp_path)
    found = index.query(case.queries, k=10, rerank=len(case.train))
    assert torch.equal(found.train, expected.train)  # recall of 1
    assert torch.equal(found.lowest_train, expected.lowest_train)
    assert relative_error(found.values, expected.values) < 1e-12
    assert relative_error(found.lowest_values, expected.lowest_values) < 1e-12
    assert results(tmp_path).keys() == before.keys()
    few = index.query(case.queries, k=2, rerank=5)
    whole = study.score(case.queries, wf.EKFAC()).values
    assert relative_error(few.values, whole.gather(1, few.train)) < 1e-12
    candidates = index.query(case.queries, k=5)
    best = whole.gather(1, candidates.train).topk(2).values
    assert relative_error(few.values, best) < 1e-12


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"directions": "best"}, "directions='best': expected one of eigenvectors, random"),
        ({"quantization": "int4"}, "quantization='int4': expected one of float32, bfloat16, int8"),
    ]
    for fields, message in wrong:
        with pytest.raises(InputError, match=message):
            wf.Compression(**fields)
    with pytest.raises(InputError, match="name="):
        study.index(wf.EKFAC(), name="../up")
    for method in (wf.EKFAC(query_rank=2), wf.EKFAC(solver=wf.ConjugateGradients())):
        with pytest.raises(InputError, match="it compresses gradients itself"):
            study.index(method)
    with pytest.raises(InputError, match="of 'diagonal' factors, which have none"):
        study.index(wf.Diagonal(), wf.Compression(directions="eigenvectors"))
    assert not (tmp_path / "index").exists()
    index = study.index(wf.EKFAC())
    for query, message in [
        ({"k": 0}, "k=0: expected at least 1"),
        ({"rerank": 3}, "rerank=3 with k=10: expected at least k"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": 0.0}, "damping=0 with random directions"),
        ({"damping": 1e-300}, "damping=1e-300: too small to invert"),
    ]:
        with pytest.raises(InputError, match=message):
            index.query(case.queries, **query)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="queries is empty"):
        index.query([])
