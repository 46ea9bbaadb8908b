"""What all benchmarks share: the GPT-2 and token sequences that they run on, how they time, where results go."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from wherefrom.store.files import write_text

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Workload:
    """A GPT-2 with random weights, and random tokens; for timing they are as good as trained ones.

    Attributes:
        train, queries: how many sequences of `tokens` tokens.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 4096
    tokens: int = 128
    train: int = 256
    queries: int = 512

    def model(self) -> GPT2LMHeadModel:
        """The model, the same weights each time, without dropout."""
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.tokens, n_embd=self.width, n_layer=self.layers,
            n_head=self.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        model.eval()
        return model

    def sequences(self, count: int, seed: int) -> list[dict[str, Tensor]]:
        """`count` sequences of random tokens, without padding."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (count, self.tokens), generator=generator)
        return [{"input_ids": row} for row in tokens]


@dataclass
class Stage:
    """What one stage took."""

    wall_seconds: float
    user_seconds: float


@dataclass
class Stopwatch:
    """Times the stages of one process."""

    stages: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside, every thread's CPU time included."""
        wall, user = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
        yield
        synchronize()
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - user
        self.stages[name] = Stage(time.perf_counter() - wall, used)

    def write(self, path: Path, **more: object) -> None:
        """The stages and this process's peak memory, for the process that started this one."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        path.write_text(json.dumps({"stages": stages, "peak_bytes": peak, **more}, indent=1) + "\n")


class PeakMemory(threading.Thread):
    """The most memory of its own that this process takes, files that are mapped left out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.most = self._now()
        self._done = threading.Event()

    def run(self) -> None:
        """Look every few milliseconds."""
        while not self._done.wait(0.005):
            self.most = max(self.most, self._now())

    def stop(self) -> int:
        """Bytes beyond the start."""
        self._done.set()
        self.join()
        return self.most - self.first

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(runs: list[dict[str, Stage]]) -> dict[str, Stage]:
    """Stage by stage the median over runs."""
    return {
        name: Stage(
            median(run[name].wall_seconds for run in runs),
            median(run[name].user_seconds for run in runs),
        )
        for name in runs[0]
    }


def machine() -> dict[str, str]:
    """What a figure was measured with: processor or GPU, cores, versions."""
    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    """The processor's name and whether it multiplies bfloat16, as Linux tells; not all of its kernels do."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}{' (avx512_bf16)' if 'avx512_bf16' in fields.get('flags', '') else ''}"


def provenance() -> dict[str, object]:
    """The command, the commit and the machine behind a figure."""
    return {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "machine": machine()}


def commit() -> str:
    """The commit of this source; for a copy of it without its history, what `WHEREFROM_COMMIT` says, or "unknown"."""
    git = ["git", "-C", str(ROOT)]
    # A copy may lie within somebody else's repository, whose commit is not its own.
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        paths = ["src", "benchmarks/*.py"]
        changed = subprocess.run([*git, "status", "--porcelain", "--", *paths], capture_output=True, check=False)
        if head.returncode == changed.returncode == 0:
            return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
    return os.environ.get("WHEREFROM_COMMIT") or "unknown"


def save_results(name: str, measured: dict[str, object]) -> None:
    """Write `results/NAME.json` with where it comes from."""
    file = RESULTS / f"{name}.json"
    write_text(file, json.dumps({**provenance(), **measured}, indent=1) + "\n")
    print(f"Written: {file}")
