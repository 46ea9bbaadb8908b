"""Seconds of work on a device, and how far one result is from another."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median time of a call, after two that do not count; on a GPU by its own clock."""
    for _ in range(2):
        function()
    return median(_gpu_seconds(function) if device.type == "cuda" else _seconds(function) for _ in range(repeats))


def once(function: Callable[[], object], device: torch.device) -> float:
    """The time of one call, by the host's clock, until the device is done."""

    def finished() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _seconds(finished)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference in units of the expected norm; NaN where either has one."""
    wide = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((wide[0] - wide[1]).norm() / wide[1].norm())


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _gpu_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
