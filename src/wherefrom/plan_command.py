"""The subcommand `wherefrom plan`: a calculator for runs that do not exist yet.

It turns arguments into a blueprint and an estimate; the arithmetic is `calculator`'s.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from wherefrom.blueprint import Blueprint, measure
from wherefrom.calculator import MEASURED_EFFICIENCY, Estimate, Hardware, Request
from wherefrom.memory import free_memory
from wherefrom.plan import matmul_speed
from wherefrom.report.scale import scale_page, scale_text
from wherefrom.store import write_text


def plan(
    *,
    model: str,
    train: int,
    queries: int,
    length: int = 512,
    ranks: int = 1,
    device_memory: float | None = None,
    flops: float | Literal["measured"] = "measured",
    strategy: Literal["identity", "diagonal", "kfac", "ekfac"] = "ekfac",
    layers: tuple[str, ...] = (),
    fit_train: int | None = None,
    half_precision: bool = False,
    query_rank: int | None = None,
    shard_model: bool = False,
    offload_factors: bool = False,
    top: int | None = None,
    batch_size: int | None = None,
    efficiency: float = MEASURED_EFFICIENCY,
    eigen_flops: float = 1.0,
    bandwidth: float = 100.0,
    host_bandwidth: float = 25.0,
    host_memory: float = 256.0,
    page: Path | None = None,
) -> None:
    """Estimate time, memory and disk of a run that does not exist yet; needs neither weights nor data nor a GPU.

    Args:
        model: 'gpt2', 'smollm2-135m', 'llama-3-8b', 'llama-3-70b', a model directory or its config.json.
        train: Training sequences.
        queries: Query sequences.
        length: Tokens of every sequence.
        ranks: GPUs, each with a share of the training set.
        device_memory: GiB of each; this machine's free memory by default.
        flops: TFLOP/s that a large product reaches on each GPU; measured on this machine by default, on its GPU if it
            has one.
        strategy: The curvature.
        layers: Names or patterns of the layers to track, such as 'model.layers.*.mlp.*'; all by default.
        fit_train: Fit the factors on so many of the training sequences; on all by default.
        half_precision: bfloat16 weights, products and query gradients.
        query_rank: Keep query gradients as pairs of matrices of this rank.
        shard_model: Keep the weights in parts on the ranks (FSDP) instead of whole on each.
        offload_factors: Keep factors on the host, and move a layer's when it is its turn.
        top: Keep only so many of each query's scores instead of the matrix.
        batch_size: Sequences a batch on each GPU; found by default.
        efficiency: The part of a large product's speed that a stage reaches; by default the lowest part that was
            measured, on a CPU.
        eigen_flops: TFLOP/s of eigendecompositions in float64.
        bandwidth: GB/s between ranks.
        host_bandwidth: GB/s between a device and its host.
        host_memory: GiB of the host for each rank.
        page: Also write an HTML page.
    """
    here = torch.device("cuda" if flops != "measured" or torch.cuda.is_available() else "cpu")
    speed = matmul_speed(here, _dtype(half_precision)) if flops == "measured" else flops * 1e12
    if device_memory is None:
        device_memory = free_memory(here if torch.cuda.is_available() else torch.device("cpu")) / 2**30
    hardware = Hardware(
        ranks=ranks,
        memory=device_memory * 2**30,
        host_memory=host_memory * 2**30,
        matmul=speed,
        eigen=eigen_flops * 1e12,
        efficiency=efficiency,
        link=bandwidth * 1e9,
        copy=host_bandwidth * 1e9,
        device=here,
    )
    request = Request(
        strategy=strategy,
        train=train,
        fit_train=train if fit_train is None else fit_train,
        queries=queries,
        query_rank=query_rank,
        half_precision=half_precision,
        shard_model=shard_model,
        offload_factors=offload_factors,
        top=top,
        batch_size=batch_size,
    )

    @cache
    def measured(half: bool) -> Blueprint:
        return measure(model, length, half_precision=half, patterns=layers or None, device=here)

    estimate = Estimate(measured(half_precision), request, hardware)
    alternatives = estimate.alternatives(measured)
    console = Console()
    console.print(scale_text(estimate, alternatives))
    if page is not None:
        write_text(page, scale_page(estimate, alternatives))
        console.print(f"The page is {page}", soft_wrap=True)


def _dtype(half_precision: bool) -> torch.dtype:
    return torch.bfloat16 if half_precision else torch.float32
