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
from wherefrom.methods.projected.projections import packed, unpacked
from wherefrom.runtime.errors import DamagedError, InputError, MismatchError, StorageError

WHOLE = 99  # more than any side of the small models has
each_case = pytest.mark.parametrize("make_case", [mlp_case, gpt2_case])
each_direction = pytest.mark.parametrize("directions", ["eigenvectors", "random"])


def all_scores(found: wf.TopScores) -> Tensor:
    """Top scores that hold every training example, in the order of the examples."""
    return torch.zeros_like(found.values).scatter_(1, found.train, found.values)


def stored_rows(index: GradientIndex[Any]) -> Tensor:
    files = sorted(shard_files(index), key=lambda file: int(file.parent.name.split("-")[0]))
    return torch.cat([load_file(file)["rows"] for file in files])


def shard_files(index: GradientIndex[Any]) -> list[Path]:
    return list(index.path.glob("[0-9]*/tensors.safetensors"))


@each_case
@each_direction
def test_rows_are_projected_gradients(make_case: CaseMaker, directions: str, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    index = study.index(with_factors(factors), wf.Compression(directions=directions, rank=3, quantization="float32"))  # type: ignore[arg-type]
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, [])
    expected = torch.stack(
        [
            torch.cat([(p.left.T @ example[name] @ p.right).flatten() for name, p in index.rows.projections.items()])
            for example in brute.train
        ]
    )
    assert relative_error(stored_rows(index), expected) < 1e-12
    for projection in index.rows.projections.values():
        for side in projection:
            assert relative_error(side.T @ side, torch.eye(side.shape[1], dtype=torch.float64)) < 1e-12
    if directions == "eigenvectors":  # the leading ones: no direction of the same rank has more of the covariance
        for name, basis in factors.bases.items():
            assert basis.activations is not None
            values = basis.activation_eigenvalues.sort(descending=True).values[:3]
            covariance = basis.activations @ basis.activation_eigenvalues.diag() @ basis.activations.T
            right = index.rows.projections[name].right
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
    make_case: CaseMaker, directions: str, strategy: str, damping: float | None, tmp_path: Path
) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(factored(strategy))
    index = study.index(
        with_factors(factors), wf.Compression(directions=directions, rank=WHOLE, quantization="float32")
    )  # type: ignore[arg-type]
    found = index.query(case.queries, k=len(case.train), damping=damping)
    expected = study.score(case.queries, with_factors(factors, damping=damping)).values
    assert relative_error(all_scores(found), expected) < 1e-9
    assert torch.equal(found.lowest_train, found.train.flip(1))


def test_batches_and_shards_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    whole = study.index(with_factors(factors), wf.Compression(rank=2, quantization="float32"))
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._SHARD_BYTES", 5 * whole.rows.size * 8)
    monkeypatch.setattr("wherefrom.methods.projected.gradient_store._BLOCK_BYTES", 2 * whole.rows.size * 8)
    parts = study.index(
        with_factors(factors),
        wf.Compression(rank=2, quantization="float32"),
        name="parts",
        execution=replace(study.execution, train_batch_size=3),
    )
    assert len(shard_files(parts)) == 3
    assert relative_error(stored_rows(parts), stored_rows(whole)) < 1e-12
    one, other = (index.query(case.queries, k=4) for index in (whole, parts))
    assert torch.equal(one.train, other.train)
    assert relative_error(other.values, one.values) < 1e-12
    assert torch.equal(one.lowest_train, other.lowest_train)


