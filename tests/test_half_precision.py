"""Half precision: what is rounded, what is not, and that scores stay what they were to a few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import wherefrom as wf
from tests.models import gpt2_case, mlp_case, relative_error
from tests.runs import factored, labels
from wherefrom.curvature.operators import Basis, Operator
from wherefrom.engine.capture import Captured
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Collector, Sweep
from wherefrom.planning.forms import BankForm
from wherefrom.runtime.precision import HalfPrecision, Precision, rounded
from wherefrom.scoring.bank import GradientBank

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("native", [False, True], ids=["rounding", "native"])


def by_hand(model: nn.Sequential, inputs: Tensor, labels: Tensor, native: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and output gradients of two linear layers around a tanh, each product with rounded operands, in float64.

    Sums are exact here and float32 there, so a value in the middle between two bfloat16 numbers may fall either way.
    """
    first, second = model[0], model[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)

    def product(left: Tensor, right: Tensor) -> Tensor:
        return (left.double() @ right.double()).float()

    a1 = rounded(inputs)
    hidden = torch.tanh(rounded(product(a1, rounded(first.weight).T) + rounded(first.bias)))
    a2 = rounded(hidden)
    logits = rounded(product(a2, rounded(second.weight).T) + rounded(second.bias))
    s2 = rounded(logits.softmax(1) - nn.functional.one_hot(labels, 3).float())
    # Autocast leaves the tanh in bfloat16, and its derivative is of the rounded value.
    s1 = rounded(product(s2, rounded(second.weight))) * (1 - (a2 if native else hidden).square())
    return [a1, a2], [rounded(s1), s2]


@BOTH
def test_layers_see_bfloat16_operands_and_sums_stay_float32(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("wherefrom.runtime.precision.native_bfloat16", lambda device: native)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    inputs, labels = torch.randn(9, 40), torch.randint(3, (9,))
    seen: dict[str, Captured] = {}
    exact: dict[str, Tensor] = {}

    class Keep(Collector):
        def __init__(self) -> None:
            self.sums = {}

        def collect(self, layer: str, captured: Captured, batch: slice) -> None:
            seen[layer] = captured
            exact[layer] = captured.gradients[:, 0].T @ captured.activations[:, 0]  # a product inside the pass

    task = wf.Classification()
    sweep: Sweep[Any] = Sweep(model, task, select_layers(model), wf.Execution(half_precision=True))
    sweep.run("keep", Examples(list(zip(inputs, labels, strict=True)), task), Keep(), batch_size=9)
    activations, gradients = by_hand(model, inputs, labels, native)
    for layer, a, s in zip(("0", "2"), activations, gradients, strict=True):
        captured = seen[layer]
        assert captured.activations.dtype == torch.float32
        assert torch.equal(captured.activations, rounded(captured.activations))
        assert torch.equal(captured.gradients, rounded(captured.gradients))
        # Most values are the same to the last bit, all of them to a unit or two in the last place.
        for found, expected in ((captured.activations[:, 0, : a.shape[1]], a), (captured.gradients[:, 0], s)):
            assert (found == expected).double().mean() > 0.9
            assert relative_error(found, expected) < 2**-7
        wide = captured.gradients[:, 0].double().T @ captured.activations[:, 0].double()
        assert relative_error(exact[layer], wide) < 1e-6  # neither operands nor result of a collector are rounded


@BOTH
@pytest.mark.parametrize("strategy", ["identity", "ekfac"])
def test_scores_in_half_precision_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, native: bool
) -> None:
    monkeypatch.setattr("wherefrom.runtime.precision.native_bfloat16", lambda device: native)
    case = gpt2_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    method = factored(strategy)
    full = study.score(case.queries, method).values
    half = study.score(case.queries, method, execution=wf.Execution(half_precision=True)).values
    assert half.dtype == torch.float32
    assert 0 < relative_error(half, full) < 0.1
    assert all(spearmanr(a, b).statistic > 0.95 for a, b in zip(full, half, strict=True))
    assert labels(tmp_path / "scores") == [method.name, f"{method.name}-half"]


