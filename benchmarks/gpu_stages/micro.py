"""The machine, and the rates and errors of single operations on it. It must not know the library that they are for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch
from torch import Tensor
from workload import provenance

from gpu_stages.report import Figures, Report, Setting, UnavailableError
from gpu_stages.timing import once, relative_error, seconds

# Relative errors of products with float32 sums, and of products of TF32 operands. Matrix units round long sums more
# than IEEE does; a sum or result in bfloat16 would be off by 1e-3, and one term of a matrix in bfloat16 too.
SUM_LIMIT, TF32_LIMIT = 2e-4, 1e-3
_PACKAGES = frozenset(
    {"torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "kronfluence", "psutil"}
)


def environment(report: Report, setting: Setting) -> None:
    """What the figures were measured with."""
    report.measure("provenance", provenance)
    report.measure("host", lambda: _host(setting))
    report.measure("gpu", lambda: _gpu(setting))


def _host(setting: Setting) -> Figures:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "scratch_free_bytes": shutil.disk_usage(setting.scratch).free,
        "packages": {each.name: each.version for each in distributions() if each.name in _PACKAGES},
        "kernel": Path("/proc/version").read_text().strip(),
    }


def _gpu(setting: Setting) -> Figures:
    if setting.device == "cpu":
        raise UnavailableError("the device is a CPU")
    properties = torch.cuda.get_device_properties(setting.device)
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        asked: told.stdout.strip() or told.stderr.strip(),
    }


def micro(report: Report, setting: Setting) -> None:
    """Rates, and errors against float64."""
    device, small = torch.device(setting.device), setting.rehearse
    torch.manual_seed(0)
    report.measure("copy", lambda: {"bytes_per_second": copy_speed(device, 2**22 if small else 2**31)})
    for name, dtype, tf32 in _KINDS:
        size = 256 if small else 8192
        report.measure(f"product, {name}", partial(_product_figures, device, dtype, tf32, size))
    report.measure("out_dtype", lambda: _out_dtype(device, small))
    report.measure("bank product", lambda: _bank_product(device, small))
    report.measure("rotation", lambda: _rotation(device, 128 if small else 3073))
    for size in (24, 33) if small else (769, 2304, 3073):
        report.measure(f"eigenvectors of {size}", partial(_eigenvectors, device, size, 3))


_KINDS = (("bfloat16", torch.bfloat16, False), ("TF32", torch.float32, True), ("float32", torch.float32, False))


def copy_speed(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes within the device's memory."""
    source, target = (torch.randn(size // 4, device=device) for _ in range(2))
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device)


def product_speed(device: torch.device, dtype: torch.dtype, tf32: bool, size: int) -> float:
    """Operations a second of a product of two square matrices of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with tf32_products(tf32):
        return 2 * size**3 / seconds(lambda: left @ right, device)


class tf32_products:  # noqa: N801  (a context manager, named as torch names its own)
    """Within it, float32 products on a GPU are of TF32 operands, or are not."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self._enabled

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before


def _product_figures(device: torch.device, dtype: torch.dtype, tf32: bool, size: int) -> Figures:
    return {"size": size, "operations_per_second": product_speed(device, dtype, tf32, size)}


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """A product of bfloat16 matrices, or of batches of them, in float32; a CPU has it only of float32 operands."""
    if left.device.type == "cpu":
        return left.float() @ right.float()
    return (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out_dtype=torch.float32)


def _out_dtype(device: torch.device, small: bool) -> Figures:
    """Aligned sizes and those that a bias or a vocabulary makes, which other kernels multiply."""
    shapes = [(64, 40, 33), (3, 16, 17, 24)] if small else [
        (512, 4096, 768), (481, 50257, 65), (769, 3073, 769), (64, 1, 769), (8, 512, 768, 768), (7, 511, 769, 65),
    ]  # fmt: skip
    errors = {}
    for *batch, rows, inner, columns in shapes:
        left = torch.randn(*batch, rows, inner, device=device).bfloat16()
        right = torch.randn(*batch, inner, columns, device=device).bfloat16()
        errors[f"{[*batch, rows, inner]} x {[inner, columns]}"] = relative_error(
            _wide_product(left, right), left.cpu().double() @ right.cpu().double()
        )
    return {"relative_errors": errors, "passed": all(error < SUM_LIMIT for error in errors.values())}


def _bank_product(device: torch.device, small: bool) -> Figures:
    """Resident query gradients times a batch's: few rows and columns, and a very long sum, whole and in pieces."""
    queries, batch, found = (5, 3, {}) if small else (481, 64, dict[str, Figures]())
    for length in (2**10, 2**12) if small else (768 * 768, 768 * 2304, 768 * 3072):
        bank = torch.randn(queries, length, device=device, dtype=torch.bfloat16)
        train = torch.randn(batch, length, device=device, dtype=torch.bfloat16)
        operations = 2 * queries * batch * length
        rates = {"whole": operations / seconds(lambda: _wide_product(bank, train.T), device)}  # noqa: B023
        for pieces in (8, 32, 128):
            rates[f"{pieces} pieces"] = operations / seconds(partial(_split_product, bank, train, pieces), device)
        found[str(length)] = {"operations_per_second": rates}
    return {"queries": queries, "batch": batch, "lengths": found}


def _split_product(bank: Tensor, train: Tensor, pieces: int) -> Tensor:
    left = bank.unflatten(1, (pieces, -1)).transpose(0, 1)
    right = train.unflatten(1, (pieces, -1)).permute(1, 2, 0)
    return _wide_product(left, right).sum(0)


def _rotation(device: torch.device, size: int) -> Figures:
    """Vectors times an orthogonal matrix, against float64."""
    matrix = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    vectors = torch.randn(256, size, dtype=torch.float64).bfloat16()
    expected, wide = vectors.double() @ matrix, matrix.float().to(device)
    given = vectors.to(device)
    high = wide.bfloat16()
    low = (wide - high).bfloat16()
    errors = {}
    for name, tf32 in (("float32", False), ("TF32", True)):
        with tf32_products(tf32):
            errors[name] = relative_error(given.float() @ wide, expected)
    errors["bfloat16, one term"] = relative_error(_wide_product(given, high), expected)
    errors["bfloat16, two terms"] = relative_error(_wide_product(given, high) + _wide_product(given, low), expected)
    right = errors["float32"] < SUM_LIMIT and errors["bfloat16, two terms"] < SUM_LIMIT
    return {"relative_errors": errors, "passed": right and errors["TF32"] < TF32_LIMIT}


def _eigenvectors(device: torch.device, size: int, count: int) -> Figures:
    """Seconds for `count` matrices, in float64: in one call, one after another, and on streams of their own."""
    rows = torch.randn(count, 2 * size, size, device=device, dtype=torch.float64)
    matrices = rows.transpose(1, 2) @ rows / rows.shape[1]
    ways: dict[str, Callable[[], object]] = {
        "batched": lambda: torch.linalg.eigh(matrices),
        "looped": lambda: [torch.linalg.eigh(each) for each in matrices],
        "on streams": lambda: _on_streams(matrices),
        "looped, float32": lambda: [torch.linalg.eigh(each) for each in matrices.float()],
    }
    torch.linalg.eigh(matrices[0])  # the first makes handles and chooses kernels
    taken = {name: once(way, device) for name, way in ways.items()}
    values, vectors = torch.linalg.eigh(matrices[0])
    error = relative_error((vectors * values) @ vectors.T, matrices[0])
    return {"count": count, "seconds": taken, "relative_error": error, "passed": error < 1e-10}


def _on_streams(matrices: Tensor) -> list[Tensor]:
    """From a thread each: the solver waits for the device within a call."""

    def solve(matrix: Tensor) -> Tensor:
        own = torch.cuda.stream(torch.cuda.Stream()) if matrix.device.type == "cuda" else nullcontext()
        with own:
            found: Tensor = torch.linalg.eigh(matrix).eigenvectors
        return found

    with ThreadPoolExecutor(len(matrices)) as pool:
        return list(pool.map(solve, matrices))