@pytest.mark.parametrize("numbers", ["float32", "int8"])
def test_an_interrupted_build_goes_on_to_the_same_bits(
    numbers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case(torch.float32)
    task = Interrupted(["transformer.h.*"])
    options: Any = {"rank": 3, "numbers": numbers, "batch_size": 2}
    monkeypatch.setattr(
        "wherefrom.methods.projected.gradient_store._SHARD_BYTES", 6 * 8 * 9 * 4
    )  # six examples of eight layers
    studies = [
        wf.Study(tmp_path / name, case.model, task, train=case.train, execution=wf.Execution(checkpoint_seconds=0))
        for name in ("one", "other")
    ]
    factors = studies[0].fit(wf.EKFAC())
    expected = studies[0].index(factors, **options)
    for allowed in (1, 2, 3):  # stops in the first shard, then in the second, then at its end
        task._left = allowed
        with pytest.raises(KeyboardInterrupt):
            studies[1].index(factors, **options)
    task._left = 10**9
    found = studies[1].index(factors, **options)
    one, other = results(found.path), results(expected.path)
    assert one.keys() == other.keys()
    assert len(shard_files(found)) == 3
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(found.path.glob("*partial*"))


def test_what_was_made_from_something_else_is_refused(tmp_path: Path) -> None:
    case, other = gpt2_case(torch.float32), gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    options: Any = {"directions": "eigenvectors", "name": "mine"}
    study.index(factors, rank=2, **options)
    with pytest.raises(MismatchError, match="rank: stored 2, now 3"):
        study.index(factors, rank=3, **options)
    with torch.no_grad():
        next(other.model.parameters()).mul_(2)
    changed = wf.Study(tmp_path, other.model, case.task, train=case.train)
    with pytest.raises(MismatchError, match="model: stored"):
        changed.index(factors, rank=2, **options)
    refitted = changed.fit(wf.EKFAC(), name="changed")
    with pytest.raises(MismatchError, match="model: stored"):
        changed.index(refitted, rank=2, **options)
    # Factors of the same kind whose eigenvectors point elsewhere, as a fit on other targets gives.
    seeded = study.fit(wf.EKFAC(seed=1), name="seed1")
    with pytest.raises(MismatchError, match="directions: stored eigenvectors"):
        study.index(seeded, rank=2, **options)
    assert study.index(seeded, rank=2, **options, overwrite=True).query(case.queries, k=1).train.shape == (5, 1)
    longer = wf.Study(tmp_path, case.model, case.task, train=case.train * 2)
    with pytest.raises(MismatchError, match="training data: stored 14 examples"):
        longer.index(seeded, rank=2, **options)


@pytest.mark.parametrize("damaged", ["[0-9]*", "projections"])
def test_damaged_files_are_refused(damaged: str, tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.Dot())
    file = next(study.index(with_factors(factors)).path.glob(f"{damaged}/tensors.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{file.parent.name}.*has changed"):
        study.index(with_factors(factors)).query(case.queries)


def test_an_index_that_is_there_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.Dot())
    expected = study.index(with_factors(factors), wf.Compression(rank=2)).query(case.queries)
    monkeypatch.setattr("wherefrom.store.space.free_space", lambda folder: 0)
    assert torch.equal(
        study.index(with_factors(factors), wf.Compression(rank=2)).query(case.queries).values, expected.values
    )
    with pytest.raises(StorageError, match="Not enough space for compressed gradients"):
        study.index(with_factors(factors), wf.Compression(rank=2), name="other")


def test_what_changes_under_an_open_index_is_refused(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.Dot())
    options: Any = {"rank": 2, "name": "mine"}
    index = study.index(factors, **options)
    study.index(factors, seed=1, **options, overwrite=True)  # rows of the same size
    with pytest.raises(MismatchError, match="directions: stored random, seed 1, now random, seed 0"):
        index.query(case.queries)
    index = study.index(factors, seed=1, **options)
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
    asked: Any = {"queries": case.queries, "k": 3}
    found = [
        study.index(with_factors(study.fit(wf.EKFAC(seed=seed), name=f"seed{seed}"))).query(**asked).fingerprint
        for seed in (0, 1)
    ]
    assert [each["targets"] for each in found] == ["sampled, seed 0", "sampled, seed 1"]
    whole = study.score(case.queries, with_factors(study.fit(wf.EKFAC(), name="seed0")), keep=wf.Top(3)).fingerprint
    assert whole.items() <= found[0].items()  # and what the index adds


def test_random_directions_serve_any_factors(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = [
        study.index(factored(strategy), wf.Compression(directions="random", rank=WHOLE, quantization="float32")).query(
            case.queries, k=3
        )
        for strategy in ("ekfac", "identity")
    ]
    assert [each.strategy for each in found] == ["ekfac", "identity"]
    assert len(list((tmp_path / "index").iterdir())) == 1
    assert not torch.equal(found[0].values, found[1].values)


def test_without_curvature_random_directions_are_unbiased(tmp_path: Path) -> None:
    case = mlp_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors, count = study.fit(wf.Dot()), 200
    total = sum(
        all_scores(
            study.index(
                with_factors(factors),
                wf.Compression(directions="random", rank=2, quantization="float32", seed=seed),
                name=f"seed{seed}",
            ).query(case.queries, k=len(case.train))
        )
        for seed in range(count)
    )
    expected = study.score(case.queries, with_factors(factors)).values
    assert relative_error(torch.as_tensor(total) / count, expected) < 0.3  # one alone is off by more than this


@pytest.mark.parametrize("numbers", ["bfloat16", "int8"])
def test_fewer_bits_are_off_by_their_rounding(numbers: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 10) * torch.logspace(-6, 6, 7).unsqueeze(1)
    rows[3] = 0
    parts = {"one": slice(0, 4), "other": slice(4, 10)}
    stored = packed(rows, numbers, parts)  # type: ignore[arg-type]
    error = (unpacked(stored, torch.float32, parts) - rows).abs()
    if numbers == "bfloat16":
        assert bool((error <= rows.abs() * 2.0**-8).all())
    else:
        for part in parts.values():
            half_step = rows[:, part].abs().amax(1, keepdim=True) / 127 / 2
            assert bool((error[:, part] <= half_step * (1 + 1e-5)).all())
    assert bool((error[3] == 0).all())
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    few = study.index(with_factors(factors), wf.Compression(rank=4, quantization=numbers))  # type: ignore[arg-type]
    many = study.index(with_factors(factors), wf.Compression(rank=4, quantization="float32"))
    one, other = (all_scores(each.query(case.queries, k=len(case.train))) for each in (few, many))
    assert 0 < relative_error(one, other) < 0.02
    assert few.bytes_per_example * (2 if numbers == "bfloat16" else 3) <= many.bytes_per_example
    kept = {name: each for name, each in results(few.path).items() if not name.startswith("projections")}
    taken = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert taken == few.bytes_per_example * len(few)


def test_reranked_scores_are_exact(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors, count = study.fit(wf.EKFAC()), len(case.train)
    expected = study.score(case.queries, with_factors(factors), keep=wf.Top(10))
    index = study.index(with_factors(factors), wf.Compression(rank=1, quantization="int8"))
    plain = index.query(case.queries, k=10)
    assert not torch.equal(plain.train, expected.train)
    before = results(tmp_path)
    found = index.query(case.queries, k=10, rerank=count)
    assert torch.equal(found.train, expected.train)  # recall of 1
    assert torch.equal(found.lowest_train, expected.lowest_train)
    assert relative_error(found.values, expected.values) < 1e-12
    assert relative_error(found.lowest_values, expected.lowest_values) < 1e-12
    assert results(tmp_path).keys() == before.keys()
    few = index.query(case.queries, k=2, rerank=5)
    whole = study.score(case.queries, with_factors(factors)).values
    assert relative_error(few.values, whole.gather(1, few.train)) < 1e-12
    candidates = index.query(case.queries, k=5)
    best = whole.gather(1, candidates.train).topk(2).values
    assert relative_error(few.values, best) < 1e-12


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank=0: expected at least 1"),
        ({"directions": "best"}, "directions='best': expected one of eigenvectors, random"),
        ({"numbers": "int4"}, "numbers='int4': expected one of"),
        ({"ranks": 3}, "ranks=3: expected one of"),
        ({"name": "../up"}, "name="),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            study.index(factors, **options)
    with pytest.raises(InputError, match="of 'diagonal' factors, which have none"):
        study.index(wf.Diagonal(), wf.Compression(directions="eigenvectors"))
    assert not (tmp_path / "index").exists()
    index = study.index(with_factors(factors), wf.Compression(directions="random"))
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
