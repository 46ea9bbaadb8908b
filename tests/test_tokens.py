"""Scores of tokens: against brute force, their sums, their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import CaseMaker, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored
from wherefrom.engine.capture import Captured
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import DamagedError, InputError, LayerError, MismatchError
from wherefrom.scoring.tokens import TokenCollector, TokenScores, extreme_pairs, part_name, token_parts


def brute_force(make: CaseMaker, query: int, example: int) -> Tensor:
    """Undamped identity token scores of one pair: autograd for the query, the layer's own tensors for each token."""
    case = make(torch.float64)
    layers = list(select_layers(case.model, case.task.layers))
    brute = BruteForce(case.model, case.task, layers, case.train, case.queries)
    total = torch.zeros(())
    for layer in layers:
        activations, gradients = brute.tokens[example][layer]  # [calls * tokens, in], [calls * tokens, out]
        each = torch.einsum("to,oi,ti->t", gradients, brute.queries[query][layer], activations)
        calls = 2 if layer == "twice" else 1
        total = total + each.detach().view(calls, -1).sum(0)
    return total


@pytest.mark.parametrize("make", [mlp_case, gpt2_case])
def test_token_scores_equal_brute_force(tmp_path: Path, make: CaseMaker) -> None:
    case = make(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    tokens = study.score(case.queries, wf.Dot(), keep=wf.Tokens(), execution=wf.Execution(train_batch_size=4))
    for pair in ((0, 0), (2, 7), (4, 11)):
        assert relative_error(tokens[pair], brute_force(make, *pair)) < 1e-9


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("make", [mlp_case, gpt2_case])
def test_tokens_sum_to_the_sequence_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: CaseMaker, top: int | None, strategy: str
) -> None:
    """With files of a few pairs and one query in memory at a time, too."""
    case = make(torch.float64)
    study, method = wf.Study(tmp_path, case.model, case.task, train=case.train), factored(strategy)
    scores = study.score(case.queries, method).values
    tokens = study.score(case.queries, method, keep=wf.Tokens(top), name="one")
    monkeypatch.setattr("wherefrom.scoring.tokens.PART_BYTES", 7 * 8 * int(tokens.lengths.max()))
    execution = wf.Execution(memory_budget=1e-9, train_batch_size=3)
    parts = study.score(case.queries, method, keep=wf.Tokens(top), name="many", execution=execution)
    assert len(parts.shards) > len(tokens.shards) == 1
    expected = {(q, t) for q in range(5) for t in range(len(case.train))}
    if top:
        expected = {(hit.query, hit.train) for each in (scores, -scores) for hit in wf.Scores(each, {}).top(top)}
    for found in (tokens, parts, TokenScores.load(parts.folder)):
        assert {tuple(pair) for pair in found.pairs.tolist()} == expected
        for query, train in expected:
            assert len(found[query, train]) == found.lengths[train]
            assert abs(found[query, train].sum() - scores[query, train]) < 1e-10 * scores.abs().max()
    assert relative_error(parts.values, tokens.values) < 1e-9
    if top is None:
        assert relative_error(tokens.values.sum(2), scores) < 1e-10


def test_lengths_and_padding(tmp_path: Path) -> None:
    case = gpt2_case(torch.float64)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    tokens = study.score(case.queries, wf.EKFAC(), keep=wf.Tokens())
    lengths = [len(example["input_ids"]) for example in case.train]  # type: ignore[index]
    assert tokens.lengths.tolist() == lengths
    assert tokens.values.shape == (5, 14, max(lengths))
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    assert (tokens.values[:, padding] == 0).all()
    # The last token predicts nothing, and nothing later reads it: no loss depends on it.
    assert all(tokens[0, row][-1] == 0 for row in range(14))


