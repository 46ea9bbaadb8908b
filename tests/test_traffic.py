"""What the path of a GPU reads and writes, counted without one, and that less of it gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models import relative_error
from wherefrom.curvature.collectors import second_moment, sum_of_squares
from wherefrom.engine.capture import Capture, Captured
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.passes import Padding
from wherefrom.runtime.precision import rotated


class Traffic(TorchDispatchMode):
    """Adds up the bytes of every tensor that an operation reads or writes; views read and write nothing.

    Attributes:
        written: shape and type of every result that is no view.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.written: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name, results = func.overloadpacket.__name__, [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if results and not func.is_view and name not in {"_unsafe_view", "empty", "empty_like", "new_empty", "detach"}:
            inputs = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, Tensor)]
            written = {id(each) for each in results}
            # What is overwritten from the start is only written; what is changed in place is read too.
            changed = name.endswith("_") and name not in {"copy_", "fill_", "zero_"}
            read = [each for each in inputs if changed or id(each) not in written]
            self.bytes += sum(each.numel() * each.element_size() for each in (*results, *read))
            self.written += [(tuple(each.shape), each.dtype) for each in results]
        return result


def traffic(device: str, run: Callable[[], object]) -> Traffic:
    found = Traffic()
    with FakeTensorMode(), torch.device(device), found:
        run()
    return found


def test_a_rotation_by_two_terms_writes_nothing_in_float32() -> None:
    tokens, size = 4096, 256

    def run() -> None:
        rows, matrix = torch.empty(2, tokens, size, dtype=torch.bfloat16), torch.empty(size, size)
        result = rotated(rows, matrix)
        assert (result.shape, result.dtype) == (rows.shape, torch.bfloat16)

    found = traffic("cuda", run)
    assert all(dtype == torch.bfloat16 for _, dtype in found.written)
    # The rows twice, and the result written, read and written again; of the matrix what is divided and multiplied.
    assert found.bytes == 2 * (2 * tokens * size) * 5 + (6 + 8 + 2 + 2) * size**2


