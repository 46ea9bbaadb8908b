"""The plan: what it chooses, that its estimates are right, and that one which is too optimistic does no harm."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from workload import PeakMemory

import wherefrom as wf
from tests.models import ManyExamples, gpt2_case, mlp_case, relative_error
from tests.runs import factored
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.engine.capture import Captured
from wherefrom.engine.modules.layers import select_layers
from wherefrom.planning.forms import BankForm
from wherefrom.planning.machine import Machine
from wherefrom.planning.plan import SHARD_BYTES, SHARD_EXAMPLES, Plan, plan_scores
from wherefrom.planning.workload import Workload
from wherefrom.runtime.errors import InputError, MemoryLimitError
from wherefrom.runtime.memory import Footprint
from wherefrom.runtime.profile import Profile
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import PairwiseCollector
from wherefrom.scoring.tokens import TokenCollector
from wherefrom.store.cache import Blocks, Cache
from wherefrom.store.space import BlockSizes

CPU = torch.device("cpu")


def job(usable: int, tokens: int = 100, queries: int = 50, train: int = 1000, **options: Any) -> Workload:
    """An attention-like and an MLP-like layer under ek-fac, examples of `tokens` tokens."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 512), nn.Linear(512, 64))
    footprint = Footprint(tokens, 4 * 64 * tokens, 4 * 64 * 520, 6 * 70_000 * tokens)
    sizes = (queries, train, train, footprint, footprint)
    return Workload(select_layers(model), STRATEGIES["ekfac"], *sizes, torch.float32, usable, CPU, **options)


@given(
    usable=st.integers(1, 2**33), tokens=st.integers(1, 2000), queries=st.integers(1, 3000), train=st.integers(1, 10**6)
)
@settings(deadline=None)
def test_a_plan_stays_within_its_memory_and_covers_everything(
    usable: int, tokens: int, queries: int, train: int
) -> None:
    plan = plan_scores(job(usable, tokens, queries, train))
    assert 1 <= plan.block <= queries
    assert plan.sweeps * plan.block >= queries > (plan.sweeps - 1) * plan.block
    # Bases and eigenvalues are in memory when a plan is made; only the copies of them are its own.
    assert plan.block == 1 or max(stage.bytes for stage in plan.stages()[-2:]) <= usable + plan.job.factor_bytes
    shards = plan.shards(plan.block, train)
    assert shards[0].start == 0 and shards[-1].stop == train
    assert all(one.stop == other.start for one, other in pairwise(shards))
    assert len(shards) == 1 or len(shards[0]) == SHARD_EXAMPLES or len(shards[0]) * plan.block * 4 <= SHARD_BYTES


def test_more_memory_means_fewer_sweeps_and_low_rank_stretches_it() -> None:
    sweeps = [plan_scores(job(usable)).sweeps for usable in (2**24, 2**24 + 2**25, 2**28)]
    assert sweeps == sorted(sweeps, reverse=True)
    assert sweeps[0] > sweeps[-1] == 1
    assert plan_scores(job(2**24 + 2**25 + 2**28, query_rank=2)).bank_bytes < plan_scores(job(2**28)).bank_bytes / 10
    assert plan_scores(job(2**30, train_batch=7, query_batch=3)).train_batch == 7


