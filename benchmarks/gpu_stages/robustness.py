"""What happens to a run on a GPU when it is killed, has too little memory, or is not alone; nothing is timed here."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from workload import Workload

import wherefrom as wf
from gpu_stages import correctness
from gpu_stages.correctness import FULL_LIMIT, difference
from gpu_stages.report import Figures, Report, Setting, UnavailableError, tail
from gpu_stages.worker import work
from wherefrom.runtime.errors import MemoryLimitError

# How long a worker may take; the stage has a limit of its own.
_PATIENCE = 600.0
# Of scores from batches of other sizes, in units of the largest: sums of many tokens, in another order.
_BATCH_LIMIT = 1e-4
# Batches after which a run is killed: in the covariance sweep, in the eigenvalue sweep, and among the scores.
_KILLED_AFTER = (5, 17, 31)


def resume(report: Report, setting: Setting) -> None:
    """Killed with SIGKILL in every sweep, a run ends with the same bits as one that was left alone."""
    report.measure("killed and gone on with", lambda: _killed_figures(setting))


def _killed_figures(setting: Setting) -> Figures:
    width = correctness.SMALL_WIDTH if setting.rehearse else correctness.WIDTH
    with tempfile.TemporaryDirectory(dir=setting.scratch) as name:
        folder = Path(name)
        undisturbed = work(folder / "undisturbed", setting.device, width, 0.0)
        kills = _KILLED_AFTER[1:2] if setting.rehearse else _KILLED_AFTER
        killed = [_killed(folder, setting, width, batches) for batches in kills]
        with _worker(folder / "killed", folder / "scores", setting, width, 0.0) as process:
            said, _ = process.communicate(timeout=_PATIENCE)
        if process.returncode != 0:
            raise RuntimeError(f"The last process has failed: {tail(said)}")
        values = load_file(folder / "scores")["values"]
    same = torch.equal(values, undisturbed)
    return {
        "killed_after_batches": killed,
        "same_bits": same,
        "largest_difference": difference(values, undisturbed),
        "passed": same and all(killed),
    }


def _killed(folder: Path, setting: Setting, width: int, batches: int) -> int:
    """Begin or go on, and kill once so many batches were begun; how many were."""
    log, end = folder / "killed" / "batches.log", time.monotonic() + _PATIENCE
    with _worker(folder / "killed", folder / "scores", setting, width, 0.05) as process:
        while process.poll() is None and _lines(log) < batches and time.monotonic() < end:
            time.sleep(0.01)
        running = process.poll() is None
        process.kill()
        said, _ = process.communicate()
    if not running:
        raise RuntimeError(f"The process ended after {_lines(log)} batches, before it was killed: {tail(said)}")
    return _lines(log)


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


@contextmanager
def _worker(
    run: Path, output: Path, setting: Setting, width: int, pause: float, launcher: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A worker that is running; it does not outlive the context."""
    arguments = ["--device", setting.device, "--width", str(width), "--pause", str(pause)]
    module = "gpu_stages.worker"
    command = [sys.executable, "-m", *launcher, module, str(run), str(output), *arguments]
    joined = ["--join"] if launcher else []
    process = subprocess.Popen(
        [*command, *joined], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_environment()
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """This one's, where the benchmarks can be imported."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def memory(report: Report, setting: Setting) -> None:
    """With a twentieth of the memory that the planner sees, batches become smaller, and scores stay what they are."""
    report.measure("smaller batches", lambda: _back_off_figures(setting))
    report.measure("too little for one example", lambda: _refusal_figures(setting))


@contextmanager
def _fraction(part: float) -> Iterator[None]:
    """Let PyTorch take only a part of the GPU's memory, of which the planner is not told."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(part)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _back_off_figures(setting: Setting) -> Figures:
    if setting.device == "cpu":
        raise UnavailableError("a CPU's memory cannot be cut for one process")
    layers, tokens = (1, 64) if setting.rehearse else (4, 512)
    work = Workload(layers=layers, width=256, heads=4, vocabulary=50257, tokens=tokens, train=96, queries=8)
    whole = _scores(work, setting)
    before = torch.cuda.memory_stats().get("num_ooms", 0)
    torch.cuda.reset_peak_memory_stats()
    with _fraction(0.05):
        cut = _scores(work, setting)
    refusals = torch.cuda.memory_stats().get("num_ooms", 0) - before
    error = difference(cut, whole)
    return {
        "refused_allocations": refusals,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "error": error,
        "passed": refusals > 0 and error < _BATCH_LIMIT,
    }


def _scores(work: Workload, setting: Setting) -> Tensor:
    """Scores with the dataset's own targets: a drawn one may change with the rounding of another batch size."""
    model = work.model().to(setting.device)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(dir=setting.scratch) as folder:
        study = wf.Study(
            folder, model, wf.CausalLM(), train=work.sequences(work.train, 1), execution=wf.Execution(progress=False)
        )
        return study.score(work.sequences(work.queries, 2), wf.EKFAC(empirical=True)).values.clone().cpu()


def _refusal_figures(setting: Setting) -> Figures:
    if setting.device == "cpu":
        raise UnavailableError("a CPU's memory cannot be cut for one process")
    work = Workload(layers=1, width=64, heads=4, vocabulary=50257, tokens=2048, train=4, queries=2)
    work.model().to(setting.device)  # type: ignore[arg-type]  # the context is there before memory is cut
    total = torch.cuda.get_device_properties(setting.device).total_memory
    try:
        with _fraction(400 * 2**20 / total):
            _scores(work, setting)
    except MemoryLimitError as error:
        return {"message": str(error), "passed": True}
    return {"message": "", "passed": False}


def two_processes(report: Report, setting: Setting) -> None:
    """Two runs on one GPU at once: each on its own, on one run directory, and as two ranks of one run."""
    report.measure("runs of their own", lambda: _two_runs(setting, same=False))
    report.measure("one run directory", lambda: _two_runs(setting, same=True))
    report.measure("two ranks of torchrun", lambda: _two_ranks(setting))


def _two_runs(setting: Setting, same: bool) -> Figures:
    """Both are to end with the scores of a run alone."""
    width = correctness.SMALL_WIDTH if setting.rehearse else correctness.WIDTH
    with tempfile.TemporaryDirectory(dir=setting.scratch) as name:
        folder = Path(name)
        alone = work(folder / "alone", setting.device, width, 0.0)
        runs = [folder / ("run" if same else str(each)) for each in (0, 1)]
        outputs = [folder / f"scores{each}" for each in (0, 1)]
        with (
            _worker(runs[0], outputs[0], setting, width, 0.0) as one,
            _worker(runs[1], outputs[1], setting, width, 0.0) as other,
        ):
            said = [process.communicate(timeout=_PATIENCE)[0] for process in (one, other)]
        ended = [process.returncode for process in (one, other)]
        equal = [output.exists() and torch.equal(load_file(output)["values"], alone) for output in outputs]
    return {"exit_statuses": ended, "same_bits": equal, "said": list(map(tail, said)), "passed": all(equal)}


def _two_ranks(setting: Setting) -> Figures:
    """On a machine with one GPU the second rank is to be refused; two ranks on a CPU share the work."""
    width = correctness.SMALL_WIDTH if setting.rehearse else correctness.WIDTH
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    with tempfile.TemporaryDirectory(dir=setting.scratch) as name:
        folder = Path(name)
        alone = work(folder / "alone", setting.device, width, 0.0)
        with _worker(folder / "run", folder / "scores", setting, width, 0.0, launcher) as process:
            said, _ = process.communicate(timeout=_PATIENCE)
        shared = (folder / "scores").exists()
        error = difference(load_file(folder / "scores")["values"], alone) if shared else None
    one_gpu = setting.device != "cpu" and torch.cuda.device_count() == 1
    refused = process.returncode != 0 and "with at most as many" in said
    return {
        "exit_status": process.returncode,
        "error": error,
        "refusal": [line for line in said.splitlines() if "torchrun has started" in line][:1],
        "said": tail(said),
        "passed": refused if one_gpu else error is not None and error < FULL_LIMIT,
    }