@pytest.mark.parametrize("size", [24, 160])
def test_small_directions_survive_a_rotation_in_bfloat16(size: int) -> None:
    """Standard deviations from 1 to 1e-4: one rounded matrix leaks the large ones into the small ones."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(random).Q
    scaled = torch.randn(3, 200, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -4, size)
    rows = (scaled @ basis.T).bfloat16()
    exact, found = rows.double() @ basis, rotated(rows, basis.float())
    assert found.dtype == torch.bfloat16
    assert relative_error(found[..., -3:], exact[..., -3:]) < 2**-8
    assert relative_error((rows @ basis.bfloat16())[..., -3:], exact[..., -3:]) > 0.3


def test_a_rotation_leaves_the_settings_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    rows, multiply = torch.randn(1, 4, 3).bfloat16(), Tensor.addmm_

    def noted(*arguments: Tensor) -> Tensor:
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return multiply(*arguments)

    monkeypatch.setattr(Tensor, "addmm_", noted)
    before = matmul.allow_bf16_reduced_precision_reduction
    settings: list[Any] = [True, False]
    if hasattr(matmul, "allow_bf16_reduced_precision_reduction_split_k"):
        settings.append((False, False))
    try:
        for setting in settings:
            matmul.allow_bf16_reduced_precision_reduction = setting
            stored = torch._C._get_cublas_allow_bf16_reduced_precision_reduction()
            rotated(rows, torch.eye(3))
            assert torch._C._get_cublas_allow_bf16_reduced_precision_reduction() == stored
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    assert seen == [False] * len(settings)


def test_squares_are_summed_without_being_written() -> None:
    batch, outputs, width = 16, 64, 72

    def run() -> None:
        sum_of_squares(torch.empty(batch, outputs, width), 0, overwrite=True)

    # Read once; the norm of each sum written, read and squared. With squares in between it would be 3 times the first.
    assert traffic("cuda", run).bytes == 4 * outputs * width * (batch + 3)
    # On a CPU, where a norm is slow, they are.
    assert traffic("cpu", run).bytes == 4 * outputs * width * (3 * batch + 1)


@pytest.mark.parametrize("devices", [frozenset(), frozenset({"cpu"})], ids=["squares", "norm"])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15, 1e-22, 1e-30, 1e25])
def test_sums_of_squares_vanish_and_overflow_alike(
    monkeypatch: pytest.MonkeyPatch, devices: frozenset[str], scale: float
) -> None:
    monkeypatch.setattr("wherefrom.curvature.collectors._NORM_DEVICES", devices)
    numbers = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(0)) * scale
    exact = numbers.double().square().sum(0)
    found = sum_of_squares(numbers.clone(), 0, overwrite=True)
    if scale == 1e25:
        assert bool(found.isinf().all())
    elif scale == 1e-30:
        assert not bool(found.any())
    elif scale == 1e-22:  # few digits are left below the smallest normal number
        assert relative_error(found, exact) < 0.05
    else:
        assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("devices", [frozenset(), frozenset({"cpu"})], ids=["squares", "norm"])
def test_sums_of_squares_of_bfloat16_numbers(monkeypatch: pytest.MonkeyPatch, devices: frozenset[str]) -> None:
    monkeypatch.setattr("wherefrom.curvature.collectors._NORM_DEVICES", devices)
    vectors = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, exact = second_moment(vectors, diagonal=True), vectors.double().square().sum((0, 1))
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < (1e-6 if devices else 2**-9)


def captured_traffic(operand: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Traffic, dict[str, Captured]]:
    """A pass through a layer with a bias, half of whose tokens are padding, without the products of the pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 40)).to(dtype)
    inputs = torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.arange(50).expand(4, 50).unsqueeze(2) < 25
    found: dict[str, Captured] = {}

    def loss() -> Tensor:
        value: Tensor = model(inputs).square().sum()
        return value

    def receive(layer: str, captured: Captured) -> None:
        found[layer] = captured

    counted = Traffic()
    with counted, Capture(model, select_layers(model), receive, operand) as capture:
        capture.run(loss, 4, [Padding(mask, 100)])
    return counted, found


def test_operands_are_narrowed_before_they_are_padded() -> None:
    def narrow(tensor: Tensor) -> Tensor:
        return tensor.bfloat16()

    counted, found = captured_traffic(narrow, torch.float32)
    # Activations have a column of ones and seven of zeros, and gradients of the second layer 40 features.
    widths = {"0": (32, 16), "1": (24, 40)}
    for name, (width, outputs) in widths.items():
        captured = found[name]
        assert (captured.activations.shape, captured.gradients.shape) == ((4, 50, width), (4, 50, outputs))
        assert captured.activations.dtype == captured.gradients.dtype == torch.bfloat16
    # No padded activations in float32: the inputs' own widths are 24, which "1" has too, and 16.
    assert ((4, 50, 32), torch.float32) not in counted.written
    assert ((4, 50, 32), torch.bfloat16) in counted.written


def test_a_wider_operand_is_made_last_and_all_are_the_same_numbers() -> None:
    counted, found = captured_traffic(lambda tensor: tensor.float(), torch.bfloat16)
    assert {each.dtype for one in found.values() for each in one[:2]} == {torch.float32}
    assert counted.written.count(((4, 50, 32), torch.float32)) == 1
    _, exact = captured_traffic(lambda tensor: tensor.double(), torch.bfloat16)
    for name, captured in found.items():
        assert torch.equal(captured.activations.double(), exact[name].activations)
        assert torch.equal(captured.gradients.double(), exact[name].gradients)
        assert not bool(captured.activations[:, 25:].any() or captured.gradients[:, 25:].any())
        features = captured.activations.shape[2] - 8
        assert captured.activations[:, :25, features:].flatten(0, 1).unique(dim=0).tolist() == [[1.0] + [0.0] * 7]
