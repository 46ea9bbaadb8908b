"""Layers whose input a model has flattened, [batch * tokens, features]: whose it is, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, relative_error, token_rows
from tests.reference import BruteForce
from wherefrom.runtime.errors import LayerError


def opt() -> Any:
    """Its decoder flattens what its two linear layers and the norm before them read."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=8, word_embed_proj_dim=8, ffn_dim=6, num_hidden_layers=1, init_std=0.4,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(config).double().eval()


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_language_model_that_flattens_is_scored_and_its_tokens_are(tmp_path: Path, batch: int) -> None:
    model, rows, queries = opt(), token_rows(9), token_rows(3, seed=4)
    task = wf.CausalLM(["*.fc1", "*.fc2", "*.final_layer_norm", "*.q_proj"])
    study = wf.Study(tmp_path, model, task, train=rows)
    execution = wf.Execution(train_batch_size=batch, query_batch_size=2)
    found = study.score(queries, wf.EKFAC(empirical=True), execution=execution).values
    brute = BruteForce(model, task, list(study.layers), rows, queries)
    assert relative_error(found, brute.scores("ekfac")) < 1e-8
    tokens = study.score(queries, wf.Dot(), keep=wf.Tokens(), execution=execution)
    expected = torch.zeros(int(tokens.lengths[4]), dtype=torch.float64)
    for name in study.layers:
        activations, gradients = brute.tokens[4][name]
        expected += torch.einsum("to,oi,ti->t", gradients, brute.queries[1][name], activations).detach()
    assert relative_error(tokens[1, 4], expected) < 1e-9


class Sequences(nn.Module):
    """Reads [batch, steps, 4] as vectors of 4, or of 2; a layer after pooling has one vector an example, as ever.

    Args:
        width: of the vectors.
        ids: steps are ids of an embedding, which it looks up all at once.
    """

    def __init__(self, width: int = 4, ids: bool = False) -> None:
        super().__init__()
        self.ids = nn.Embedding(5, 4) if ids else None
        self.width, self.each, self.pooled = width, nn.Linear(width, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, self.width) if self.ids is None else self.ids(inputs.flatten())
        each = torch.tanh(self.each(flat)).reshape(len(inputs), -1, 5)
        result: Tensor = self.pooled(each.mean(1))
        return result


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("steps", [1, 6])
def test_without_a_mask_the_tensors_of_a_batch_tell(tmp_path: Path, steps: int, ids: bool) -> None:
    """Also as many steps as examples, one step alone, and flattened ids."""
    torch.manual_seed(0)
    shape = (steps,) if ids else (steps, 4)
    rows: list[Any] = [
        (torch.randint(5, shape) if ids else torch.randn(shape).double(), torch.tensor(row % 3)) for row in range(9)
    ]
    model, task = Sequences(ids=ids).double(), wf.Classification(["*"])
    study = wf.Study(tmp_path, model, task, train=rows)
    brute = BruteForce(model, task, list(study.layers), rows, rows)
    for batch in (1, 6, 9):
        execution = wf.Execution(train_batch_size=batch)
        found = study.score(rows, wf.EKFAC(empirical=True), name=f"{batch}", execution=execution).values
        assert relative_error(found, brute.scores("ekfac")) < 1e-8


def test_vectors_that_are_not_the_batch_s_tokens_are_refused(tmp_path: Path) -> None:
    """Twelve of six steps may be in any order."""
    rows: list[Any] = [(torch.randn(6, 4), torch.tensor(row % 3)) for row in range(5)]
    study = wf.Study(tmp_path, Sequences(width=2), wf.Classification(), train=rows)
    for batch in (1, 2):
        with pytest.raises(
            LayerError, match=rf"'each' saw a batch of {12 * batch} for {batch} examples: .*flatten all of"
        ):
            study.fit(wf.Diagonal(), execution=wf.Execution(train_batch_size=batch))


class TokensFirst(nn.Module):
    """Flattens [tokens, batch, features] behind a layer that has the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs)).transpose(0, 1)  # [tokens, batch, 5]
        each = torch.tanh(self.each(hidden.reshape(-1, 5))).view(hidden.shape)
        result: Tensor = self.last(each.mean(0))
        return result


def test_what_is_flattened_tokens_first_is_refused(tmp_path: Path) -> None:
    """It has the shape of what is flattened example by example: vectors would be taken for those of other examples."""
    rows: list[Any] = [(torch.randn(6, 4), torch.tensor(row % 3)) for row in range(5)]
    study = wf.Study(tmp_path, TokensFirst(), wf.Classification(), train=rows)
    for batch in (2, 5):
        with pytest.raises(LayerError, match="'each' reads all tokens flattened, and not example by example"):
            study.fit(wf.Diagonal(), execution=wf.Execution(train_batch_size=batch))
    study.fit(wf.Diagonal(), execution=wf.Execution(train_batch_size=1))
