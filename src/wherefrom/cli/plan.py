"""The subcommand `wherefrom plan`: a calculator for runs that do not exist yet.

It turns arguments into a blueprint and an estimate; the arithmetic is `calculator`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from wherefrom.cli.calculator import MEASURED_EFFICIENCY, Estimate, Hardware, Request
from wherefrom.cli.scale import scale_page, scale_text
from wherefrom.hf.blueprint import Blueprint, measure
from wherefrom.planning.machine import matmul_speed
from wherefrom.report.html import write_page
from wherefrom.runtime.memory import free_memory


@dataclass(frozen=True)
class PlanArguments:
    """A run and the machine for it.

    Attributes:
        model: 'gpt2', 'smollm2-135m', 'llama-3-8b', 'llama-3-70b', a model directory or its config.json.
        train: Training sequences.
        queries: Query sequences.
        length: Tokens of every sequence.
        ranks: GPUs, each with a share of the training set.
        device_memory: GiB of each; this machine's free memory by default.
        flops: TFLOP/s that a large product reaches on each GPU; measured on this machine by default, on its GPU if it
            has one.
        strategy: The curvature.
        layers: Names or patterns of the layers to track, such as '*.mlp.*'; linear ones but the head by default.
        fit_train: Fit the factors on so many of the training sequences; on all by default.
        half_precision: bfloat16 weights, products and query gradients.
        query_rank: Keep query gradients as pairs of matrices of this rank.
        query_bits: 8 keeps query gradients as integers of that size, with scales.
        shard_model: Keep the weights in parts on the ranks (FSDP) instead of whole on each.
        offload_factors: Keep factors on the host, and move a layer's when it is its turn.
        top: Keep only so many of each query's scores instead of the matrix.
        batch_size: Sequences a batch on each GPU; found by default.
        efficiency: The part of a large product's speed that a stage reaches; by default the lowest that was measured,
            on a CPU.
        eigen_flops: TFLOP/s of eigendecompositions in float64.
        bandwidth: GB/s between ranks.
        host_bandwidth: GB/s between a device and its host.
        host_memory: GiB of the host for each rank.
        page: Also write an HTML page.
    """

    model: str
    train: int
    queries: int
    length: int = 512
    ranks: int = 1
    device_memory: float | None = None
    flops: float | Literal["measured"] = "measured"
    strategy: Literal["identity", "diagonal", "kfac", "ekfac", "shampoo"] = "ekfac"
    layers: tuple[str, ...] = ()
    fit_train: int | None = None
    half_precision: bool = False
    query_rank: int | None = None
    query_bits: int | None = None
    shard_model: bool = False
    offload_factors: bool = False
    top: int | None = None
    batch_size: int | None = None
    efficiency: float = MEASURED_EFFICIENCY
    eigen_flops: float = 1.0
    bandwidth: float = 100.0
    host_bandwidth: float = 25.0
    host_memory: float = 256.0
    page: Path | None = None

    @cached_property
    def estimate(self) -> Estimate:
        """The run on paper."""
        request = Request(
            strategy=self.strategy,
            train=self.train,
            fit_train=self.train if self.fit_train is None else self.fit_train,
            queries=self.queries,
            query_rank=self.query_rank,
            query_bits=self.query_bits,
            half_precision=self.half_precision,
            shard_model=self.shard_model,
            offload_factors=self.offload_factors,
            top=self.top,
            batch_size=self.batch_size,
        )
        hardware = self._hardware()
        return Estimate(self._measured(self.half_precision, hardware.device), request, hardware)

    def alternatives(self) -> dict[str, Estimate]:
        """The same run with other options."""
        estimate, half = self.estimate, self.half_precision
        other = self._measured(not half, estimate.hardware.device)
        return estimate.alternatives({half: estimate.blueprint, not half: other})

    def _measured(self, half: bool, device: torch.device) -> Blueprint:
        return measure(self.model, self.length, half_precision=half, patterns=self.layers or None, device=device)

    def _hardware(self) -> Hardware:
        """The machine that is asked for; this one, where a figure is to be measured."""
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        memory = free_memory(here) if self.device_memory is None else self.device_memory * 2**30
        if self.flops == "measured":
            device, matmul = here, matmul_speed(here, torch.bfloat16 if self.half_precision else torch.float32)
        else:
            device, matmul = torch.device("cuda"), self.flops * 1e12
        return Hardware(
            ranks=self.ranks,
            memory=memory,
            host_memory=self.host_memory * 2**30,
            matmul=matmul,
            eigen=self.eigen_flops * 1e12,
            efficiency=self.efficiency,
            link=self.bandwidth * 1e9,
            copy=self.host_bandwidth * 1e9,
            device=device,
        )


def plan(arguments: Annotated[PlanArguments, tyro.conf.arg(name="")]) -> None:
    """Estimate time, memory and disk of a run that does not exist yet; needs neither weights nor data nor a GPU."""
    estimate, alternatives = arguments.estimate, arguments.alternatives()
    console = Console()
    console.print(scale_text(estimate, alternatives))
    if arguments.page is not None:
        write_page(arguments.page, scale_page(estimate, alternatives))
        console.print(f"The page is {arguments.page}", soft_wrap=True)
