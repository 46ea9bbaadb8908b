"""Indexes with a sketch for each chunk of tokens, against scores of tokens, brute force and indexes of examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.mixtures import mixture
from tests.models import TRANSFORMERS, Case, Interrupted, Mlp, gpt2_case, relative_error, token_rows
from tests.runs import results, with_factors
from tests.test_tokens import brute_force
from wherefrom.methods.index.gradient_index import GradientIndex
from wherefrom.methods.index.sketches import Sketch
from wherefrom.runtime.errors import InputError, LayerError, MismatchError

WHOLE = wf.Sketch(numbers=2**16, bits=32, focus=0)  # more numbers than the small models have weights
ONE_BY_ONE = wf.Execution(train_batch_size=1)  # the same bits whatever is swept together


def embeddings_case() -> Case:
    """All layers of a GPT-2: embeddings, biases and normalisations too."""
    case = gpt2_case(torch.float64)
    return replace(case, task=wf.CausalLM())


def mixture_case() -> Case:
    """Experts that see some tokens of an example."""
    return Case(mixture("mixtral"), wf.CausalLM(), token_rows(9), token_rows(3, seed=4))


def twice_case() -> Case:
    """A layer that is called twice, and no mask of tokens."""

    class Means(Mlp):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).mean(1)

    torch.manual_seed(0)
    rows: list[object] = [(torch.randn(7, 4).double(), torch.tensor(row % 3)) for row in range(8)]
    return Case(Means().double(), wf.Classification(), rows[:6], rows[6:])


def tokens_of(examples: list[Any]) -> Tensor:
    return torch.tensor([len(each["input_ids"]) for each in examples])


def chunk_scores(index: GradientIndex[Any], queries: Any, **options: Any) -> dict[tuple[int, int, int, int], float]:
    """The score of each query with each chunk, by (query, train, start, stop), as the highest and as the lowest."""
    every = len(index.store.chunks.spans)
    found = index.query_chunks(queries, k=every, **options)
    lowest = replace(found, values=found.lowest_values, train=found.lowest_train, spans=found.lowest_spans)
    scores, again = (
        {(hit.query, hit.train, hit.start, hit.stop): hit.score for hit in each.top(every)} for each in (found, lowest)
    )
    assert scores == again
    assert torch.equal(found.lowest_values, found.values.flip(1))
    assert len(scores) == len(queries) * every
    return scores


def sums_of_tokens(tokens: wf.TokenScores, size: int) -> dict[tuple[int, int, int, int], float]:
    """What an index of chunks is to find: the sum of the scores of each chunk's tokens."""
    found = {}
    for query, train in tokens.pairs.tolist():
        values = tokens[query, train]
        for start in range(0, len(values), size):
            stop = min(start + size, len(values))
            found[query, train, start, stop] = float(values[start:stop].sum())
    return found


def tensors(values: dict[tuple[int, int, int, int], float], like: dict[tuple[int, int, int, int], float]) -> Tensor:
    assert values.keys() == like.keys()
    return torch.tensor([values[key] for key in like], dtype=torch.float64)


LISTS = pytest.mark.skipif(TRANSFORMERS < (5,), reason="experts are lists of linear layers, routed by their owner")


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("make", [embeddings_case, pytest.param(mixture_case, marks=LISTS), twice_case])
def test_a_chunk_is_the_sum_of_its_tokens(make: Any, size: int, tmp_path: Path) -> None:
    case = make()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=wf.Execution(train_batch_size=4))
    index = study.index(wf.EKFAC(), replace(WHOLE, chunk=size))
    expected = sums_of_tokens(study.score(case.queries, wf.EKFAC(), keep=wf.Tokens()), size)
    found = chunk_scores(index, case.queries)
    assert relative_error(tensors(found, expected), tensors(expected, expected)) < 1e-10
    whole = study.score(case.queries, wf.EKFAC()).values
    added = torch.zeros_like(whole)
    for (query, train, _, _), score in found.items():
        added[query, train] += score
    assert relative_error(added, whole) < 1e-10


