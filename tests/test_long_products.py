"""Products that are cut along their sum are the same, and are cut where that fills a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.models import relative_error
from wherefrom.scoring.bank import long_product, parts_of_sum, split_product


@pytest.mark.parametrize("parts", [1, 2, 7, 28])
def test_parts_add_up_to_the_product(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 56, dtype=torch.float64, generator=generator) for rows in (3, 5))
    expected = torch.einsum("nk,mk->nm", left, right)
    assert relative_error(split_product(left, right, parts), expected) < 1e-14
    assert relative_error(long_product(left, right), expected) < 1e-14


def test_parts_are_summed_in_float32() -> None:
    """On the meta device, as bfloat16 operands are on a GPU."""
    left, right = (torch.empty(rows, 56, dtype=torch.bfloat16, device="meta") for rows in (3, 5))
    found = split_product(left, right, 7)
    assert (found.shape, found.dtype) == ((3, 5), torch.float32)


@pytest.mark.parametrize("shape", [(2304, 776), (768, 776), (3072, 776), (768, 3080)])
@pytest.mark.parametrize(("queries", "batch"), [(481, 64), (241, 64), (56, 20), (1, 1)])
def test_the_layers_of_gpt2_fill_a_gpu(shape: tuple[int, int], queries: int, batch: int) -> None:
    length = shape[0] * shape[1]
    parts = parts_of_sum(queries, batch, length)
    tiles = -(-queries // 128) * -(-batch // 128)
    assert length % parts == 0
    assert (length // parts) % 8 == 0
    assert 64 <= parts * tiles <= 128


def test_short_sums_and_large_products_stay_whole() -> None:
    assert parts_of_sum(481, 64, 4096) == 1
    assert parts_of_sum(2048, 2048, 10**6) == 1
    assert parts_of_sum(10, 10, 8 * 10007) == 1  # a prime: no equal parts