def test_batches_become_smaller_before_the_training_set_is_swept_again() -> None:
    """Query gradients of 95 MiB and examples of 400 KB; on a GPU, 327 of them would fill it."""
    settled = {"tokens": 100, "queries": 341, "train": 20_000}
    ample = replace(job(2**40, **settled), device=torch.device("cuda"))
    whole = plan_scores(ample)
    assert (whole.sweeps, whole.train_batch) == (1, 32768 // 100)
    fixed = whole.bank_bytes + ample.factor_bytes + SHARD_BYTES + 341 * SHARD_EXAMPLES * 4
    each = ample.example.bytes
    for batch in (300, 150, 60):
        found = plan_scores(replace(ample, usable=fixed + batch * each), Machine(1e14, 1.0, 2**40))
        assert (found.sweeps, found.train_batch, found.query_batch) == (1, batch, batch)
    # One example fills no GPU: to sweep twice, with the batches for which half of the gradients leave room, is cheaper.
    little = replace(ample, usable=fixed + each)
    found = plan_scores(little, Machine(1e14, 1.0, 2**40))
    assert (found.sweeps, found.train_batch) == (
        2,
        (341 - 171) * (whole.bank_bytes // 341 + SHARD_EXAMPLES * 4) // each + 1,
    )
    for batch, sweeps in ((100, 2), (150, 3)):
        settled_batch = replace(little, train_batch=batch, query_batch=batch)
        found = plan_scores(settled_batch, Machine(1e14, 1.0, 2**40))
        assert (found.sweeps, found.train_batch) == (sweeps, batch)


def test_gradients_are_rotated_where_that_costs_less() -> None:
    """Against a count of operations by hand, for the layer of 512 outputs and 64 + 1 (72) inputs."""
    few_queries, many_queries = plan_scores(job(2**33, queries=3)), plan_scores(job(2**33, queries=4000, train=10))
    assert few_queries.form.rotated_back["1"] == (True, True)  # 3 queries x 512 rows against 1000 x 100 tokens
    assert many_queries.form.rotated_back["1"] == (False, False)
    # left: 200 x 2 x 512 x 512 x 72 against 200 x 2 x 512 x 512 x min(100, 72); right: 200 x 512 against 200 x 100.
    plan = plan_scores(job(2**33, queries=199, train=200))
    assert plan.form.rotated_back["1"] == (True, False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_estimated_operations_are_those_that_run(tmp_path: Path, strategy: str) -> None:
    """PyTorch's own counter, over a whole fit and score."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    rows: list[object] = [(torch.randn(32), torch.tensor(row % 8)) for row in range(40)]
    study = wf.Study(tmp_path, model, wf.Classification(), train=rows)
    queries = rows[:20]
    plan = study.plan(queries, factored(strategy))
    with FlopCounterMode(display=False) as counter:
        study.score(queries, factored(strategy))
    estimated = sum(stage.flop for stage in plan.stages() if stage.passes)
    # Tiles round a covariance up to whole rows, and two examples are measured to plan. With one token an example, whole
    # gradients' covariances are most of the work; narrower than a tile, they take twice the products.
    rounding = estimated if STRATEGIES[strategy].basis == "gradients" else 0.0
    assert 0.8 * estimated < counter.get_total_flops() < 1.35 * estimated + rounding


def test_the_estimate_of_other_kinds_of_layers(tmp_path: Path) -> None:
    """Convolutions whose layers see different numbers of tokens, and an embedding, against PyTorch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 24, 3, stride=2), nn.Flatten(), nn.Linear(24 * 9, 3)
    )
    images: list[object] = [(torch.randn(3, 9, 9), torch.tensor(row % 3)) for row in range(24)]
    words = nn.Sequential(nn.Embedding(40, 32), nn.Flatten(), nn.Linear(32 * 12, 3))
    texts: list[object] = [(torch.randint(40, (12,)), torch.tensor(row % 3)) for row in range(24)]
    for name, model, rows in (("images", convolutions, images), ("texts", words, texts)):
        for strategy in STRATEGIES:
            task = wf.Classification(["*"])
            study = wf.Study(tmp_path / name / strategy, model, task, train=rows)
            plan = study.plan(rows[:9], factored(strategy))
            with FlopCounterMode(display=False) as counter:
                study.score(rows[:9], factored(strategy))
            estimated = sum(stage.flop for stage in plan.stages() if stage.passes)
            assert 0.7 * estimated < counter.get_total_flops() < 1.4 * estimated


def test_one_hot_layers_have_no_matrix_of_the_vocabulary() -> None:
    layers = select_layers(nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 4, bias=False)), ["*"])
    assert replace(job(1), layers=layers).factor_bytes == 4 * (8**2 + 5000 + 8 * 5000 + 4**2 + 8**2 + 4 * 8)
    assert BankForm(torch.bfloat16, CPU, tokens=10).bytes_per_query(layers) == 2 * (8 * 10 + 4 * 8) + 8 * 10


