"""Every kind of layer against brute force in float64: gradients, curvature, scores, tokens."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, Case, gpt2, relative_error, token_rows
from tests.reference import BruteForce
from wherefrom.capture import Capture, Captured
from wherefrom.curvature import STRATEGIES, Factors, bases_from_tensors, bases_to_tensors, weight_gradients
from wherefrom.errors import LayerError
from wherefrom.layers import coverage, select_layers, untracked
from wherefrom.task import Task

SEED = 5


class Network(nn.Module):
    """Some layers one after the other, with tanh between them, and a classifier on the mean over positions."""

    def __init__(self, *layers: nn.Module, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.classifier = nn.Linear(features, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        result: Tensor = self.classifier(hidden.flatten(2).mean(2))
        return result


def images(*shape: int, count: int = 13) -> list[object]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64), torch.randint(3, (), generator=generator))
        for _ in range(count)
    ]


def convolution_case(model: nn.Module, *shape: int) -> Case:
    rows = images(*shape)
    return Case(model.double(), wf.Classification(), rows[:9], rows[9:])


def conv1d_case() -> Case:
    """One of the convolutions is called twice; it has groups and wraps around."""
    torch.manual_seed(0)
    twice = nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular")
    model = Network(nn.Conv1d(3, 4, 3, stride=2, padding=1), twice, twice, features=4)
    # Around 6 positions, the three taps of a patch would be alike, and eigenvectors any of a plane.
    return convolution_case(model, 3, 14)


def conv2d_case() -> Case:
    torch.manual_seed(0)
    model = Network(
        nn.Conv2d(2, 4, (3, 2), padding=(2, 1), padding_mode="reflect", bias=False),
        nn.Conv2d(4, 4, 3, stride=(2, 1), groups=4),
        nn.Conv2d(4, 2, 1),
        features=2,
    )
    return convolution_case(model, 2, 5, 6)


def conv3d_case() -> Case:
    torch.manual_seed(0)
    model = Network(nn.Conv3d(1, 2, 2, padding="valid"), nn.Conv3d(2, 2, (1, 2, 2), dilation=(1, 2, 1)), features=2)
    return convolution_case(model, 1, 3, 4, 4)


class Normalised(nn.Module):
    """Normalisations over one and two dimensions, with and without biases and weights, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.both = nn.LayerNorm((2, 3))
        self.plain = nn.LayerNorm(6, bias=False)
        self.weightless = nn.LayerNorm(6, elementwise_affine=False)
        self.root = nn.RMSNorm(6)
        self.last = nn.Linear(6, 3)
        for module in (self.both, self.plain, self.root):
            nn.init.normal_(module.weight, 1.0, 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.root(torch.tanh(self.both(self.first(inputs).unflatten(-1, (2, 3))).flatten(-2)))
        hidden = self.root(torch.tanh(self.weightless(self.plain(hidden))))
        result: Tensor = self.last(hidden).mean(1)
        return result


def norm_case() -> Case:
    torch.manual_seed(0)
    rows = images(4, 6)
    return Case(Normalised().double(), wf.Classification(["*"]), rows[:9], rows[9:])


class Bags(nn.Module):
    """Two calls of an embedding, one of them with a padding index that examples do hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.last = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        left, right = self.embedding(ids[:, :3]), self.embedding(ids[:, 2:])
        result: Tensor = self.last(torch.tanh(left.sum(1)) * right.mean(1))
        return result


def embedding_case() -> Case:
    torch.manual_seed(0)
    rows: list[object] = [(torch.randint(7, (6,)), torch.randint(3, ())) for _ in range(13)]
    rows.append((torch.full((6,), 8), torch.tensor(1)))  # a query of which no training example holds the id
    return Case(Bags().double(), wf.Classification(["*"]), rows[:9], rows[9:])


def language_case(model: nn.Module, *patterns: str) -> Case:
    return Case(model, wf.CausalLM(patterns), token_rows(9), token_rows(4, seed=4))


def untied_case() -> Case:
    """Token embeddings, positions that are the same for all examples, and layers of every other kind."""
    model = gpt2(layers=1)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.4)
    return language_case(model, "transformer.*")


def tied_case() -> Case:
    return language_case(gpt2(layers=1), "lm_head", "transformer.h.0.mlp.*", "transformer.wpe")


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.float64)
    return model


def llama_case() -> Case:
    return language_case(llama(), "*norm", "model.embed_tokens", "model.layers.0.mlp.*")


CASES: dict[str, Callable[[], Case]] = {
    "conv1d": conv1d_case,
    "conv2d": conv2d_case,
    "conv3d": conv3d_case,
    "norms": norm_case,
    "embedding": embedding_case,
    "untied gpt2": untied_case,
    "tied gpt2": tied_case,
    "llama": llama_case,
}


@functools.cache
def brute_force(name: str, seed: int | None) -> BruteForce:
    case = CASES[name]()
    layers = list(select_layers(case.model, case.task.layers))
    return BruteForce(case.model, case.task, layers, case.train, case.queries, seed)


@pytest.mark.parametrize("empirical", [False, True], ids=["sampled", "empirical"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_brute_force(tmp_path: Path, name: str, strategy: str, empirical: bool) -> None:
    """In batches and in one; with query gradients in one and in several blocks."""
    case = CASES[name]()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    factors = study.fit(strategy, empirical=empirical, seed=SEED, batch_size=4)
    expected = brute_force(name, None if empirical else SEED).scores(strategy)
    for sizes in ((4, 3), (9, 4)):
        scores = study.score(
            case.queries, factors, train_batch_size=sizes[0], query_batch_size=sizes[1], name=f"{sizes[0]}"
        )
        assert relative_error(scores.values, expected) < 1e-8
