"""What a run on paper would take, as tables in the terminal and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wherefrom.cli.calculator import REACHABLE, Estimate, Stage
from wherefrom.report.html import package_templates, security_policy
from wherefrom.runtime.memory import FREE_SHARE
from wherefrom.store.space import peak

GIB = 2**30


@dataclass(frozen=True)
class Section:
    """A table: its first column is words, the others are numbers.

    Attributes:
        note: a sentence on how to read it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def scale_text(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> RenderableType:
    """Everything for the terminal, 100 columns wide or a few more."""
    parts: list[RenderableType] = [Text(summary(estimate), style="bold"), Text(verdict(estimate)), Text()]
    for section in sections(estimate, alternatives):
        table = Table(section.headings[0], title=section.title, title_justify="left", caption_justify="left")
        for heading in section.headings[1:]:
            table.add_column(heading, justify="right")
        for row in section.rows:
            table.add_row(*row)
        table.caption = section.note
        parts += [table, Text()]
    parts.append(Text("\n".join(["Assumed:", *(f"- {each}" for each in assumptions(estimate))])))
    return Group(*parts)


def scale_page(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> str:
    """The same as an HTML page without scripts."""
    templates = package_templates()
    style = "".join(templates.get_template(name).render() for name in ("report.css", "scale.css"))
    return templates.get_template("scale.html").render(
        style=style,
        policy=security_policy(style, ""),
        title=f"{estimate.blueprint.name} on {_ranks(estimate)}: a plan on paper",
        summary=summary(estimate),
        verdict=verdict(estimate),
        fits=estimate.lacking is None,
        sections=sections(estimate, alternatives),
        assumptions=assumptions(estimate),
    )


def summary(estimate: Estimate) -> str:
    """What is planned."""
    blueprint, asked = estimate.blueprint, estimate.request
    tracked = sum(outputs * inputs for outputs, inputs in (layer.shape for layer in blueprint.layers.values()))
    return (
        f"{blueprint.name}: {blueprint.weights / 1e9:,.2f}B weights, {tracked / 1e9:,.2f}B of them tracked in "
        f"{len(blueprint.layers)} layers; {asked.queries:,} queries against {asked.train:,} training sequences of "
        f"{blueprint.example.tokens:,} tokens, {asked.strategy} factors of {asked.fit_train:,}, on {_ranks(estimate)} "
        f"of {estimate.hardware.memory / GIB:,.0f} GiB."
    )


def verdict(estimate: Estimate) -> str:
    """Whether it fits, what decides, how long it takes."""
    plan, peak, slowest = estimate.plan, estimate.peak, max(estimate.stages, key=lambda stage: stage.seconds)
    largest = max(peak.memory, key=lambda name: peak.memory[name])
    fits = "Fits" if estimate.lacking is None else f"Does not fit, there is too little {estimate.lacking}"
    reach, least = REACHABLE * estimate.hardware.memory, sum(stage.least_seconds for stage in estimate.stages)
    rank = f"rank {plan.form.rank}" if plan.form.rank else "whole"
    rank += f", {plan.form.bits}-bit integers" if plan.form.bits else ""
    return (
        f"{fits}: {peak.name} takes the most memory, {_gib(peak.bytes)} of {_gib(reach)} GiB within reach on each "
        f"device, most of it for {largest} ({_gib(peak.memory[largest])} GiB). It takes {duration(estimate.seconds)}, "
        f"no less than {duration(least)}; the longest stage is {slowest.name}, bound by {_bound(estimate, slowest)}. "
        f"{plan.block} of {plan.job.queries} query gradients are resident ({rank}, {_gib(plan.bank_bytes)} GiB on the "
        f"{'host' if plan.form.streamed else 'device'}), so the training set is swept "
        f"{'once' if plan.sweeps == 1 else f'{plan.sweeps} times'}, in batches of {plan.train_batch}."
    )


def sections(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> list[Section]:
    """The tables."""
    return [_time(estimate), _memory(estimate), _storage(estimate), _alternatives(estimate, alternatives)]


def _time(estimate: Estimate) -> Section:
    rows = [
        [
            stage.name, f"{stage.passes:,}" if stage.passes else "-", f"{stage.flop / 1e15:,.2f}",
            _gib(stage.sent), _gib(stage.copied), duration(stage.seconds), duration(stage.least_seconds),
        ]
        for stage in estimate.stages
    ]  # fmt: skip
    totals = [sum(each) for each in zip(*((s.seconds, s.least_seconds) for s in estimate.stages), strict=True)]
    rows.append(["in all", "", "", "", "", *map(duration, totals)])
    return Section(
        "Time",
        ("Stage", "Passes", "PFLOP", "Sent, GiB", "Copied, GiB", "Time", "At least"),
        rows,
        "Passes and operations over all ranks; bytes sent between ranks, and copied to or from the host, for each.",
    )


def _memory(estimate: Estimate) -> Section:
    names = list(dict.fromkeys(name for stage in estimate.stages for name in stage.memory))
    rows = [
        [stage.name, *(_gib(stage.memory.get(name, 0)) for name in names), _gib(stage.bytes)]
        for stage in estimate.stages
    ]
    return Section("Memory of each device, GiB", ("Stage", *(name.capitalize() for name in names), "In all"), rows)


def _storage(estimate: Estimate) -> Section:
    rows = [["each rank's host, at the most", _gib(estimate.host_bytes)]]
    rows += [[f"disk: {step.name}", _gib(step.kept)] for step in estimate.disk.values()]
    rows.append(["disk: at the most at once, with copies and partial sums", _gib(peak(estimate.disk.values()))])
    return Section("Host memory and disk, GiB", ("What", "GiB"), rows)


def _alternatives(estimate: Estimate, alternatives: Mapping[str, Estimate]) -> Section:
    rows = [
        [
            name, "yes" if other.lacking is None else "no", _gib(other.peak.bytes), _gib(other.host_bytes),
            f"{other.plan.sweeps:,}", duration(other.seconds), _gib(peak(other.disk.values())),
        ]
        for name, other in {"as asked": estimate, **alternatives}.items()
    ]  # fmt: skip
    headings = ("Options", "Fits", "Device, GiB", "Host, GiB", "Sweeps", "Time", "Disk, GiB")
    return Section("With other options", headings, rows)


def assumptions(estimate: Estimate) -> list[str]:
    """What the numbers rest on."""
    hardware, asked = estimate.hardware, estimate.request
    kind, attention = "float32", "attention as products of matrices"
    if asked.half_precision:
        kind, attention = (
            "bfloat16",
            "activations too (a norm that runs in float32 keeps a little more), fused attention",
        )
    found = [
        f"A large product reaches {hardware.matmul / 1e12:,.3g} TFLOP/s on each rank, and a stage "
        f"{hardware.efficiency:.0%} of that; eigendecompositions {hardware.eigen / 1e12:,.3g} TFLOP/s, at 9 n^3 "
        "operations each, spread over the ranks by layer.",
        f"Ranks exchange {hardware.link / 1e9:,.4g} GB/s, a device and its host {hardware.copy / 1e9:,.4g} GB/s. Time "
        "adds up arithmetic, exchange and copies; 'at least' takes the longest of the three, at full speed.",
        f"Weights in {kind}, {attention}, factors in float32; every sequence has the full length, queries too.",
        "Operations and bytes of an example are counted by running the library on tensors without numbers; what else "
        "is counted is what the library plans with, and its factors are there twice while they are in use.",
        f"{1 - REACHABLE:.0%} of a memory is the runtime's; {FREE_SHARE:.0%} of what weights leave is planned with.",
    ]
    if hardware.ranks > 1:
        found.append(
            "Every rank sweeps its share and holds all factors and resident query gradients; what is collected, scores "
            "too, is added up over the ranks."
        )
    if asked.shard_model:
        found.append("Weights are gathered block by block for every batch, forward and backward, with one block ahead.")
    if asked.offload_factors:
        found.append("Sums and factors lie on each rank's host, and those of a layer are copied in every batch.")
    return found


def _bound(estimate: Estimate, stage: Stage) -> str:
    """What takes the most time of a stage."""
    sent, copied = stage.sent / estimate.hardware.link, stage.copied / estimate.hardware.copy
    parts = {"exchange between ranks": sent, "copies to and from the host": copied}
    parts["arithmetic"] = stage.seconds - sent - copied
    return max(parts, key=lambda name: parts[name])


def duration(seconds: float) -> str:
    """Two digits or three, in the unit that gives them."""
    for unit, size in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _gib(size: float) -> str:
    if not size:
        return "-"
    return f"{size / GIB:,.1f}" if size >= 0.05 * GIB else "<0.1"


def _ranks(estimate: Estimate) -> str:
    ranks, kind = estimate.hardware.ranks, estimate.hardware.device.type
    name = "GPU" if kind == "cuda" else kind.upper()
    return f"{ranks} {name}{'s' if ranks > 1 else ''}"
