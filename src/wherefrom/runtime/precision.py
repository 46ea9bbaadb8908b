"""Half precision: model passes whose matrix products take bfloat16 operands, whatever the device multiplies natively.

Where the hardware multiplies bfloat16, this is PyTorch's autocast. Elsewhere (most CPUs multiply half precision by
software, a hundred times slower) the operands and results of every product are rounded to bfloat16 and multiplied in
float32, which is what matrix units compute up to the order of summation. Weights, losses and whatever a collector adds
up stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from wherefrom.runtime.errors import InputError

# The products of a forward and a backward pass.
_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward")
)
# Fused attention also takes and returns logarithms of sums, which no kernel keeps in half precision: only its first
# `count` arguments and results are rounded.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: (3, 1),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (5, 3),
}


def rounded(tensor: Tensor) -> Tensor:
    """A float32 tensor with its values rounded to bfloat16; other types are left as they are."""
    return tensor.bfloat16().float() if tensor.dtype == torch.float32 else tensor


def widened(tensor: Tensor) -> Tensor:
    """A tensor in float32 or wider, which losses, random draws and sums need."""
    return tensor.to(widened_dtype(tensor.dtype))


def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or a wider type as it is."""
    return torch.promote_types(dtype, torch.float32)


def type_name(dtype: torch.dtype) -> str:
    """A type as messages and tables have it, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def product(left: Tensor, right: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A product of matrices [n, k] x [k, m], or of batches of them, summed in float32 or wider.

    Where this PyTorch cannot multiply bfloat16 operands into float32 (CUDA before 2.8, devices without numbers before
    2.10), they are widened first: the same numbers, more slowly.

    Args:
        left, right: of one type; bfloat16 operands only on a GPU.
        dtype: of the result; the sums' own by default.
    """
    if left.dtype != torch.bfloat16:
        result = left @ right
        return result if dtype is None else result.to(dtype)
    multiply = torch.mm if left.dim() == 2 else torch.bmm
    try:
        return multiply(left, right, out_dtype=dtype or torch.float32)
    except (TypeError, NotImplementedError):  # no such argument, or not on this device
        return (left.float() @ right.float()).to(dtype or torch.float32)


def rotated(vectors: Tensor, matrix: Tensor) -> Tensor:
    """`vectors` [batch, tokens, n] times an orthogonal matrix [n, n] in float32 or wider, in the vectors' type.

    A matrix rounded to bfloat16 is not orthogonal: what it leaks from large eigenvalues buries small ones. So bfloat16
    vectors are multiplied with its rounded value and with what the rounding has left. The small product comes first,
    and the multiplication that makes the large one adds to it, in float32: no result is written in float32, and what
    the small product loses in bfloat16 is 2^-18 of the vectors, as much as the two values lack of the matrix.
    """
    if vectors.dtype != torch.bfloat16:
        return vectors @ matrix
    flat, high = vectors.flatten(0, 1), matrix.bfloat16()
    low = torch.sub(matrix, high, out=torch.empty_like(high))
    with _float32_sums():
        return (flat @ low).addmm_(flat, high).view(vectors.shape)


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Within it, products with bfloat16 results that a GPU makes in parts are summed in float32 (cuBLAS, by PyTorch's
    default, may sum such parts in bfloat16: a large term would leave its rounding error where it cancels)."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    # Since torch 2.11 at the latest the setting is a pair; given one value, PyTorch resets the other.
    split = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", True)
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed if split else (allowed, split)


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Keep out what a caller's own autocast or inference mode would do to numbers, on a device and the host."""
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        yield


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware."""
    if device.type == "cpu":
        if hasattr(torch.cpu, "get_capabilities"):
            found = torch.cpu.get_capabilities()
            return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        # Before 2.11, PyTorch says so of x86 alone; operands are rounded on other processors, which is right too.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True  # other accelerators: autocast itself says what it cannot do


class Precision:
    """How a model pass multiplies; this one, as the model's own type does.

    Args:
        dtype: of sums of what is captured.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    def passes(self, device: torch.device) -> AbstractContextManager[object]:
        """What a forward and backward pass on a device runs within."""
        # On a GPU, fused attention adds up parts of its gradients in an order that depends on the batch and on chance.
        return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()

    def paused(self) -> AbstractContextManager[object]:
        """Within it, inside `passes`, products are what they always are."""
        return nullcontext()

    def operand(self, tensor: Tensor) -> Tensor:
        """A captured tensor as the operand of a `product`; a module may compute in a narrower type than sums have."""
        return tensor.to(torch.promote_types(tensor.dtype, self._dtype))

    def __str__(self) -> str:
        return "full"


class HalfPrecision(Precision):
    """bfloat16 operands, float32 sums; refuses a GPU that has no bfloat16.

    Attributes:
        native: the device's own bfloat16, or rounded operands multiplied in float32 (on a CPU); None asks the device.
    """

    def __init__(self, device: torch.device, native: bool | None = None) -> None:
        self.native = native_bfloat16(device) if native is None else native
        if not self.native and device.type != "cpu":
            raise InputError(
                f"half_precision=True on {device}, which does not multiply bfloat16: leave it out, or use a GPU of "
                "NVIDIA's Ampere generation or newer."
            )
        self._device = device
        self._rounding = _RoundedProducts()

    def passes(self, device: torch.device) -> AbstractContextManager[object]:
        return self._native_passes(device) if self.native else self._rounding

    @contextmanager
    def _native_passes(self, device: torch.device) -> Iterator[None]:
        # Fused attention is several times faster, and what it adds up in another order is a bit of bfloat16 here and
        # there: in half precision it is taken, unless PyTorch is told to be deterministic. Its own deterministic
        # kernels would not do, since their sums still depend on the batch.
        exact = device.type == "cuda" and torch.are_deterministic_algorithms_enabled()
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
            yield

    def paused(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, enabled=False) if self.native else self._rounding.paused()

    def operand(self, tensor: Tensor) -> Tensor:
        # CPUs have no product of bfloat16 operands with float32 sums, so there only the values are rounded.
        return tensor.bfloat16() if self._device.type == "cuda" else rounded(widened(tensor))

    def __str__(self) -> str:
        return f"half: bfloat16 products {'in hardware' if self.native else 'by rounding, multiplied in float32'}"


class _RoundedProducts(TorchDispatchMode):
    """Rounds the operands and results of every product to bfloat16."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._active = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if not self._active:
            return func(*args, **options)
        if func in _PRODUCTS:
            return tree_map_only(Tensor, rounded, func(*tree_map_only(Tensor, rounded, args), **options))
        if func in _ATTENTION:
            inputs, outputs = _ATTENTION[func]
            results = func(*map(rounded, args[:inputs]), *args[inputs:], **options)
            return (*map(rounded, results[:outputs]), *results[outputs:])
        return func(*args, **options)