def test_the_plan_says_what_it_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    plan = study.plan(case.queries, wf.EKFAC(query_rank=2), execution=wf.Execution(train_batch_size=4))
    assert re.match(
        r"Plan: 5 of 5 query gradients resident \(rank 2, float32, 0.00 GiB on cpu; .* GiB usable\), so 14 training "
        r"examples are swept once; batches of 5 queries, 4 training examples.",
        str(plan),
    )
    names = ["covariance", "eigendecomposition", "eigenvalues", "query gradients", "pairwise scores"]
    assert [stage.name for stage in plan.stages()] == names
    assert [str(cell) for cell in plan.table().columns[0].cells] == names
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.INFO, "wherefrom"):
        study.score(case.queries, wf.Dot())
    assert sum("Plan: 5 of 5 query gradients resident (whole" in each for each in caplog.messages) == 1
    with caplog.at_level(logging.INFO, "wherefrom"):
        study.score(case.queries, wf.Dot())
    assert sum("Plan:" in each for each in caplog.messages) == 1  # nothing to compute, nothing to plan


# Estimates that are off.


@contextmanager
def little_memory(monkeypatch: pytest.MonkeyPatch, queries: int, batch: int) -> Iterator[None]:
    """More resident queries, or a larger training batch with more than one of them, end in an out-of-memory error."""
    collect, products = GradientBank.collect, PairwiseCollector.collect

    def limited(self: GradientBank, layer: str, captured: Captured, rows: slice) -> None:
        if len(self) > queries:
            raise torch.OutOfMemoryError("out of memory")
        collect(self, layer, captured, rows)

    def limited_pairwise(self: PairwiseCollector, layer: str, captured: Captured, rows: slice) -> None:
        products(self, layer, captured, rows)
        if len(self.sums["values"]) > 1 and len(captured.activations) > batch:
            raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(GradientBank, "collect", limited)
        patched.setattr(PairwiseCollector, "collect", limited_pairwise)
        yield


@pytest.mark.parametrize(("queries", "batch"), [(2, 100), (1, 100), (4, 3), (4, 1)])
def test_too_little_memory_means_smaller_blocks_and_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, queries: int, batch: int
) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, name="expected").values
    with little_memory(monkeypatch, queries, batch):
        found = study.score(case.queries, name="found").values
    assert relative_error(found, expected) < 1e-12
    assert any("resident query gradients instead of 5" in each for each in caplog.messages)


def test_a_single_query_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with little_memory(monkeypatch, 0, 100), pytest.raises(MemoryLimitError, match="query gradients: a single example"):
        study.score(case.queries, wf.Dot())


def test_a_run_continues_with_the_blocks_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after its first block, and resumed on a machine with more memory."""
    case = mlp_case()
    execution = wf.Execution(memory_budget=1e-9, train_batch_size=12)
    small = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    done: list[str] = []
    original = PairwiseCollector.collect

    def interrupted(self: PairwiseCollector, layer: str, captured: Captured, rows: slice) -> None:
        done.append(layer)
        if len(done) == 4:
            raise KeyboardInterrupt
        original(self, layer, captured, rows)

    with monkeypatch.context() as patched:
        patched.setattr(PairwiseCollector, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.score(case.queries)
    (blocks,) = (tmp_path / "scores").glob("ekfac-*.blocks")
    kept = {path.name: path.stat().st_mtime_ns for path in blocks.iterdir() if path.is_dir()}
    assert list(kept) == ["0-1.0-12"]
    large = wf.Study(tmp_path, case.model, case.task, train=case.train)
    seen: list[int] = []

    def counted(self: PairwiseCollector, layer: str, captured: Captured, rows: slice) -> None:
        seen.append(len(self.sums["values"]))
        original(self, layer, captured, rows)

    with monkeypatch.context() as patched:
        patched.setattr(PairwiseCollector, "collect", counted)
        found = large.score(case.queries).values
    assert set(seen) == {4}
    assert relative_error(found, large.score(case.queries, name="one").values) < 1e-12
    assert not blocks.exists()


def test_a_run_with_less_memory_does_not_take_up_blocks_that_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = mlp_case()
    large = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=wf.Execution(checkpoint_seconds=0))
    expected = large.score(case.queries, name="expected").values
    sizes: list[int] = []
    original = PairwiseCollector.collect

    def interrupted(self: PairwiseCollector, layer: str, captured: Captured, rows: slice) -> None:
        sizes.append(len(self.sums["values"]))
        if rows.start == 6 and sizes[-1] == 5:
            raise KeyboardInterrupt
        original(self, layer, captured, rows)

    monkeypatch.setattr(PairwiseCollector, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        large.score(case.queries, execution=replace(large.execution, train_batch_size=3))
    assert set(sizes) == {5}
    sizes.clear()
    small = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=wf.Execution(memory_budget=1e-9))
    assert relative_error(small.score(case.queries).values, expected) < 1e-12
    assert set(sizes) == {1}


@pytest.mark.parametrize("interrupt", [False, True], ids=["out of memory", "another budget"])
def test_token_scores_survive_another_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: bool) -> None:
    """After a checkpoint, memory runs out or the run is interrupted, and the pairs are cut into other parts."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    expected = study.score(case.queries, keep=wf.Tokens(), name="expected").values
    original = TokenCollector.collect
    failed: list[str] = []

    def failing(self: TokenCollector, layer: str, captured: Captured, rows: slice) -> None:
        if rows.start == 6 and not failed:
            failed.append(layer)
            raise KeyboardInterrupt if interrupt else MemoryLimitError("too much")
        original(self, layer, captured, rows)

    monkeypatch.setattr(TokenCollector, "collect", failing)
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=3)
    if interrupt:
        with pytest.raises(KeyboardInterrupt):
            study.score(case.queries, keep=wf.Tokens(), execution=execution)
        execution = wf.Execution(memory_budget=1e-9, train_batch_size=3)
    tokens = study.score(case.queries, keep=wf.Tokens(), execution=execution)
    assert failed
    assert len(tokens.shards) > 1
    assert relative_error(tokens.values, expected) < 1e-12
    assert len(list(tokens.folder.iterdir())) == len(tokens.shards) + 1  # and the index


