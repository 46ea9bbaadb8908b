"""Eigenvectors of many covariances: those of one size in batches or on several streams of a GPU, equal ones once.

This module knows matrices and their names, nothing of layers, sweeps or what a basis is for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from wherefrom.runtime.errors import LossError, first_line
from wherefrom.runtime.memory import out_of_memory

logger = logging.getLogger("wherefrom")

Way = Literal["batched", "looped", "streams"]
"""How matrices of one size are decomposed: in batches, one after the other, or several at once, each on a stream."""

# Matrices of one size that are decomposed together, in float64.
_EIGH_BYTES = 2**28
# A small matrix is mostly waiting for kernels to start, which a batch does once; a large one waits for the part of its
# decomposition that is computed on the host, while other streams use the GPU.
_STREAMED_SIZE = 256
_STREAMS = 4


def eigenvectors(covariances: Mapping[str, Tensor], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues and eigenvectors by name: those of one size in batches, and equal matrices once.

    Args:
        device: where they are found; they are returned on that of the covariances.

    Raises:
        LossError: a covariance is not finite, or its eigenvectors are not found.
    """
    first: dict[tuple[int, float], str] = {}  # equal matrices have equal sums, and rarely do others
    same: dict[str, str] = {}
    sizes: dict[int, list[str]] = {}
    for name, matrix in covariances.items():
        total = finite_sum(matrix, name)
        other = first.setdefault((len(matrix), total), name)
        same[name] = other if torch.equal(covariances[other], matrix) else name
        if same[name] == name:
            sizes.setdefault(len(matrix), []).append(name)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for size, names in sizes.items():
        matrices = {name: covariances[name] for name in names}
        found.update(decomposed(matrices, device, chosen_way(len(names), size, device)))
    # Copies: tensors that share memory cannot be stored side by side.
    for name, other in same.items():
        if name != other:
            eigenvalues, vectors = found[other]
            found[name] = eigenvalues.clone(), vectors.clone()
    return found


def finite_sum(matrix: Tensor, name: str) -> float:
    """The sum of a covariance `LAYER.FACTOR`.

    Raises:
        LossError: it is not finite.
    """
    total = float(matrix.sum(dtype=_eigh_dtype(matrix.device)))
    if not math.isfinite(total):
        raise LossError(
            f"Layer {name.rpartition('.')[0]!r}: its covariance is not finite. Some activation or gradient overflowed; "
            "load the model in float32 or bfloat16 rather than float16."
        )
    return total


def _eigh_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def chosen_way(count: int, size: int, device: torch.device) -> Way:
    """How `count` matrices of one size are decomposed on a device; all ways find the same."""
    if device.type == "cuda" and size >= _STREAMED_SIZE:
        return "looped" if count == 1 else "streams"
    return "batched"


def decomposed(matrices: Mapping[str, Tensor], device: torch.device, way: Way) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] as columns of symmetric matrices of one size.

    Args:
        matrices: covariances by name, `LAYER.FACTOR`, finite; results are on their device, in their type.
        device: where they are decomposed.

    Raises:
        LossError: the eigenvectors of one are not found, neither there nor on the CPU.
    """
    names, size = list(matrices), len(next(iter(matrices.values())))
    count = max(1, _EIGH_BYTES // (8 * size**2)) if way == "batched" else 1
    batches = [{name: matrices[name] for name in names[start : start + count]} for start in range(0, len(names), count)]
    if way != "streams":
        return {name: pair for batch in batches for name, pair in _solved(batch, device).items()}

    def solve(batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        with _own_stream(device, ready):
            return _solved(batch, device)

    # PyTorch loads its library of linear algebra at the first call, which must not come from two threads.
    torch.linalg.eigh(torch.ones(1, 1, dtype=_eigh_dtype(device), device=device))
    ready = torch.cuda.current_stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(_STREAMS) as pool:
        found = {name: pair for solved in pool.map(solve, batches) for name, pair in solved.items()}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what these streams have set aside, no other can use
    return found


@contextmanager
def _own_stream(device: torch.device, ready: torch.cuda.Stream | None) -> Iterator[None]:
    """A stream of the calling thread's own, from when `ready` has come so far, until it has done everything."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(ready)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def _solved(matrices: Mapping[str, Tensor], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Those of a batch; one by one where together they are not found, and on the CPU what is not found by itself."""
    host = device.type == "cpu"
    try:
        return dict(zip(matrices, zip(*_eigh(list(matrices.values()), device), strict=True), strict=True))
    except RuntimeError as error:
        if len(matrices) == 1 and host:
            if out_of_memory(error):
                raise
            name, matrix = next(iter(matrices.items()))
            layer, _, factor = name.rpartition(".")
            raise LossError(
                f"Layer {layer!r}: the eigenvectors of its covariance of {factor} {list(matrix.shape)} were not found "
                f"in float64 on the CPU, though it is finite (its numbers reach {float(matrix.abs().max()):.3g}). "
                "Leave the layer out with `layers=[...]`, or use the strategy 'diagonal'."
            ) from error
        reason = first_line(error)
    # Here, where the error no longer keeps what was computed alive.
    if len(matrices) > 1:
        return {name: pair for name, each in matrices.items() for name, pair in _solved({name: each}, device).items()}
    logger.warning(f"{next(iter(matrices))}: its eigenvectors were not found on {device} ({reason}); trying the CPU.")
    return _solved(matrices, torch.device("cpu"))


def _eigh(matrices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Eigenvalues [count, n] and eigenvectors [count, n, n] of symmetric matrices of one size."""
    origin, dtype = matrices[0].device, matrices[0].dtype
    stacked = torch.stack([each.to(device, _eigh_dtype(device)) for each in matrices])
    eigenvalues, vectors = torch.linalg.eigh(stacked)
    # A covariance has no negative eigenvalue; what is below zero is rounding.
    return eigenvalues.clamp_min(0).to(origin, dtype), vectors.to(origin, dtype)
