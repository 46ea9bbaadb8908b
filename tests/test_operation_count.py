"""Counted operations of attention whose keys and values have fewer heads than queries, as a GPU's kernels take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from tests.models import TRANSFORMERS
from wherefrom.engine.operation_count import operation_counter
from wherefrom.hf.blueprint import measure
from wherefrom.runtime.errors import InputError

aten = torch.ops.aten
BATCH, HEADS, QUERIES, KEYS, FEATURES, VALUES = 2, 6, 5, 7, 16, 8


def empty(heads: int, tokens: int, features: int) -> Tensor:
    return torch.empty(BATCH, heads, tokens, features, dtype=torch.bfloat16, device="meta")


def products_of_attention() -> tuple[int, int]:
    """Operations of products of matrices, with keys and values repeated for every head: forward, and going back."""
    query, key, value = empty(HEADS, QUERIES, FEATURES), empty(HEADS, KEYS, FEATURES), empty(HEADS, KEYS, VALUES)
    counted = []
    with FlopCounterMode(display=False) as counter:
        weights = (query @ key.mT).softmax(-1)
        results = weights @ value
        counted.append(counter.get_total_flops())
        scores = query @ key.mT
        for left, right in ((results, value.mT), (scores.mT, results), (scores, key), (scores.mT, query)):
            left @ right
        counted.append(counter.get_total_flops())
    return counted[0], counted[1] - counted[0]


@pytest.mark.parametrize("heads", [HEADS, 3, 1])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_grouped_heads_take_what_repeated_ones_take(kernel: str, heads: int) -> None:
    query, key, value = empty(HEADS, QUERIES, FEATURES), empty(heads, KEYS, FEATURES), empty(heads, KEYS, VALUES)
    gradient = empty(HEADS, QUERIES, VALUES)
    forward, backward = products_of_attention()
    name = f"_scaled_dot_product_{kernel}_attention"
    counter = operation_counter()
    # The formulas alone: not every kernel takes grouped heads, or runs without numbers, in every version.
    formula, formula_backward = (counter.flop_registry[getattr(aten, each)] for each in (name, f"{name}_backward"))
    assert formula(query, key, value, out_val=()) == forward
    assert formula_backward(gradient, query, key, value, out_val=()) == backward


@pytest.mark.skipif(TRANSFORMERS < (5, 5), reason="before transformers 5.5, a Llama does not run without weights")
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_half_precision_of_a_llama_with_grouped_heads_is_counted(tmp_path: Path, heads: int) -> None:
    """A GPU's kernel gets the heads of keys and values as they are where nothing is masked."""
    tokens, width, inner, layers, vocabulary = 24, 32, 48, 3, 64
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=heads,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    keys = width * heads // 4
    first = width**2 + 2 * width * keys  # nobody asks for the gradient of the first layer's input
    products = layers * (2 * width**2 + 2 * width * keys + 3 * width * inner) + vocabulary * width
    attention = 14 * tokens**2 * width * layers  # two products forward, five back
    example = measure(str(tmp_path), tokens, half_precision=True).example
    counted = example.flop - (2 * tokens * (2 * products - first) + attention)
    # Angles of rotary positions are a product of matrices in some versions of transformers.
    assert counted in (0, 2 * tokens * (width // 4) // 2)


@pytest.mark.skipif(TRANSFORMERS >= (5, 5), reason="it runs since transformers 5.5")
def test_a_model_that_does_not_run_without_weights_is_refused_by_name() -> None:
    with pytest.raises(
        InputError, match="model='smollm2-135m': its code does not run without weights .* transformers 5.5"
    ):
        measure("smollm2-135m", 8)
