"""The index of sketched gradients, against dense matrices, brute force and scores of whole gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import wherefrom as wf
from tests.models import CaseMaker, Interrupted, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored, results, with_factors
from wherefrom.curvature.operators import Operator
from wherefrom.engine.modules.layers import select_layers
from wherefrom.methods.index.gradient_index import GradientIndex
from wherefrom.methods.index.search import Search
from wherefrom.methods.index.sketches import Bits, Projector, Sketch
from wherefrom.methods.index.store import Shard
from wherefrom.report.reading import reading
from wherefrom.runtime.errors import DamagedError, InputError, MismatchError, StorageError

WHOLE = wf.Sketch(numbers=2**16, bits=32, focus=0)  # more numbers than the small models have weights
ONE_BY_ONE = wf.Execution(train_batch_size=1)  # the same bits whatever is swept together
each_case = pytest.mark.parametrize("make_case", [mlp_case, gpt2_case])


def all_scores(found: wf.TopScores) -> Tensor:
    """Top scores that hold every training example, in the order of the examples."""
    return torch.zeros_like(found.values).scatter_(1, found.train, found.values)


def stored(index: GradientIndex[Any], name: str = "codes") -> Tensor:
    """What is stored of every training example, in the order of the examples."""
    found = [(shard.positions, shard.tensors[name][slice(None) if shard.examples is None else shard.examples])
             for shard in index.store.shards]  # fmt: skip
    positions, tensors = (torch.cat(each) for each in zip(*found, strict=True))
    return tensors[positions.argsort()]


def shard_files(index: GradientIndex[Any]) -> list[Path]:
    return list(index.path.glob("*/tensors.safetensors"))


def dense_matrix(projector: Projector, layer: str) -> Tensor:
    """The random matrix of a layer, [numbers, weights], from which weight goes where with which sign."""
    signs = projector.factors[layer].sign().flatten()
    matrix = torch.zeros(projector.numbers, len(signs), dtype=torch.float64)
    matrix[projector.counters(layer, torch.arange(len(signs))), torch.arange(len(signs))] = signs.double()
    return matrix


def padded(gradients: Tensor, width: int) -> Tensor:
    return functional.pad(gradients, (0, width - gradients.shape[1]))


@each_case
@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_without_a_sketch_products_are_scores(
    make_case: CaseMaker, strategy: str, damping: float | None, tmp_path: Path
) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = factored(strategy, damping=damping)
    found = study.index(method, WHOLE).query(case.queries, k=len(case.train))
    expected = study.score(case.queries, method).values
    assert relative_error(all_scores(found), expected) < 1e-12
    assert torch.equal(found.lowest_train, found.train.flip(1))


@each_case
def test_a_sketch_is_a_product_with_a_dense_matrix(make_case: CaseMaker, tmp_path: Path) -> None:
    case = make_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(wf.EKFAC())
    index = study.index(wf.EKFAC(), wf.Sketch(numbers=64, bits=32, focus=1.5))
    projector = index.store.projector
    brute = BruteForce(case.model, case.task, list(study.layers), case.train, [])
    expected, norms = torch.zeros(len(case.train), 64, dtype=torch.float64), torch.zeros(len(case.train))
    for name, layer in study.layers.items():
        values = factors.eigenvalues[name]
        damped = values + 0.1 * values.mean()
        matrix, root = dense_matrix(projector, name), (values / damped) ** 0.75 / damped**0.5
        assert bool((matrix.abs().sum(0) <= 1).all())  # directions without curvature have no part
        for number, example in enumerate(brute.train):
            whitened = factors.bases[name].rotate(example[name]) * root
            expected[number] += matrix @ padded(whitened, layer.width).flatten()
            norms[number] += whitened.square().sum().float()
    assert relative_error(stored(index), expected) < 1e-12
    assert relative_error(stored(index, "norms").square(), norms.double()) < 1e-6
    signs = study.index(wf.EKFAC(), wf.Sketch(numbers=64, bits=1, focus=1.5))
    bits = torch.from_numpy(np.unpackbits(stored(signs).numpy(), axis=1, bitorder="little"))
    assert torch.equal(bits.bool(), expected >= 0)


def test_embeddings_are_sketched_by_the_columns_they_touch(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    task = wf.CausalLM(layers=["transformer.wpe", "transformer.h.0.*"])
    study = wf.Study(tmp_path, case.model, task, train=case.train)
    assert any(layer.one_hot for layer in study.layers.values())
    found = study.index(wf.EKFAC(), WHOLE).query(case.queries, k=len(case.train))
    expected = study.score(case.queries, wf.EKFAC()).values
    assert relative_error(all_scores(found), expected) < 1e-12


def test_sketched_products_are_right_on_average() -> None:
    """Also of vectors that stand out in a few numbers, which a run of a layer has side by side."""
    layers = select_layers(mlp_case(torch.float64).model, None)
    sizes, count = {name: layer.shape[0] * layer.width for name, layer in layers.items()}, 2000
    torch.manual_seed(0)
    lines = torch.randn(3, sum(sizes.values()), dtype=torch.float64)
    lines[:, :9] *= 10
    lines = functional.normalize(lines, dim=1)
    errors = []
    for seed in range(count):
        projector = Projector(Sketch(numbers=64, seed=seed), layers, Operator({}, {}), lines.device, lines.dtype)
        counters = torch.zeros(3, 64, dtype=torch.float64)
        for (name, signs), part in zip(projector.factors.items(), lines.split([*sizes.values()], 1), strict=True):
            projector.add(name, part * signs.flatten(), counters)
        errors.append(counters @ counters.T - lines @ lines.T)
    error = torch.stack(errors)
    assert float(error.mean(0).abs().max()) < 5 * math.sqrt(2 / 64 / count)
    assert float(error.square().mean(0).max()) < 2 / 64 * 1.1  # Charikar et al. 2002


def random_search(bits: Bits, examples: int, device: str = "cpu") -> tuple[Search, Tensor, Tensor]:
    """A search through random counters, with the counters and norms of the examples."""
    torch.manual_seed(0)
    sketch = Sketch(numbers=128, bits=bits)
    counters, norms = torch.randn(examples, 128), 1 + torch.rand(examples) / 10
    packed = sketch.packed(counters, norms)
    bounds = [0, examples // 3, examples]
    shards = [
        Shard({name: each[one:other] for name, each in packed.items()}, torch.arange(one, other), None)
        for one, other in pairwise(bounds)
    ]
    return Search(sketch, shards, torch.device(device)), counters, norms


def quantized(queries: Tensor) -> Tensor:
    """Queries as whole numbers of 8 bits, in a type in which all sums are exact."""
    return (queries / (queries.abs().amax(1, keepdim=True) / 127)).round().double()


def on_threads(count: int, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a function returns where PyTorch has so many threads, which it still has afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = function()
        assert torch.get_num_threads() == ThreadPoolExecutor(1).submit(torch.get_num_threads).result() == count
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [1, 8])
def test_products_are_exact(bits: Bits, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: native)
    monkeypatch.setattr("wherefrom.methods.index.search._BLOCK_BYTES", 7 * 16)
    monkeypatch.setattr("wherefrom.methods.index.search._WIDTH_BYTES", 5)  # of 16 with one bit
    search, counters, norms = random_search(bits, 50)
    queries = torch.randn(6, 128)
    found = on_threads(2, lambda: search.best(queries, torch.ones(6), 50))
    if bits == 1:
        codes, scales = torch.where(counters >= 0, 1, -1).double(), norms * math.sqrt(math.pi / 2 / 128)
    else:
        codes, scales = quantized(counters), counters.abs().amax(1) / 127
    whole = (quantized(queries) @ codes.T).long()
    expected = whole * (queries.abs().amax(1, keepdim=True) / 127) * scales
    assert torch.equal(found["values"], expected.sort(1, descending=True).values)
    assert torch.equal(found["train"], expected.argsort(1, descending=True))
    assert torch.equal(found["lowest_values"], expected.sort(1).values)


def test_a_few_queries_of_a_large_index_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    search, counters, norms = random_search(1, 2000)
    queries = counters[[5, 700, 1999]] + 0.5 * torch.randn(3, 128)  # each has an example that is like it
    expected = search.best(queries, torch.ones(3), 1)
    monkeypatch.setattr("wherefrom.methods.index.search._MANY", 2000)
    found = search.best(queries, torch.ones(3), 1)
    assert found["train"].flatten().tolist() == expected["train"].flatten().tolist() == [5, 700, 1999]
    assert torch.equal(found["values"], expected["values"])
    signs = torch.where(counters >= 0, 1, -1)
    counted = torch.from_numpy(search._agreement(search.shards[0], search._signs(queries), False).numpy())
    wanted = torch.where(queries >= 0, 1, -1) @ signs[:666].T
    assert relative_error(counted, wanted * norms[:666] * math.sqrt(math.pi / 2 / 128)) < 1e-6


@pytest.mark.parametrize("many", [400, 300])  # the latter has its bits counted first, which leaves no equal one out
def test_of_equal_scores_the_first_example_comes_first(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherefrom.methods.index.search._MANY", many)
    monkeypatch.setattr("wherefrom.methods.index.search._SCORES", 150)
    search, *_ = random_search(1, 300)
    shards = [Shard(shard.tensors, 299 - shard.positions, shard.examples) for shard in search.shards]
    for each in shards:
        each.tensors["codes"][:] = shards[0].tensors["codes"][0].clone()
        each.tensors["scales"].fill_(1)
    twice = [Shard(each.tensors, each.positions.flip(0), torch.arange(len(each.positions)).flip(0)) for each in shards]
    search, queries = replace(search, shards=twice), torch.randn(2, 128)
    found = on_threads(2, lambda: search.best(queries, torch.ones(2), 7))
    assert found["train"].tolist() == found["lowest_train"].tolist() == [list(range(7))] * 2


def test_cosines_are_those_of_whitened_gradients(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = study.index(wf.EKFAC(), WHOLE).query(case.queries, k=len(case.train), normalized=True)
    scores = study.score(case.queries, wf.EKFAC(), keep=wf.Pairs(self_influence=True))
    assert relative_error(all_scores(found), scores.normalized("cosine").values) < 1e-12
    assert found.fingerprint["normalized"] == "cosine"


def test_batches_and_shards_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    sketch = wf.Sketch(numbers=128, bits=32)
    whole = study.index(wf.EKFAC(), sketch)
    monkeypatch.setattr("wherefrom.methods.index.store._SHARD_BYTES", 5 * 128 * 8)
    monkeypatch.setattr("wherefrom.methods.index.search._BLOCK_BYTES", 2 * 128 * 4)
    monkeypatch.setattr("wherefrom.methods.index.search._SCORES", 1)
    parts = study.index(wf.EKFAC(), sketch, name="parts", execution=wf.Execution(train_batch_size=3))
    assert len(shard_files(parts)) == 3
    assert relative_error(stored(parts), stored(whole)) < 1e-12
    one, other = (index.query(case.queries, k=4) for index in (whole, parts))
    assert torch.equal(one.train, other.train)
    assert relative_error(other.values, one.values) < 1e-12
    assert torch.equal(one.lowest_train, other.lowest_train)


@pytest.mark.parametrize("bits", [1, 32])
def test_an_interrupted_build_goes_on_to_the_same_bits(
    bits: Bits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpt2_case(torch.float32)
    task = Interrupted(["transformer.h.*"])
    sketch = wf.Sketch(numbers=64, bits=bits)
    monkeypatch.setattr("wherefrom.methods.index.store._SHARD_BYTES", 6 * 64 * 4)
    execution = wf.Execution(train_batch_size=2, checkpoint_seconds=0)
    one, other = (
        wf.Study(tmp_path / name, case.model, task, train=case.train, execution=execution) for name in ("one", "other")
    )
    method = with_factors(one.fit(wf.EKFAC()))
    expected = one.index(method, sketch)
    for allowed in (1, 2, 3):  # stops in the first shard, then in the second, then at its end
        task._left = allowed
        with pytest.raises(KeyboardInterrupt):
            other.index(method, sketch)
    task._left = 10**9
    found = other.index(method, sketch)
    tensors, wanted = results(found.path), results(expected.path)
    assert tensors.keys() == wanted.keys()
    assert len(shard_files(found)) == 3
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)
    assert not list(found.path.glob("*partial*"))


def test_another_training_set_takes_what_is_there(tmp_path: Path) -> None:
    """More examples, fewer, in another order and some twice: as an index that is made of these."""
    case = gpt2_case(torch.float64)
    task = Interrupted(["transformer.h.*"])
    method = with_factors(wf.Study(tmp_path / "fit", case.model, task, train=case.train).fit(wf.EKFAC()))
    sketch, execution = wf.Sketch(numbers=64, bits=1), wf.Execution(train_batch_size=1)

    def index(run: str, train: list[Any]) -> GradientIndex[Any]:
        return wf.Study(tmp_path / run, case.model, task, train=train, execution=execution).index(method, sketch)

    index("run", case.train[:8])
    task._left = len(case.train) - 8  # more sweeps would interrupt it
    index("run", case.train)
    task._left = 0
    without = [each for position, each in enumerate(case.train) if position not in (2, 5)]
    again = [case.train[position] for position in (7, 3, 3, 0, 11, 3)]
    for number, train in enumerate((case.train, case.train[:3], without, again)):
        task._left = 0
        found = index("run", train)
        task._left = 10**9
        rebuilt = index(f"rebuilt {number}", train)
        assert torch.equal(stored(found), stored(rebuilt))
        one, other = (each.query(case.queries, k=5) for each in (found, rebuilt))
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.train, other.train)
        assert torch.equal(one.lowest_train, other.lowest_train)
        assert len(found) == len(train)


def test_pruning_leaves_nothing_of_other_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that lose all, some and none of their examples."""
    case = gpt2_case(torch.float64)
    monkeypatch.setattr("wherefrom.methods.index.store._SHARD_BYTES", 4 * 64 * 8)
    method = with_factors(wf.Study(tmp_path / "fit", case.model, case.task, train=case.train).fit(wf.EKFAC()))
    remaining = [each for position, each in enumerate(case.train) if position not in (0, 1, 2, 3, 6)]

    def index(run: str, train: list[Any]) -> GradientIndex[Any]:
        study = wf.Study(tmp_path / run, case.model, case.task, train=train, execution=ONE_BY_ONE)
        return study.index(method, wf.Sketch(numbers=64))

    whole = stored(index("run", case.train))
    found = index("run", remaining)
    expected = found.query(case.queries, k=4)
    assert found.prune() == 5
    assert found.prune() == 0
    content = b"".join(file.read_bytes() for file in found.path.rglob("*") if file.is_file())
    for position, codes in enumerate(whole):
        assert (codes.numpy().tobytes() in content) == (position not in (0, 1, 2, 3, 6))
    assert len(shard_files(found)) == -(-len(case.train) // 4) - 1
    for opened in (found, index("run", remaining)):
        again = opened.query(case.queries, k=4)
        assert torch.equal(again.values, expected.values)
        assert torch.equal(again.train, expected.train)
    assert torch.equal(stored(index("run", case.train)), whole)  # swept again, those alone


def test_pruning_that_is_killed_loses_sketches_and_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(torch.float64)
    method = with_factors(wf.Study(tmp_path / "fit", case.model, case.task, train=case.train).fit(wf.EKFAC()))
    studies = [
        wf.Study(tmp_path / "run", case.model, case.task, train=case.train[:count], execution=ONE_BY_ONE)
        for count in (len(case.train), 5)
    ]
    whole, few = (study.index(method, wf.Sketch(numbers=64)) for study in studies)
    expected = few.query(case.queries, k=4)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("wherefrom.store.cache.Unfinished.save", killed)
        with pytest.raises(KeyboardInterrupt):
            few.prune()
    with pytest.raises(MismatchError, match="has not got .* of the training examples"):
        whole.query(case.queries)
    again = studies[1].index(method, wf.Sketch(numbers=64)).query(case.queries, k=4)
    assert torch.equal(again.values, expected.values)


def test_what_was_made_from_something_else_is_refused(tmp_path: Path) -> None:
    case, other = gpt2_case(torch.float32), gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    sketch = wf.Sketch(numbers=64)
    study.index(wf.EKFAC(), sketch, name="mine")
    with pytest.raises(MismatchError, match="sketch: stored 64 numbers, focus 2.0, seed 0, now 128 numbers"):
        study.index(wf.EKFAC(), replace(sketch, numbers=128), name="mine")
    with pytest.raises(MismatchError, match="bits: stored 1, now 8"):
        study.index(wf.EKFAC(), replace(sketch, bits=8), name="mine")
    with pytest.raises(MismatchError, match=r"damping: stored 0.1 x mean eigenvalue, now 0.01"):
        study.index(wf.EKFAC(damping=0.01), sketch, name="mine")
    with pytest.raises(MismatchError, match="fitted: stored"):
        study.index(wf.EKFAC(seed=1), sketch, name="mine")
    with pytest.raises(MismatchError, match="method: stored ekfac, now kfac"):
        study.index(wf.KFAC(), sketch, name="mine")
    with torch.no_grad():
        next(other.model.parameters()).mul_(2)
    changed = wf.Study(tmp_path, other.model, case.task, train=case.train)
    with pytest.raises(MismatchError, match="model: stored"):
        changed.index(wf.EKFAC(), sketch, name="mine")
    replaced = study.index(wf.EKFAC(seed=1), sketch, name="mine", overwrite=True)
    assert replaced.query(case.queries, k=1).train.shape == (5, 1)


@pytest.mark.parametrize("name", ["codes", "digests"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    file = shard_files(study.index(wf.Dot()))[0]
    content = bytearray(file.read_bytes())
    content[content.index(load_file(file)[name].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{file.parent.name}.*has changed"):
        study.index(wf.Dot()).query(case.queries)


def test_an_index_that_is_there_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.index(wf.Dot(), wf.Sketch(numbers=64)).query(case.queries)
    monkeypatch.setattr("wherefrom.store.space.free_space", lambda folder: 0)
    again = study.index(wf.Dot(), wf.Sketch(numbers=64)).query(case.queries)
    assert torch.equal(again.values, expected.values)
    with pytest.raises(StorageError, match="Not enough space for sketches of gradients"):
        study.index(wf.Dot(), wf.Sketch(numbers=64), name="other")


def test_what_changes_under_an_open_index_is_refused(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    first, second = (wf.Sketch(numbers=64, seed=seed) for seed in (0, 1))
    index = study.index(wf.Dot(), first, name="mine")
    study.index(wf.Dot(), second, name="mine", overwrite=True)  # sketches of the same size
    with pytest.raises(MismatchError, match=r"sketch: stored 64 numbers.* seed 1, now 64 numbers.* seed 0"):
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
    index = study.index(wf.Dot(), wf.Sketch(numbers=64))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 8, 32])
def test_an_example_takes_what_is_said(bits: Bits, dtype: torch.dtype, tmp_path: Path) -> None:
    case = gpt2_case(dtype)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    index = study.index(wf.EKFAC(), wf.Sketch(numbers=2048, bits=bits))
    taken = sum(each.numel() * each.element_size() for each in results(index.path).values())
    assert taken == index.bytes_per_example * len(case.train)


def test_fewer_bits_are_off_by_their_rounding(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    indexes = {bits: study.index(wf.EKFAC(), wf.Sketch(numbers=2048, bits=bits)) for bits in (1, 8, 32)}
    scores = {bits: all_scores(each.query(case.queries, k=len(case.train))) for bits, each in indexes.items()}
    assert 0 < relative_error(scores[8], scores[32]) < 0.02
    assert 0.02 < relative_error(scores[1], scores[32]) < 0.5
    assert [indexes[bits].bytes_per_example for bits in (1, 8, 32)] == [256 + 16, 2048 + 16, 8192 + 16]


def test_reranked_scores_are_exact(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, wf.EKFAC(), keep=wf.Top(10))
    index = study.index(wf.EKFAC(), wf.Sketch(numbers=64))
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


def test_sketched_scores_are_in_nats_only_where_they_are_the_scores(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, wf.EKFAC()).predicted_rise.topk(2).values
    index = study.index(wf.EKFAC(), wf.Sketch())
    with pytest.raises(InputError, match="these scores have no such scale"):  # focus and signs make them smaller
        _ = index.query(case.queries, k=2).predicted_rise
    assert "scores of sketches of ekfac have no scale" in reading(index.query(case.queries, k=2)).meaning
    assert relative_error(index.query(case.queries, k=2, rerank=14).predicted_rise, expected) < 1e-10
    whole = study.index(wf.EKFAC(), wf.Sketch(numbers=65536, bits=32, focus=0.0)).query(case.queries, k=2)
    assert relative_error(whole.predicted_rise, expected) < 1e-3


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"numbers": 0}, "numbers=0: expected a multiple of 64, such as 65536"),
        ({"numbers": 100}, "numbers=100: expected a multiple of 64"),
        ({"numbers": 2**18, "bits": 8}, "numbers=262144 with bits=8: expected at most 131072"),
        ({"bits": 4}, "bits=4: expected 1, 8 or 32"),
        ({"focus": -1.0}, "focus=-1.0: expected a number >= 0"),
    ]
    for fields, message in wrong:
        with pytest.raises(InputError, match=message):
            wf.Sketch(**fields)
    with pytest.raises(InputError, match="name="):
        study.index(wf.EKFAC(), name="../up")
    for method in (wf.EKFAC(query_rank=2), wf.EKFAC(solver=wf.ConjugateGradients())):
        with pytest.raises(InputError, match="it compresses gradients itself"):
            study.index(method)
    assert not (tmp_path / "index").exists()
    index = study.index(wf.EKFAC(), wf.Sketch(numbers=64))
    for query, message in [
        ({"k": 0}, "k=0: expected at least 1"),
        ({"rerank": 3}, "rerank=3 with k=10: expected at least k"),
        ({"rerank": 30, "normalized": True}, "rerank=30 with normalized=True: expected one of them"),
    ]:
        with pytest.raises(InputError, match=message):
            index.query(case.queries, **query)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="queries is empty"):
        index.query([])
