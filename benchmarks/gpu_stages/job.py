"""The published job: GPT-2 (124M), 4,656 training and 481 query sequences of 512 tokens, EK-FAC and all scores.

Random weights and tokens serve for timing. A stage comes with the operations that the plan counts for it, and with the
share of the speed of a large product that was measured a moment before. It must not know the other stages.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from workload import Stopwatch, Workload, synchronize

import wherefrom as wf
from gpu_stages.micro import product_speed, tf32_products
from gpu_stages.report import Figures, Report, Setting, UnavailableError
from wherefrom.planning.plan import Plan

Study = wf.Study[dict[str, Tensor]]

PUBLISHED = Workload(layers=12, width=768, heads=12, vocabulary=50257, tokens=512, train=4656, queries=481)
_TINY = Workload(layers=1, width=32, heads=2, vocabulary=211, tokens=16, train=80, queries=20)


@dataclass(frozen=True)
class Scored:
    """One run of a fit and a score: its stages' times, its plan, its scores [query, train], and the action table."""

    watch: Stopwatch
    plan: Plan
    values: Tensor
    actions: str


def workload(setting: Setting) -> Workload:
    """The published one, or a tiny one in a rehearsal."""
    return _TINY if setting.rehearse else PUBLISHED


def execution(setting: Setting, half: bool = False) -> wf.Execution:
    """How a study computes here."""
    return wf.Execution(
        half_precision=half,
        memory_budget=memory_budget(setting),
        compile_activations=setting.compiled,
        progress=False,
    )


def memory_budget(setting: Setting) -> float | None:
    """GiB that a study may take: all of a GPU but a sixteenth, for its context and what fragments, and what is left."""
    if setting.device == "cpu":
        return None
    total = torch.cuda.get_device_properties(setting.device).total_memory / 2**30
    return math.floor(15 / 16 * total) - setting.less_memory


@contextmanager
def new_study(work: Workload, setting: Setting, half: bool) -> Iterator[Study]:
    """A study of the workload in a run directory that is deleted afterwards."""
    model = work.model().to(setting.device)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        train = work.sequences(work.train, 1)
        yield wf.Study(folder, model, wf.CausalLM(), train=train, execution=execution(setting, half))


def scored(work: Workload, setting: Setting, half: bool, *, empirical: bool = False, profiled: bool = False) -> Scored:
    """Fit and score with wherefrom; `profiled` waits for the device at the end of every action."""
    queries, watch = work.sequences(work.queries, 2), Stopwatch()
    with new_study(work, setting, half) as study:
        study.profile.synchronize = profiled and setting.device != "cpu"
        plan = study.plan(queries)
        with watch.stage("covariances and eigenbasis"):
            study.fit(wf.KFAC(empirical=empirical))
        with watch.stage("eigenvalues"):
            factors = study.fit(wf.EKFAC(empirical=empirical))
        with watch.stage("pairwise scores"):
            scores = study.score(queries, wf.EKFAC(factors=factors))
        return Scored(watch, plan, scores.values.clone(), study.profile.text())


def job(report: Report, setting: Setting) -> None:
    """The whole job, in bfloat16 where its products are right."""
    _job(report, setting, workload(setting), setting.half)


def job_again(report: Report, setting: Setting) -> None:
    """The same once more in a fresh process and without a warm-up, as whoever runs it once will see it."""
    with tf32_products(not setting.half):
        report.measure("job", lambda: _timed(workload(setting), setting, setting.half))