def test_gradients_are_rounded_before_they_are_multiplied() -> None:
    """Both the bank's and the training batch's, each after it was summed over tokens."""
    torch.manual_seed(0)
    layers = select_layers(nn.Sequential(nn.Linear(24, 16, bias=False)))
    bank = GradientBank(layers, Operator({}, {}), 2, BankForm(torch.bfloat16, CPU))
    queries = Captured(rounded(torch.randn(2, 5, 24)), rounded(torch.randn(2, 5, 16)), 10)
    train = Captured(rounded(torch.randn(3, 5, 24)), rounded(torch.randn(3, 5, 16)), 15)
    bank.collect("0", queries, slice(0, 2))
    one, other = (rounded(each.gradients.transpose(1, 2) @ each.activations).flatten(1) for each in (queries, train))
    assert relative_error(bank.product("0", train), one.double() @ other.double().T) < 1e-6


def test_query_gradients_are_rotated_back_with_little_more_than_their_own_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, with bfloat16 operands and float32 sums, where the damped inverse spans six orders of magnitude."""

    def emulated(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (left.float() @ right.float()).to(dtype or torch.float32)

    for module in ("runtime.precision", "engine.example_gradients", "scoring.bank"):
        monkeypatch.setattr(f"wherefrom.{module}.product", emulated)
    generator = torch.Generator().manual_seed(0)
    outputs, inputs, queries, batch, tokens = 48, 64, 4, 16, 9
    layers = select_layers(nn.Sequential(nn.Linear(inputs, outputs, bias=False)))
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in (outputs, inputs)
    )
    spectra = [torch.logspace(-4, 0, size, dtype=torch.float64) for size in (outputs, inputs)]
    curvature = torch.outer(*spectra)
    inverse = 1 / (curvature + 1e-6)

    def batch_of(count: int) -> Captured:
        # Gradients of the size that the curvature says.
        tensors = [
            ((torch.randn(count, tokens, len(values), generator=generator) * values.sqrt()) @ basis.T).bfloat16()
            for basis, values in zip((left, right), spectra, strict=True)
        ]
        return Captured(tensors[1], tensors[0], count * tokens)

    basis = Basis(right.float(), left.float(), spectra[1].float(), spectra[0].float())
    queried, trained = batch_of(queries), batch_of(batch)
    form = BankForm(torch.bfloat16, CPU, rotated_back={"0": (True, True)})
    bank = GradientBank(layers, Operator({"0": basis}, {"0": inverse.float()}), queries, form)
    bank.collect("0", queried, slice(0, queries))

    def whole(captured: Captured) -> Tensor:
        return captured.gradients.double().transpose(1, 2) @ captured.activations.double()

    exact = left @ (inverse * (left.T @ whole(queried) @ right)) @ right.T
    expected = torch.einsum("qoi,boi->qb", exact, whole(trained))
    rounded_last = torch.einsum("qoi,boi->qb", exact.bfloat16().double(), whole(trained).bfloat16().double())
    found = torch.einsum("qoi,boi->qb", bank.sums["0"].double(), whole(trained).bfloat16().double())
    own = float((rounded_last - expected).norm() / expected.norm())
    assert float((found - expected).norm() / expected.norm()) < 2 * own


def test_factors_in_half_precision_are_float32_and_say_so(tmp_path: Path) -> None:
    case = mlp_case(torch.float32)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    full = study.fit(wf.EKFAC(), name="mine")
    half = study.fit(wf.EKFAC(), execution=wf.Execution(half_precision=True))
    assert full.fingerprint["precision"] == "full"
    assert half.fingerprint["precision"].startswith("half: bfloat16 products")
    for name, values in half.eigenvalues.items():
        assert values.dtype == torch.float32
        assert 0 < relative_error(values.sum(), full.eigenvalues[name].sum()) < 0.05
    with pytest.raises(wf.WherefromError, match="precision: stored full, now half"):
        study.fit(wf.EKFAC(), name="mine", execution=wf.Execution(half_precision=True))


@BOTH
def test_drawn_targets_keep_their_variance_around_a_large_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """A bfloat16 number near 3000 is a multiple of 16: noise of size 1 would vanish in it."""
    monkeypatch.setattr("wherefrom.runtime.precision.native_bfloat16", lambda device: native)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1))
    nn.init.constant_(model[0].bias, 3000.0)  # type: ignore[arg-type]
    rows = [(torch.randn(3), torch.zeros(1)) for _ in range(200)]
    study = wf.Study(tmp_path, model, wf.Regression(), train=rows)
    eigenvalues = study.fit(wf.Diagonal(), execution=wf.Execution(half_precision=True)).eigenvalues["0"]
    assert 0.7 < float(eigenvalues[0, -1]) < 1.3  # of the bias: the variance of the noise


def test_half_precision_on_a_gpu_without_bfloat16_is_refused() -> None:
    with pytest.raises(wf.WherefromError, match="half_precision=True on cuda, which does not multiply bfloat16"):
        HalfPrecision(torch.device("cuda"), native=False)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("warn_only", [False, True])
def test_attention_on_a_gpu_is_deterministic_where_pytorch_is_told_to_be(warn_only: bool) -> None:
    """PyTorch's fused kernels add up gradients in an order of chance; full precision never uses them on a GPU."""
    cuda = torch.device("cuda")

    def fused(precision: Precision) -> bool:
        with precision.passes(cuda):
            backends = torch.backends.cuda
            assert backends.math_sdp_enabled()
            kinds = backends.flash_sdp_enabled, backends.mem_efficient_sdp_enabled, backends.cudnn_sdp_enabled
            return any(enabled() for enabled in kinds)  # type: ignore[no-untyped-call]

    half, full = HalfPrecision(cuda, native=True), Precision()
    assert (fused(half), fused(full)) == (True, False)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert (fused(half), fused(full)) == (False, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert fused(half)


@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_the_sum_of_many_blocks_of_queries_stays_float32(layer: str) -> None:
    """200 blocks of gradients that are alike: a sum in bfloat16 would stop growing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False) if layer == "linear" else nn.Embedding(6, 5))
    layers = select_layers(model, ["0"])
    form = BankForm(torch.bfloat16, CPU, tokens=3)
    common, exact, total = torch.randn(3, 5), torch.zeros(5, 6, dtype=torch.float64), None
    for _ in range(200):
        bank = GradientBank(layers, Operator({}, {}), 2, form)
        gradients = common + 0.1 * torch.randn(2, 3, 5)
        if layer == "linear":
            captured = Captured(1 + torch.rand(2, 3, 6), gradients, 6)
            each = (gradients.transpose(1, 2) @ captured.activations).bfloat16().double()
        else:
            columns = torch.stack([torch.randperm(6)[:3] for _ in range(2)])
            captured = Captured(torch.eye(3).expand(2, 3, 3), gradients, 6, columns=columns)
            each = torch.zeros(2, 5, 6, dtype=torch.float64).scatter_(
                2, columns.unsqueeze(1).expand(2, 5, 3), gradients.transpose(1, 2).bfloat16().double()
            )
        exact += each.sum(0)
        bank.collect("0", captured, slice(0, 2))
        total = bank.summed(total)
    assert total is not None
    train = Captured(torch.randn(4, 3, 6), torch.randn(4, 3, 5), 12)
    if layer == "embedding":
        train = train._replace(activations=torch.eye(6).expand(4, 6, 6), gradients=torch.randn(4, 6, 5))
        train = train._replace(columns=torch.arange(6).expand(4, 6))
    trained = (train.gradients.transpose(1, 2) @ train.activations).double()
    found = total.product("0", train)
    assert found.dtype == torch.float32
    assert relative_error(found[0], (trained * exact).sum((1, 2))) < 1e-6
