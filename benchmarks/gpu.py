"""The published job on a GPU: GPT-2 (124M), 4656 training x 481 query sequences of 512 tokens, ek-fac fit and scores.

    python benchmarks/gpu.py                        # bfloat16, then float32 products in TF32; some minutes
    python benchmarks/gpu.py --kronfluence 0.05     # and kronfluence 1.0.1 on this part of the training set, as ours

Random weights and tokens serve for timing. Every stage comes with the operations that the plan counts for it, so with
operations a second and the part of the device's peak. `--check` compares scores at two batch sizes. Written to
`results/gpu_DEVICE.json`. Where the published run took 2357 s (float32) and 786 s (bfloat16) on an A100, the operations
alone take some 20 s on an H100 or H200.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from workload import Stopwatch, Workload, save_results

import wherefrom as wf
from wherefrom.plan import Plan

# Dense products, in operations a second, from the makers' data sheets.
PEAKS = {"H200": (989e12, 495e12), "H100": (989e12, 495e12), "A100": (312e12, 156e12)}


@dataclass
class Arguments:
    """GPT-2 on one GPU."""

    work: Workload = field(
        default_factory=lambda: Workload(
            layers=12, width=768, heads=12, vocabulary=50257, tokens=512, train=4656, queries=481
        )
    )
    kronfluence: float = 0.0
    """The part of the training set on which kronfluence and wherefrom are compared; 0 leaves kronfluence out."""
    use_compile: bool = True
    check: bool = False
    """Compare scores at two batch sizes instead of timing."""
    device: str = "cuda"


def run(work: Workload, arguments: Arguments, half: bool, watch: Stopwatch) -> tuple[Tensor, Plan]:
    """Fit and score with wherefrom."""
    model = work.model().to(arguments.device)  # type: ignore[arg-type]
    train, queries = work.sequences(work.train, 1), work.sequences(work.queries, 2)
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, model, wf.CausalLM(), train=train, compile_activations=arguments.use_compile)
        plan = study.plan(queries, half_precision=half)
        with watch.stage("covariances and eigenbasis"):
            study.fit("kfac", half_precision=half)
        with watch.stage("eigenvalues"):
            factors = study.fit("ekfac", half_precision=half)
        with watch.stage("pairwise scores"):
            scores = study.score(queries, factors, half_precision=half)
        print(study.profile.text())
        return scores.values.clone(), plan


def timed(work: Workload, arguments: Arguments, half: bool) -> dict[str, object]:
    """Seconds, operations a second and part of the peak, stage by stage."""
    torch.backends.cuda.matmul.allow_tf32 = not half
    run(replace(work, train=64, queries=16), arguments, half, Stopwatch())  # kernels are chosen, code is compiled
    torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch()
    _, plan = run(work, arguments, half, watch)
    operations = {cost.stage: cost.flop for cost in plan.costs()}
    counted = {
        "covariances and eigenbasis": operations["covariance"],
        "eigenvalues": operations["eigenvalues"],
        "pairwise scores": operations["query gradients"] + operations["pairwise scores"],
    }
    name = torch.cuda.get_device_name()
    peak = next((peaks[0 if half else 1] for device, peaks in PEAKS.items() if device in name), None)
    stages = {}
    for stage, taken in watch.stages.items():
        speed = counted[stage] / taken.wall_seconds
        stages[stage] = {
            **asdict(taken),
            "operations_per_second": speed,
            "part_of_peak": speed / peak if peak else None,
        }
    return {
        "plan": str(plan),
        "stages": stages,
        "in_all_seconds": sum(each.wall_seconds for each in watch.stages.values()),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def against_kronfluence(work: Workload, arguments: Arguments, half: bool) -> dict[str, object]:
    """Both on the same part of the training set, kronfluence with the batch sizes of its example."""
    import kronfluence_job  # noqa: PLC0415

    part = replace(work, train=int(arguments.kronfluence * work.train))
    ours, theirs = Stopwatch(), Stopwatch()
    run(part, arguments, half, ours)
    with tempfile.TemporaryDirectory() as folder:
        kronfluence_job.run(part, Path(folder), theirs, False, 64, 32, half)
    stages: dict[str, object] = {
        name: {
            "wherefrom_seconds": ours.stages[name].wall_seconds,
            "kronfluence_seconds": theirs.stages[name].wall_seconds,
            "times_faster": theirs.stages[name].wall_seconds / ours.stages[name].wall_seconds,
        }
        for name in ours.stages
    }
    return {"train": part.train, "stages": stages}


def check(work: Workload, arguments: Arguments) -> dict[str, float]:
    """The largest relative difference between scores at a batch size of 1 and of 16, in both precisions."""
    part, found = replace(work, train=48, queries=16), {}
    for half in (False, True):
        model = part.model().to(arguments.device)  # type: ignore[arg-type]
        values = []
        for size in (1, 16):
            with tempfile.TemporaryDirectory() as folder:
                study = wf.Study(folder, model, wf.CausalLM(), train=part.sequences(part.train, 1))
                factors = study.fit("ekfac", half_precision=half, batch_size=size)
                queries = part.sequences(part.queries, 2)
                scores = study.score(
                    queries, factors, half_precision=half, query_batch_size=size, train_batch_size=size
                )
                values.append(scores.values.clone())
        one, other = values
        found["half" if half else "full"] = float((one - other).abs().max() / one.abs().max())
    return found


def main(arguments: Arguments) -> None:
    """Time both precisions, or check them."""
    result: dict[str, object] = {"workload": asdict(arguments.work)}
    if arguments.check:
        result["largest_relative_difference_between_batch_sizes"] = check(arguments.work, arguments)
    for half, name in ((True, "bfloat16"), (False, "float32 (TF32)")):
        if not arguments.check:
            result[name] = timed(arguments.work, arguments, half)
        if arguments.kronfluence:
            result[f"{name} against kronfluence"] = against_kronfluence(arguments.work, arguments, half)
    device = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else arguments.device
    save_results(f"gpu_{'check_' if arguments.check else ''}{device}", result)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