def test_pairs_that_are_not_stored_are_named(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    tokens = study.score(case.queries, wf.Diagonal(), keep=wf.Tokens(1))
    best = study.score(case.queries, wf.Diagonal()).top(1)[0]
    other = next(row for row in range(12) if (0, row) not in tokens)
    assert (0, best.train) in tokens
    assert (0, -1) not in tokens
    assert (99, 0) not in tokens
    with pytest.raises(InputError, match=rf"query 0 and training example {other}: it has the 1 highest and lowest"):
        tokens[0, other]
    with pytest.raises(InputError, match="top=0: expected at least 1"):
        wf.Tokens(0)
    with pytest.raises(InputError, match="no token scores there"):
        TokenScores.load(tmp_path / "nowhere")


def test_a_damaged_part_is_named_and_replaced(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    first = study.score(case.queries, keep=wf.Tokens())
    expected = first.values
    file = first.folder / part_name(first.pairs) / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match="tensors.safetensors cannot be used"):
        TokenScores.load(first.folder)[0, 0]
    repaired = study.score(case.queries, keep=wf.Tokens(), overwrite=True)
    assert torch.equal(repaired.values, expected)


def test_a_layer_that_sees_no_tokens_is_named(tmp_path: Path) -> None:
    """A layer after pooling has one vector an example, whatever the others see."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokenwise, self.pooled = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.pooled(torch.tanh(self.tokenwise(inputs)).mean(1))
            return logits

    torch.manual_seed(0)
    rows: list[object] = [(torch.randn(6, 4), torch.tensor(row % 3)) for row in range(5)]
    study = wf.Study(tmp_path, Pooled(), wf.Classification(), train=rows)
    with pytest.raises(LayerError, match="belongs to no single token"):
        study.score(rows, wf.Dot(), keep=wf.Tokens())
    alone = wf.Study(tmp_path / "alone", Pooled(), wf.Classification(["tokenwise"]), train=rows)
    tokens = alone.score(rows, wf.Dot(), keep=wf.Tokens()).values
    assert tokens.shape == (5, 5, 6)
    assert relative_error(tokens.sum(2), alone.score(rows, wf.Dot()).values) < 1e-5


def test_a_layer_behind_pooling_alone_is_refused_where_there_is_a_mask(tmp_path: Path) -> None:
    case = gpt2_case()
    case.model.add_module("head", nn.Linear(13, 13).double())

    class FromLast(wf.CausalLM):
        """Reads the whole sequence with one vector."""

        def train_loss(self, model, batch, sampler=None):  # type: ignore[no-untyped-def]
            logits = model(input_ids=batch["input_ids"]).logits.mean(1)
            return nn.functional.cross_entropy(model.head(logits), batch["input_ids"][:, 0], reduction="sum")

    study = wf.Study(tmp_path, case.model, FromLast(["head"]), train=case.train)
    with pytest.raises(LayerError, match="belongs to no single token"):
        study.score(case.queries, wf.Dot(), keep=wf.Tokens())


def test_a_mask_that_is_none_where_nothing_is_padded(tmp_path: Path) -> None:
    class Sometimes(wf.CausalLM):
        def mask(self, batch: dict[str, Tensor]) -> Tensor | None:
            mask = super().mask(batch)
            return None if mask is None or bool(mask.all()) else mask

    case = gpt2_case()
    found = {}
    for name, task in (("always", case.task), ("sometimes", Sometimes(case.task.layers))):
        execution = wf.Execution(train_batch_size=4)
        study = wf.Study(tmp_path / name, case.model, task, train=case.train, execution=execution)
        found[name] = study.score(case.queries, wf.Dot(), keep=wf.Tokens())
    assert torch.equal(found["always"].lengths, found["sometimes"].lengths)
    assert relative_error(found["sometimes"].values, found["always"].values) < 1e-12


def test_a_smaller_batch_after_running_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch fails after part of its layers; the smaller one in its place is shorter."""
    case = gpt2_case()
    case.train.sort(key=lambda example: len(example["input_ids"]))  # type: ignore[index]
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)

    def values(name: str, size: int) -> Tensor:
        execution = wf.Execution(train_batch_size=size)
        return study.score(case.queries, wf.Dot(), keep=wf.Tokens(), name=name, execution=execution).values

    expected = values("one", 2)
    original, seen = TokenCollector.collect, []

    def limited(self: TokenCollector, layer: str, captured: Captured, rows: slice) -> None:
        original(self, layer, captured, rows)
        seen.append(rows.stop - rows.start)
        if rows.stop - rows.start > 4 and len(seen) == 3:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TokenCollector, "collect", limited)
    found = values("two", 8)
    assert seen[:4] == [8, 8, 8, 4]
    assert relative_error(found, expected) < 1e-12


def test_tokens_of_other_scores_are_refused(tmp_path: Path) -> None:
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    scores, other = study.score(case.queries), study.score(case.queries, wf.EKFAC(damping=1.0))
    tokens = study.score(case.queries, keep=wf.Tokens())
    assert tokens.differences(scores.fingerprint) == []
    with pytest.raises(MismatchError, match="tokens belong to other scores.*damping: stored 0.1 x mean.*now 1.0"):
        study.report(other, case.queries, tokenizer=Characters(), tokens=tokens)
    again = study.score(case.queries, wf.EKFAC(damping=1.0), keep=wf.Tokens())
    part = part_name(tokens.pairs)
    for file in (again.folder / part).iterdir():  # a part of another run
        (tokens.folder / part / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MismatchError, match="damping: stored 1.0, now 0.1 x mean eigenvalue"):
        TokenScores.load(tokens.folder)[0, 0]


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))


def test_half_precision_tokens_sum_to_the_score_up_to_its_rounding(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    execution = wf.Execution(half_precision=True)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=execution)
    scores, tokens = study.score(case.queries).values, study.score(case.queries, keep=wf.Tokens()).values
    assert 0 < relative_error(tokens.sum(2), scores) < 2**-8  # of the gradient's two factors, one is rounded


def test_parts_hold_every_pair_once() -> None:
    values = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    chosen = extreme_pairs(values, 2)
    assert len(chosen) == 24
    found = torch.cat([part for block in (range(4), range(4, 6)) for part in token_parts(block, 9, chosen, 2**26)])
    assert sorted(found.tolist()) == chosen.tolist()
    parts = list(token_parts(range(2, 5), 9, None, 2**26))
    assert [len(part) for part in parts] == [3] * 9
    assert sorted(torch.cat(parts).tolist()) == [[query, row] for query in range(2, 5) for row in range(9)]
    assert len(extreme_pairs(values, 99)) == 54