def test_a_block_that_was_being_written_is_not_finished(tmp_path: Path) -> None:
    """Four queries fitted into memory before; now two do, and what is missing of the four could not be computed."""
    blocks = Blocks(Cache(tmp_path, {}, Profile()), rows=4, columns=10)
    blocks.get_or_compute(range(4), range(6), lambda _: {"values": torch.zeros(4, 6)})
    (tmp_path / "0-4.6-10.part").mkdir()
    assert blocks.begun(range(2)) == range(2)


def test_a_large_matrix_takes_little_more_than_itself_on_disk() -> None:
    """And the sums of one of its blocks, twice while they are replaced; what real runs take is measured elsewhere."""
    step = BlockSizes(queries=10_000, train=1_000_000, itemsize=4, block=100, shard=1_000_000).matrix_step(ranks=1)
    matrix, sums = 4 * 10_000 * 1_000_000, 4 * 100 * 1_000_000
    assert matrix < step.stored < matrix + 2**20
    assert matrix + 2 * sums < step.peak < 1.03 * matrix
    # One block: its sums are there until it is written.
    assert 2 * sums < BlockSizes(100, 1_000_000, 4, 100, 1_000_000).matrix_step(ranks=1).peak < 2.01 * sums


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux tells it")
def test_memory_does_not_grow_with_the_training_set(tmp_path: Path) -> None:
    """100,000 training examples x 250 queries: a matrix of 95 MiB, of which 16 are ever in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    queries = ManyExamples(250)
    peaks = []
    for train in (1_000, 100_000):
        execution = wf.Execution(train_batch_size=2000)
        study = wf.Study(
            tmp_path / str(train), model, wf.Classification(), train=ManyExamples(train), execution=execution
        )
        watch = PeakMemory()
        watch.start()
        scores = study.score(queries, wf.Dot())
        hits = scores.top(1)
        peaks.append(watch.stop())
        assert scores.values.shape == (250, train)
        assert len(hits) == 250
    assert peaks[1] < peaks[0] + 40 * 2**20
    exact = replace(scores, values=scores.values.clone())  # in memory
    assert exact.top(1) == hits


def test_impossible_options_are_refused(tmp_path: Path) -> None:
    case = mlp_case()
    with pytest.raises(InputError, match="memory_budget=0: expected a number of GiB above 0"):
        wf.Execution(memory_budget=0)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with pytest.raises(InputError, match="query_rank=0: expected at least 1"):
        wf.Dot(query_rank=0)
    with pytest.raises(InputError, match="rescore=3: expected at least 1 together with a query_rank or query_bits"):
        wf.Dot(rescore=3)
    with pytest.raises(InputError, match="queries is empty"):
        study.plan([], wf.EKFAC())


def test_plans_are_values() -> None:
    plan = plan_scores(job(2**30))
    assert isinstance(plan, Plan)
    assert plan == plan_scores(plan.job)