def quarter(report: Report, setting: Setting) -> None:
    """All queries and a quarter of the training set, in TF32."""
    work = workload(setting)
    _job(report, setting, replace(work, train=work.train // 4), half=False)


def _job(report: Report, setting: Setting, work: Workload, half: bool) -> None:
    with tf32_products(not half):
        report.measure("warm-up", lambda: {"plan": str(scored(_warm_up(work), setting, half).plan)})
        report.measure("job", lambda: _timed(work, setting, half))


def _warm_up(work: Workload) -> Workload:
    """In which kernels are chosen, handles made and activations compiled: two batches through one layer."""
    return replace(work, layers=1, train=128, queries=32)


def _timed(work: Workload, setting: Setting, half: bool) -> Figures:
    """Seconds, operations a second and the share of a large product's, stage by stage."""
    device, size = torch.device(setting.device), 256 if setting.rehearse else 8192
    dtype = torch.bfloat16 if half and device.type == "cuda" else torch.float32
    speed = product_speed(device, dtype, not half, size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = scored(work, setting, half)
    operations = {stage.name: stage.flop for stage in found.plan.stages()}
    counted = {
        "covariances and eigenbasis": operations["covariance"],
        "eigenvalues": operations["eigenvalues"],
        "pairwise scores": operations["query gradients"] + operations["pairwise scores"],
    }
    stages = {
        name: {
            **asdict(taken),
            "operations": counted[name],
            "operations_per_second": counted[name] / taken.wall_seconds,
            "part_of_product_speed": counted[name] / taken.wall_seconds / speed,
        }
        for name, taken in found.watch.stages.items()
    }
    return {
        "workload": asdict(work),
        "precision": "bfloat16" if half else "TF32" if device.type == "cuda" else "float32",
        "compiled": setting.compiled,
        "memory_budget": memory_budget(setting),
        "plan": str(found.plan),
        "product_speed": speed,
        "stages": stages,
        "seconds": sum(each.wall_seconds for each in found.watch.stages.values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "actions": found.actions,
    }


def part(setting: Setting) -> Workload:
    """All queries and a twentieth of the training set."""
    work = workload(setting)
    return replace(work, train=work.train // 20)


def against_kronfluence(report: Report, setting: Setting) -> None:
    """Both on a twentieth of the training set, with the dataset's own targets, so that scores can be compared."""
    report.measure("comparison", lambda: _comparison(setting))


def _comparison(setting: Setting) -> Figures:
    try:
        import kronfluence_job  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed") from error
    work, half = part(setting), setting.half
    with tf32_products(not half):
        scored(_warm_up(work), setting, half, empirical=True)
        ours = scored(work, setting, half, empirical=True)
        theirs = Stopwatch()
        with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
            values = kronfluence_job.run(work, Path(folder), theirs, True, 64, 32, half)
    stages = {
        name: {
            "wherefrom_seconds": taken.wall_seconds,
            "kronfluence_seconds": theirs.stages[name].wall_seconds,
            "times_faster": theirs.stages[name].wall_seconds / taken.wall_seconds,
        }
        for name, taken in ours.watch.stages.items()
    }
    totals = [sum(each.wall_seconds for each in watch.stages.values()) for watch in (ours.watch, theirs)]
    return {
        "workload": asdict(work),
        "precision": "bfloat16" if half else "TF32",
        "targets": "empirical",
        "stages": stages,
        "seconds": {"wherefrom": totals[0], "kronfluence": totals[1]},
        "times_faster": totals[1] / totals[0],
        "agreement": agreement(values.cpu(), ours.values.cpu()),
    }


def precision(report: Report, setting: Setting) -> None:
    """Scores in bfloat16 and in TF32 against float32, on a twentieth of the training set and a quarter of the queries.

    The targets are drawn anew in each, as whoever chooses a precision will have it.
    """
    work = part(setting)
    work = replace(work, queries=work.queries // 4)
    values: dict[str, Tensor] = {}
    for name, half, tf32 in (("float32", False, False), ("TF32", False, True), ("bfloat16", True, False)):
        if half and not setting.half:
            continue
        report.measure(name, partial(_agreeing, values, name, work, setting, half, tf32))


def _agreeing(
    values: dict[str, Tensor], name: str, work: Workload, setting: Setting, half: bool, tf32: bool
) -> Figures:
    with tf32_products(tf32):
        found = scored(work, setting, half)
    values[name] = found.values
    seconds = sum(each.wall_seconds for each in found.watch.stages.values())
    # In a later call that goes on from the first part's figures, the float32 scores are computed once more.
    if "float32" not in values:
        with tf32_products(False):
            values["float32"] = scored(work, setting, False).values
    return {"workload": asdict(work), "seconds": seconds, **agreement(found.values, values["float32"])}


def agreement(found: Tensor, expected: Tensor) -> dict[str, float]:
    """How alike two matrices of scores [query, train] are: correlations, and a query's ten highest in common."""
    ranks = [each.argsort(1).argsort(1).double() for each in (found, expected)]
    rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    count = min(10, found.shape[1])
    top = [set(map(tuple, _places(each.topk(count, 1).indices))) for each in (found, expected)]
    flat = torch.stack([found.flatten().double(), expected.flatten().double()])
    return {
        "pearson": float(torch.corrcoef(flat)[0, 1]),
        "mean_spearman": float(torch.stack(rows).mean()),
        "lowest_spearman": float(torch.stack(rows).min()),
        "top_10_in_common": len(top[0] & top[1]) / len(top[1]),
    }


def _places(indices: Tensor) -> list[list[int]]:
    """(query, training example) pairs of the indices [query, k]."""
    queries = torch.arange(len(indices))[:, None].expand_as(indices)
    return torch.stack([queries, indices], 2).flatten(0, 1).tolist()


def profiler(report: Report, setting: Setting) -> None:
    """Which kernels and which actions the time of a stage goes to, in four batches of each."""
    work = workload(setting)
    batches = replace(work, train=16 if setting.rehearse else 256, queries=4 if setting.rehearse else 128)
    report.measure("kernels", lambda: _kernels(batches, setting))
    report.measure("actions", lambda: {"table": scored(batches, setting, setting.half, profiled=True).actions})


def _kernels(work: Workload, setting: Setting) -> Figures:
    """The kernels of every stage; on a CPU, its operators."""
    queries, half = work.sequences(work.queries, 2), setting.half
    with new_study(work, setting, half) as study, tf32_products(not half):
        return {
            "covariances and eigenbasis": _profiled(lambda: study.fit(wf.KFAC()), setting),
            "eigenvalues": _profiled(lambda: study.fit(wf.EKFAC()), setting),
            "pairwise scores": _profiled(lambda: study.score(queries), setting),
        }


def _profiled(stage: Callable[[], object], setting: Setting) -> Figures:
    cuda = setting.device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        stage()
        synchronize()
    taken = [
        (each.self_device_time_total if cuda else each.self_cpu_time_total, each.count, each.key)
        for each in found.key_averages()
    ]
    return {
        "busy_seconds": sum(each[0] for each in taken) / 1e6,
        "kernels": [
            {"kernel": name[:120], "calls": calls, "seconds": microseconds / 1e6}
            for microseconds, calls, name in sorted(taken, reverse=True)[:25]
        ],
    }
