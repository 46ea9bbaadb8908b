"""The subcommand `wherefrom plan`: a calculator for runs that do not exist yet, in the terminal and on an HTML page.

The arithmetic is `calculator`'s; here is what is asked of it, and what is said of its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console, Group, RenderableType
from rich.text import Text

from wherefrom.cli.calculator import REACHABLE, Estimate, Hardware, Request
from wherefrom.hf.blueprint import Blueprint, measure
from wherefrom.planning.machine import matmul_speed
from wherefrom.planning.stages import GIB, Section, Stage, duration, gib, operations, stage_table
from wherefrom.report.html import package_templates, security_policy, write_page
from wherefrom.runtime.memory import FREE_SHARE, free_memory
from wherefrom.store.space import peak

# The lowest of the parts that `benchmarks/efficiency.py` has measured, 0.56 to 0.66, rounded down.
_MEASURED_EFFICIENCY = 0.55


@dataclass(frozen=True, kw_only=True)
class PlanArguments(Request):
    """A run and the machine for it.

    Attributes:
        model: 'gpt2', 'smollm2-135m', 'llama-3-8b', 'llama-3-70b', a model directory or its config.json.
        length: Tokens of every sequence.
        layers: Names or patterns of the layers to track, such as '*.mlp.*'; linear ones but the head by default.
        ranks: GPUs, each with a share of the training set.
        device_memory: GiB of each; this machine's free memory by default.
        flops: TFLOP/s that a large product reaches on each GPU; measured on this machine by default, on its GPU if it
            has one.
        efficiency: The part of a large product's speed that a stage reaches; by default the lowest that was measured,
            on a CPU.
        eigen_flops: TFLOP/s of eigendecompositions in float64.
        bandwidth: GB/s between ranks.
        host_bandwidth: GB/s between a device and its host.
        host_memory: GiB of the host for each rank.
        page: Also write an HTML page.
    """

    model: str
    length: int = 512
    layers: tuple[str, ...] = ()
    ranks: int = 1
    device_memory: float | None = None
    flops: float | Literal["measured"] = "measured"
    efficiency: float = _MEASURED_EFFICIENCY
    eigen_flops: float = 1.0
    bandwidth: float = 100.0
    host_bandwidth: float = 25.0
    host_memory: float = 256.0
    page: Path | None = None

    @cached_property
    def estimate(self) -> Estimate:
        """The run on paper."""
        hardware = self._hardware()
        return Estimate(self._measured(self.half_precision, hardware.device), self, hardware)

    def alternatives(self) -> dict[str, Estimate]:
        """The same run with other options."""
        estimate, half = self.estimate, self.half_precision
        other = self._measured(not half, estimate.hardware.device)
        return estimate.alternatives({half: estimate.blueprint, not half: other})

    def _measured(self, half: bool, device: torch.device) -> Blueprint:
        return measure(self.model, self.length, half_precision=half, patterns=self.layers or None, device=device)

    def _hardware(self) -> Hardware:
        """The machine that is meant; this one, where a figure is to be measured."""
        here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.flops == "measured":
            device, matmul = here, matmul_speed(here, torch.bfloat16 if self.half_precision else torch.float32)
        else:
            device, matmul = torch.device("cuda"), self.flops * 1e12
        return Hardware(
            ranks=self.ranks,
            memory=free_memory(here) if self.device_memory is None else self.device_memory * GIB,
            host=int(self.host_memory * GIB),
            matmul=matmul,
            eigen=self.eigen_flops * 1e12,
            efficiency=self.efficiency,
            link=self.bandwidth * 1e9,
            copy=self.host_bandwidth * 1e9,
            device=device,
        )


def plan(run: tyro.conf.OmitArgPrefixes[PlanArguments]) -> None:
    """Estimate time, memory and disk of a run that does not exist yet; needs neither weights nor data nor a GPU."""
    estimate, alternatives = run.estimate, run.alternatives()
    console = Console()
    console.print(estimate_text(estimate, alternatives))
    if run.page is not None:
        write_page(run.page, estimate_page(estimate, alternatives))
        console.print(f"The page is {run.page}", soft_wrap=True)


def estimate_text(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> RenderableType:
    """Everything for the terminal, 100 columns wide or a few more."""
    parts: list[RenderableType] = [Text(_summary(estimate), style="bold"), Text(_verdict(estimate)), Text()]
    for section in sections(estimate, alternatives):
        parts += [section.table(), Text()]
    parts.append(Text("\n".join(["Assumed:", *(f"- {each}" for each in _assumptions(estimate))])))
    return Group(*parts)


def estimate_page(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> str:
    """The same as an HTML page without scripts."""
    templates = package_templates()
    style = "".join(templates.get_template(name).render() for name in ("report.css", "scale.css"))
    return templates.get_template("scale.html").render(
        style=style,
        policy=security_policy(style, ""),
        title=f"{estimate.blueprint.name} on {_ranks(estimate.hardware)}: a plan on paper",
        summary=_summary(estimate),
        verdict=_verdict(estimate),
        fits=estimate.lacking is None,
        sections=sections(estimate, alternatives),
        assumptions=_assumptions(estimate),
    )


def _summary(estimate: Estimate) -> str:
    """What is planned."""
    blueprint, request, hardware = estimate.blueprint, estimate.request, estimate.hardware
    tracked = sum(outputs * inputs for outputs, inputs in (layer.shape for layer in blueprint.layers.values()))
    return (
        f"{blueprint.name}: {blueprint.weights / 1e9:,.2f}B weights, {tracked / 1e9:,.2f}B of them tracked in "
        f"{len(blueprint.layers)} layers; {request.queries:,} queries against {request.train:,} training sequences of "
        f"{blueprint.example.tokens:,} tokens, {request.strategy} factors of {estimate.plan.job.fitted:,}, on "
        f"{_ranks(hardware)} of {hardware.memory / GIB:,.0f} GiB."
    )


def _verdict(estimate: Estimate) -> str:
    """Whether it fits, what decides, how long it takes, and how it is planned."""
    most, slowest = estimate.peak, max(estimate.stages, key=lambda stage: stage.seconds)
    fits = "Fits" if estimate.lacking is None else f"Does not fit, there is too little {estimate.lacking}"
    least = sum(stage.least_seconds for stage in estimate.stages)
    return (
        f"{fits}: {most.name} takes the most memory, {gib(most.bytes)} of {gib(REACHABLE * estimate.hardware.memory)} "
        f"GiB within reach on each device, most of it for {max(most.memory, key=lambda name: most.memory[name])}. It "
        f"takes {duration(estimate.seconds)}, no less than {duration(least)}; the longest stage is {slowest.name}, "
        f"bound by {_bound(estimate.hardware, slowest)}. {estimate.plan}"
    )


def sections(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> list[Section]:
    """The tables: stages twice, what is stored, and other options."""
    stages = estimate.stages
    flop, least = sum(each.flop for each in stages), sum(each.least_seconds for each in stages)
    total = Stage("in all", 0, flop, {}, seconds=estimate.seconds, least_seconds=least)
    figures = ("Passes", "Operations", "Sent, GiB", "Copied, GiB", "Time", "At least")
    note = "Passes and operations over all ranks; bytes sent between ranks, and copied to or from the host, for each."
    names = list(dict.fromkeys(name for stage in stages for name in stage.memory))
    memory = [[each.name, *(gib(each.memory.get(name, 0)) for name in names), gib(each.bytes)] for each in stages]
    steps = estimate.disk.values()
    stored = {
        "each rank's host, at the most": estimate.host_bytes,
        **{f"disk: {step.name}": step.stored for step in steps},
        "disk: at the most at once, with copies and partial sums": peak(steps),
    }
    headings = ("Options", "Fits", "Device, GiB", "Host, GiB", "Sweeps", "Time", "Disk, GiB")
    others = {"as given": estimate, **alternatives}.items()
    return [
        stage_table("Time", [*stages, total], figures, note),
        Section("Memory of each device, GiB", ("Stage", *(name.capitalize() for name in names), "In all"), memory),
        Section("Host memory and disk, GiB", ("What", "GiB"), [[name, gib(size)] for name, size in stored.items()]),
        Section("With other options", headings, [_option(*each) for each in others]),
    ]


def _option(name: str, estimate: Estimate) -> list[str]:
    """A row of the table of other options."""
    fits, sizes = "yes" if estimate.lacking is None else "no", (estimate.peak.bytes, estimate.host_bytes)
    sweeps, disk = f"{estimate.plan.sweeps:,}", gib(peak(estimate.disk.values()))
    return [name, fits, *map(gib, sizes), sweeps, duration(estimate.seconds), disk]


def _assumptions(estimate: Estimate) -> list[str]:
    """What the figures rest on."""
    hardware, request = estimate.hardware, estimate.request
    kind, attention = "float32", "attention as products of matrices"
    if request.half_precision:
        kind, attention = "bfloat16", "activations too but for norms in float32, fused attention"
    found = [
        f"A large product reaches {operations(hardware.matmul)}/s on each rank and a stage {hardware.efficiency:.0%} "
        f"of that; an eigendecomposition takes 9 n^3 operations at {operations(hardware.eigen)}/s, each layer's on one "
        "rank.",
        f"Ranks exchange {hardware.link / 1e9:,.4g} GB/s, a device and its host {hardware.copy / 1e9:,.4g} GB/s. Time "
        "is the sum of arithmetic, exchange and copies; 'at least' is the longest of them at full speed.",
        f"Weights are {kind}, {attention}, factors float32, and there twice while they are in use. Every sequence has "
        "the full length, queries too.",
        "A sequence's operations and bytes are counted by running the library on tensors without numbers.",
        f"{1 - REACHABLE:.0%} of a memory is the runtime's; {FREE_SHARE:.0%} of what weights leave is planned with.",
    ]
    if hardware.ranks > 1:
        found.append(
            "Every rank sweeps its share and holds all factors and resident query gradients; what is collected, scores "
            "too, is added up over the ranks."
        )
    if request.shard_model:
        found.append("Weights are gathered block by block for every batch, forward and backward, with one block ahead.")
    if request.offload_factors:
        found.append("Sums and factors lie on each rank's host, and those of a layer are copied in every batch.")
    return found


def _bound(hardware: Hardware, stage: Stage) -> str:
    """What takes the most time of a stage."""
    sent, copied = stage.sent / hardware.link, stage.copied / hardware.copy
    parts = {"exchange between ranks": sent, "copies to and from the host": copied}
    parts["arithmetic"] = stage.seconds - sent - copied
    return max(parts, key=lambda name: parts[name])


def _ranks(hardware: Hardware) -> str:
    name = "GPU" if hardware.device.type == "cuda" else hardware.device.type.upper()
    return f"{hardware.ranks} {name}{'s' if hardware.ranks > 1 else ''}"
