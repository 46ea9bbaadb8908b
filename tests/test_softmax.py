"""What is read of the logits once is their softmax, compiled or not, whatever the chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.models import relative_error
from tests.test_compiling import needs_compiler
from wherefrom.tasks.losses import _block_sums, _write_softmax, softmax_statistics


def logits_of(positions: int, classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(positions, classes, generator=generator, dtype=torch.float64) - 30


@given(
    positions=st.integers(0, 9),
    classes=st.integers(1, 70) | st.sampled_from([127, 128, 129, 500]),
    chunk_bytes=st.sampled_from([1, 2**12, 2**20]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_statistics_are_those_of_the_softmax(positions: int, classes: int, chunk_bytes: int, seed: int) -> None:
    logits = logits_of(positions, classes, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wherefrom.tasks.losses._CHUNK_BYTES_PER_THREAD", chunk_bytes)
        found = softmax_statistics(logits)
    torch.testing.assert_close((found.maximum + found.total.log()).squeeze(1), logits.logsumexp(1))
    assert torch.equal(found.maximum.squeeze(1), logits.amax(1))
    runs = logits.softmax(1).split(found.block_size, 1)
    torch.testing.assert_close(found.blocks, torch.stack([run.sum(1) for run in runs], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits = logits_of(20, 5000).to(dtype)
    found, exact = softmax_statistics(logits), softmax_statistics(logits.double())
    assert found.blocks.dtype == found.total.dtype == found.maximum.dtype == torch.float32
    assert relative_error(found.blocks, exact.blocks) < 1e-6
    assert relative_error(found.total, exact.total) < 1e-6


@pytest.mark.parametrize("classes", [1, 31, 32, 1000])
def test_each_block_has_its_maximum_and_sum(classes: int) -> None:
    """The form for a GPU, which reads each block by itself."""
    logits = logits_of(7, classes)
    maxima, sums = _block_sums.function(logits, 32)
    assert torch.equal(maxima, torch.stack([run.amax(1) for run in logits.split(32, 1)], 1))
    torch.testing.assert_close(maxima + sums.log(), torch.stack([run.logsumexp(1) for run in logits.split(32, 1)], 1))


@needs_compiler
def test_compiled_it_is_the_same() -> None:
    """The code for a CPU; one piece for every number of positions."""
    logits = logits_of(24, 1000).float()
    for positions in (24, 5, 2):
        some = logits[:positions]
        for found, exact in zip(_block_sums.compiled(some, 32), _block_sums.function(some.double(), 32), strict=True):
            assert relative_error(found, exact) < 1e-6
        maximum, scale, out = some.amax(1, True), torch.rand(positions, 1), torch.empty_like(some)
        ignored = torch.arange(positions).unsqueeze(1) == 1
        _write_softmax.compiled(out, some, maximum, scale, ignored)
        exact = (some.double() - maximum.double()).exp() * scale.double()
        torch.testing.assert_close(out.double(), exact.masked_fill(ignored, 0), rtol=5e-6, atol=1e-30)
