"""What a plan has to know of a machine besides its device's memory: how fast it multiplies and copies, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from wherefrom.runtime.memory import free_memory


@dataclass(frozen=True)
class Machine:
    """Speeds of a machine, and what is free on its host.

    Attributes:
        matmul: floating-point operations a second of a large product.
        copy: bytes a second from the host's memory to the device.
        host: bytes that are free on the host.
    """

    matmul: float
    copy: float
    host: int

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This machine, with a GPU."""
        return cls(matmul_speed(device, dtype), copy_speed(device), free_memory(torch.device("cpu")))


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product, measured."""
    half = dtype == torch.bfloat16 and device.type == "cuda"
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype if half else torch.float32, device=device)
    return 2 * size**3 / _best_seconds(lambda: matrix @ matrix, device)


def copy_speed(device: torch.device) -> float:
    """Bytes a second from the host's pinned memory to a device, measured."""
    host = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    return host.numel() / _best_seconds(lambda: host.to(device, non_blocking=True), device)


def _best_seconds(action: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(once() for _ in range(4))
