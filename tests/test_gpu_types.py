"""The path of a GPU without one: on the meta device, whose products take bfloat16 operands and give float32 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.models import relative_error
from wherefrom.curvature.collectors import CovarianceCollector, EigenvalueCollector, add_columns, upper_product
from wherefrom.curvature.operators import Basis, Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.modules.layers import TrackedLayer, select_layers
from wherefrom.planning.forms import BankForm
from wherefrom.runtime.precision import product
from wherefrom.scoring.bank import GradientBank
from wherefrom.scoring.collectors import PairwiseCollector

META = torch.device("meta")
BATCH, TOKENS = 5, 7


def layer(biased: bool) -> TrackedLayer:
    return select_layers(nn.Sequential(nn.Linear(20, 48, bias=biased)))["0"]


def captured(tracked: TrackedLayer, dtype: torch.dtype) -> Captured:
    outputs, width = tracked.padded_shape
    activations = torch.empty(BATCH, TOKENS, width, dtype=dtype, device=META)
    return Captured(activations, torch.empty(BATCH, TOKENS, outputs, dtype=dtype, device=META), BATCH * TOKENS)


def basis(tracked: TrackedLayer) -> Basis:
    outputs, inputs = tracked.shape
    sizes = ((inputs, inputs), (outputs, outputs), (inputs,), (outputs,))
    return Basis(*(torch.empty(size, device=META) for size in sizes))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_bfloat16_is_summed_in_float32_where_pytorch_does_not_offer_it(
    batch: tuple[int, ...], dtype: torch.dtype | None
) -> None:
    """As on a CPU."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*batch, *size, generator=generator).bfloat16() for size in ((5, 300), (300, 7)))
    found = product(left, right, dtype)
    assert found.dtype == (dtype or torch.float32)
    assert relative_error(found, left.double() @ right.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_factors_are_float32_whatever_the_operands(biased: bool, dtype: torch.dtype) -> None:
    tracked = layer(biased)
    outputs, inputs = tracked.shape
    covariance = CovarianceCollector({"0": tracked}, torch.float32, META)
    covariance.collect("0", captured(tracked, dtype), slice(0, BATCH))
    eigenvalues = EigenvalueCollector({"0": tracked}, {"0": basis(tracked)}, 10, torch.float32, META)
    eigenvalues.collect("0", captured(tracked, dtype), slice(0, BATCH))
    found = {**covariance.means(), **eigenvalues.means()}
    shapes = {"0.activations": (inputs, inputs), "0.gradients": (outputs, outputs), "0": (outputs, inputs)}
    assert {name: tuple(each.shape) for name, each in found.items()} == shapes
    assert {each.dtype for each in found.values()} == {torch.float32}


def test_ids_are_counted_in_float32_whatever_the_operands() -> None:
    tracked = select_layers(nn.Sequential(nn.Embedding(20, 48)), ["0"])["0"]
    columns = torch.empty(BATCH, TOKENS, dtype=torch.int64, device=META)
    vectors = torch.empty(BATCH, TOKENS, TOKENS, dtype=torch.bfloat16, device=META)
    gradients = torch.empty(BATCH, TOKENS, 48, dtype=torch.bfloat16, device=META)
    covariance = CovarianceCollector({"0": tracked}, torch.float32, META)
    covariance.collect("0", Captured(vectors, gradients, BATCH * TOKENS, columns=columns), slice(0, BATCH))
    assert covariance.means()["0.activations"].dtype == torch.float32
    # bfloat16 has no 257.
    total, columns = torch.zeros(3), torch.tensor([[2], [2]])
    add_columns(total, torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16), columns)
    assert total.tolist() == [0.0, 0.0, 257.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_scores_are_float32_whatever_the_operands(
    biased: bool, back: bool, rank: int | None, dtype: torch.dtype
) -> None:
    tracked = layer(biased)
    preconditioner = Operator({"0": basis(tracked)}, {"0": torch.empty(tracked.shape, device=META)})
    bank = GradientBank(
        {"0": tracked}, preconditioner, BATCH, BankForm(dtype, META, rank=rank, rotated_back={"0": (back, back)})
    )
    bank.collect("0", captured(tracked, dtype), slice(0, BATCH))
    assert {each.dtype for name, each in bank.sums.items() if name.startswith("0")} == {dtype}
    pairwise = PairwiseCollector(bank, 10, torch.float32, META)
    pairwise.collect("0", captured(tracked, dtype), slice(5, 10))
    assert bank.product("0", captured(tracked, dtype)).dtype == torch.float32
    tokens = bank.token_products("0", 0, bank.in_basis("0", captured(tracked, dtype)))
    assert (tokens.shape, tokens.dtype) == ((BATCH, TOKENS), torch.float32)


@pytest.mark.parametrize("size", [1, 7, 256, 300, 700])
def test_tiles_make_the_whole_product(size: int) -> None:
    rows = torch.randn(40, size, dtype=torch.float64)
    found: Tensor = upper_product(rows)
    assert relative_error(found.triu(), (rows.T @ rows).triu()) < 1e-12