def test_chunk_scores_equal_brute_force(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    found = chunk_scores(study.index(wf.Dot(), replace(WHOLE, chunk=4)), case.queries)
    for query, train in ((0, 0), (2, 7), (4, 11)):
        parts = [float(each.sum()) for each in brute_force(gpt2_case, query, train).split(4)]
        mine = [score for key, score in sorted(found.items()) if key[:2] == (query, train)]
        assert mine == pytest.approx(parts, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_chunks_as_long_as_the_examples_are_an_index_of_these(bits: Any, tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    sketch = wf.Sketch(numbers=128, bits=bits)
    whole, chunked = (study.index(wf.EKFAC(), each) for each in (sketch, replace(sketch, chunk=10)))
    for normalized in (False, True):
        expected = whole.query(case.queries, k=5, normalized=normalized)
        found = chunked.query_chunks(case.queries, k=5, normalized=normalized)
        assert relative_error(found.values, expected.values) < 1e-5  # products of padded vectors round otherwise
        assert torch.equal(found.train, expected.train)
        assert torch.equal(found.lowest_train, expected.lowest_train)
    lengths = tokens_of(case.train)
    assert torch.equal(found.spans, torch.stack([torch.zeros_like(found.train), lengths[found.train]], 2))
    assert chunked.bytes_per_example == whole.bytes_per_example + 8
    halves = study.index(wf.EKFAC(), replace(sketch, chunk=5))
    taken = sum(each.numel() * each.element_size() for each in results(halves.path).values())
    assert halves.bytes_per_example == taken // len(case.train) > chunked.bytes_per_example
    assert found.fingerprint["chunk"] == "10 tokens"


def test_shards_batches_and_interruptions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpt2_case(torch.float64)
    task = Interrupted(["transformer.h.*"])
    sketch = wf.Sketch(numbers=128, bits=32, chunk=3)
    one, other = (
        wf.Study(tmp_path / name, case.model, task, train=case.train, execution=execution)
        for name, execution in (
            ("one", wf.Execution(train_batch_size=14)),
            ("other", wf.Execution(train_batch_size=2, checkpoint_seconds=0)),
        )
    )
    method = with_factors(one.fit(wf.EKFAC()))
    expected = chunk_scores(one.index(method, sketch), case.queries)
    monkeypatch.setattr("wherefrom.methods.index.store._SHARD_BYTES", 11 * 128 * 8)
    for allowed in (1, 2, 3):
        task._left = allowed
        with pytest.raises(KeyboardInterrupt):
            other.index(method, sketch)
    task._left = 10**9
    index = other.index(method, sketch)
    assert len(index.store.shards) > 2
    assert relative_error(tensors(chunk_scores(index, case.queries), expected), tensors(expected, expected)) < 1e-12


def test_another_training_set_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More examples, fewer, in another order and some twice, and what others left is pruned."""
    case = gpt2_case(torch.float64)
    task = Interrupted(["transformer.h.*"])
    method = with_factors(wf.Study(tmp_path / "fit", case.model, task, train=case.train).fit(wf.EKFAC()))
    monkeypatch.setattr("wherefrom.methods.index.store._SHARD_BYTES", 9 * 64 * 8)

    def index(run: str, train: list[Any]) -> GradientIndex[Any]:
        study = wf.Study(tmp_path / run, case.model, task, train=train, execution=ONE_BY_ONE)
        return study.index(method, wf.Sketch(numbers=64, chunk=2))

    index("run", case.train[:8])
    task._left = len(case.train) - 8  # more sweeps would interrupt it
    index("run", case.train)
    again = [case.train[position] for position in (7, 3, 3, 0, 11, 3)]
    for number, train in enumerate((case.train[:3], again)):
        task._left = 0
        found = index("run", train)
        task._left = 10**9
        expected = chunk_scores(index(f"rebuilt {number}", train), case.queries)
        assert chunk_scores(found, case.queries) == expected
    assert found.prune() == len(case.train) - 4
    assert found.prune() == 0
    assert chunk_scores(found, case.queries) == expected
    task._left = 0
    found = index("run", again)
    task._left = 10**9
    assert chunk_scores(found, case.queries) == expected
    spans = [each for shard in found.store.shards for each in shard.tensors["spans"]]
    assert len(spans) == sum(-(-int(tokens_of(case.train)[each]) // 2) for each in (7, 3, 0, 11))


def test_reranked_chunks_are_exact(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    index = study.index(wf.EKFAC(), wf.Sketch(numbers=64, chunk=3))
    expected = sums_of_tokens(study.score(case.queries, wf.EKFAC(), keep=wf.Tokens()), 3)
    before = results(tmp_path).keys()
    found = chunk_scores(index, case.queries, rerank=len(index.store.chunks.spans))
    assert relative_error(tensors(found, expected), tensors(expected, expected)) < 1e-10
    few = index.query_chunks(case.queries, k=2, rerank=6)
    assert results(tmp_path).keys() == before
    for hit in few.top(2):
        assert hit.score == pytest.approx(expected[hit.query, hit.train, hit.start, hit.stop], rel=1e-9)
    candidates = [(hit.query, hit.train, hit.start, hit.stop) for hit in index.query_chunks(case.queries, k=6).top(6)]
    best = torch.tensor([expected[key] for key in candidates], dtype=torch.float64).view(5, 6).topk(2).values
    assert relative_error(few.values, best) < 1e-9
    rise = study.score(case.queries, wf.EKFAC()).rise_per_score
    assert rise is not None
    assert torch.equal(few.predicted_rise, few.values * rise.unsqueeze(1))  # a part of the example's


def test_an_index_of_examples_is_as_before() -> None:
    """Those that lie on disks are found by these."""
    assert wf.Sketch().settings == {"sketch": "65536 numbers, focus 2.0, seed 0", "bits": "1"}
    assert wf.Sketch().label == "sketch65536-1bit"
    for sketch in (wf.Sketch(), wf.Sketch(numbers=128, bits=8, focus=0.5, seed=3, chunk=7)):
        assert Sketch.of(sketch.settings) == sketch


def test_what_would_be_a_wrong_answer_is_refused(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    with pytest.raises(InputError, match="chunk=0: expected at least 1 token, or None"):
        wf.Sketch(chunk=0)
    sketch = wf.Sketch(numbers=64)
    whole = study.index(wf.EKFAC(), sketch, name="mine")
    with pytest.raises(InputError, match="which has sketches of whole examples: call query, or"):
        whole.query_chunks(case.queries)
    with pytest.raises(MismatchError, match="chunk: stored nothing, now 4 tokens"):
        study.index(wf.EKFAC(), replace(sketch, chunk=4), name="mine")
    chunks = study.index(wf.EKFAC(), replace(sketch, chunk=4))
    with pytest.raises(InputError, match=r"chunks of 4 token\(s\): call query_chunks, or"):
        chunks.query(case.queries)
    found = chunks.query_chunks(case.queries, k=2)
    with pytest.raises(InputError, match="k=3: expected 1 to 2"):
        found.top(3)
    for shown in (study.show, study.report):
        with pytest.raises(InputError, match=r"expected what score or GradientIndex\.query .* not TopChunks"):
            shown(found)  # type: ignore[arg-type]


def test_a_layer_that_sees_no_tokens_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Flatten(), nn.Linear(30, 3))
    rows: list[object] = [(torch.randn(6, 4), torch.tensor(row % 3)) for row in range(5)]
    study = wf.Study(tmp_path, model, wf.Classification(), train=rows)
    with pytest.raises(LayerError, match="Layer '2' sees 1 vectors .* belongs to no single token"):
        study.index(wf.Dot(), wf.Sketch(numbers=64, chunk=2))
    alone = wf.Study(tmp_path / "alone", model, wf.Classification(["0"]), train=rows)
    assert len(chunk_scores(alone.index(wf.Dot(), wf.Sketch(numbers=64, chunk=4)), rows)) == 5 * 5 * 2
