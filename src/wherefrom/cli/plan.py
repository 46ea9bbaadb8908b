"""The subcommand `wherefrom plan`: a calculator for runs that do not exist yet, in the terminal and on an HTML page.

The arithmetic is `calculator`'s; here is what is said of it.
"""

from __future__ import annotations

import tyro
from rich.console import Console, Group, RenderableType
from rich.text import Text

from wherefrom.cli.calculator import REACHABLE, Estimate, PlanArguments
from wherefrom.planning.stages import GIB, Section, Stage, duration, gib, operations, stage_table
from wherefrom.report.html import package_templates, security_policy, write_page
from wherefrom.runtime.memory import FREE_SHARE
from wherefrom.store.space import peak


def plan(run: tyro.conf.OmitArgPrefixes[PlanArguments]) -> None:
    """Estimate time, memory and disk of a run that does not exist yet; needs neither weights nor data nor a GPU."""
    estimate, console = Estimate(run), Console()
    console.print(estimate_text(estimate))
    if run.page is not None:
        write_page(run.page, estimate_page(estimate))
        console.print(f"The page is {run.page}", soft_wrap=True)


def estimate_text(estimate: Estimate) -> RenderableType:
    """Everything for the terminal, 100 columns wide or a few more."""
    parts: list[RenderableType] = [Text(_summary(estimate), style="bold"), Text(_verdict(estimate)), Text()]
    for section in sections(estimate):
        parts += [section.table(), Text()]
    parts.append(Text("\n".join(["Assumed:", *(f"- {each}" for each in _assumptions(estimate))])))
    return Group(*parts)


def estimate_page(estimate: Estimate) -> str:
    """The same as an HTML page without scripts."""
    templates = package_templates()
    style = "".join(templates.get_template(name).render() for name in ("report.css", "scale.css"))
    return templates.get_template("scale.html").render(
        style=style,
        policy=security_policy(style, ""),
        title=f"{estimate.blueprint.name} on {_ranks(estimate.arguments)}: a plan on paper",
        summary=_summary(estimate),
        verdict=_verdict(estimate),
        fits=estimate.lacking is None,
        sections=sections(estimate),
        assumptions=_assumptions(estimate),
    )


def _summary(estimate: Estimate) -> str:
    """What is planned."""
    blueprint, given = estimate.blueprint, estimate.arguments
    tracked = sum(outputs * inputs for outputs, inputs in (layer.shape for layer in blueprint.layers.values()))
    return (
        f"{blueprint.name}: {blueprint.weights / 1e9:,.2f}B weights, {tracked / 1e9:,.2f}B of them tracked in "
        f"{len(blueprint.layers)} layers; {given.queries:,} queries against {given.train:,} training sequences of "
        f"{blueprint.example.tokens:,} tokens, {given.strategy} factors of {estimate.plan.job.fit_train:,}, on "
        f"{_ranks(given)} of {given.memory / GIB:,.0f} GiB."
    )


def _verdict(estimate: Estimate) -> str:
    """Whether it fits, what decides, how long it takes, and how it is planned."""
    most, slowest = estimate.peak, max(estimate.stages, key=lambda stage: stage.seconds)
    fits = "Fits" if estimate.lacking is None else f"Does not fit, there is too little {estimate.lacking}"
    least, parts = sum(stage.least_seconds for stage in estimate.stages), estimate.parts(slowest)
    return (
        f"{fits}: {most.name} takes the most memory, {gib(most.bytes)} of {gib(REACHABLE * estimate.arguments.memory)} "
        f"GiB within reach on each device, most of it for {max(most.memory, key=lambda name: most.memory[name])}. It "
        f"takes {duration(estimate.seconds)}, no less than {duration(least)}; the longest stage is {slowest.name}, "
        f"bound by {max(parts, key=lambda name: parts[name])}. {estimate.plan}"
    )


def sections(estimate: Estimate) -> list[Section]:
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
    others = {"as given": estimate, **estimate.alternatives}.items()
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
    given, machine = estimate.arguments, estimate.arguments.machine
    kind, attention = "float32", "attention as products of matrices"
    if given.half_precision:
        kind, attention = "bfloat16", "activations too but for norms in float32, fused attention"
    found = [
        f"A large product reaches {operations(machine.matmul)}/s on each rank, and a stage {given.efficiency:.0%} of "
        f"that. An eigendecomposition takes 9 n^3 operations at {operations(given.eigen_flops * 1e12)}/s; each layer's "
        "is one rank's.",
        f"Ranks exchange {given.bandwidth:,.4g} GB/s, a device and its host {given.host_bandwidth:,.4g} GB/s. Time "
        "is the sum of arithmetic, exchange and copies; 'at least' is the longest of them at full speed.",
        f"Weights are {kind}, {attention}, factors float32, and there twice while they are in use. Every sequence has "
        "the full length, queries too.",
        "A sequence's operations and bytes are counted by running the library on tensors without numbers.",
        f"{1 - REACHABLE:.0%} of a memory is the runtime's; {FREE_SHARE:.0%} of what weights leave is planned with.",
    ]
    if given.ranks > 1:
        found.append(
            "Every rank sweeps its share and holds all factors and resident query gradients; what is collected, scores "
            "too, is added up over the ranks."
        )
    if given.shard_model:
        found.append("Weights are gathered block by block for every batch, forward and backward, with one block ahead.")
    if given.offload_factors:
        found.append("Sums and factors lie on each rank's host, and those of a layer are copied in every batch.")
    return found


def _ranks(given: PlanArguments) -> str:
    name = "GPU" if given.device.type == "cuda" else given.device.type.upper()
    return f"{given.ranks} {name}{'s' if given.ranks > 1 else ''}"
