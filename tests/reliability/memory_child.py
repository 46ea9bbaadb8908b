"""What runs out of memory for real, or measures how much it takes: for a process of its own.

`limited` lowers the limit on the process's address space, so that allocations fail; `peak` says by how many bytes a
stage has grown the process at the most.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import re
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import relative_error
from tests.reliability.outcomes import Outcome
from tests.runs import with_factors
from wherefrom.runtime.errors import MemoryLimitError

_WIDTH, _TRAIN, _QUERIES = 300, 100, 50


def _model(width: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(dtype)


def _rows(count: int, width: int, dtype: torch.dtype, seed: int) -> list[object]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(width, generator=generator).to(dtype), torch.randint(10, (), generator=generator))
        for _ in range(count)
    ]


def _study(folder: Path, width: int, dtype: torch.dtype, **execution: Any) -> wf.Study[Any]:
    train, chosen = _rows(_TRAIN, width, dtype, 1), wf.Execution(progress=False, **execution)
    return wf.Study(folder, _model(width, dtype), wf.Classification(["*"]), train=train, execution=chosen)


# Memory that runs out.


def _all(folder: Path, queries: list[object]) -> dict[str, Tensor]:
    """A fit and a score in batches of everything at once."""
    study = _study(folder, _WIDTH, torch.float64, train_batch_size=_TRAIN, query_batch_size=_QUERIES)
    method = with_factors(study.fit())
    return {"values": study.score(queries, method).values.clone(), "self": study.self_influence(method)}


def limited(folder: Path, count: int, seed: int) -> str:
    """Runs with random limits; those that end have the undisturbed results, the others an error with numbers."""
    chance, queries = random.Random(str(seed)), _rows(_QUERIES, _WIDTH, torch.float64, 2)
    expected = _all(folder / "undisturbed", queries)
    recovered = 0
    for case in range(count):
        gc.collect()
        room = chance.randint(1, 120) * 2**20
        limit = _status("VmSize") + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            found = _all(folder / str(case), queries)
            recovered += 1
        except MemoryLimitError as error:
            assert re.search(r"[\d.]+ GiB free on cpu", str(error)), f"no numbers in: {error}"
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found = _all(folder / str(case), queries)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for name, each in found.items():
            difference = relative_error(each, expected[name])
            assert difference < 1e-9, f"seed {seed}, case {case}: {name} differs by {difference}"
    result = (
        f"{recovered} ended with the undisturbed results to 1e-9, with smaller batches or blocks; "
        f"{count - recovered} with a MemoryLimitError that has the numbers, after which the same call gave them"
    )
    outcome = Outcome("a limit on the memory of a process, below what a fit or score asks for", count, result)
    return json.dumps(asdict(outcome))


# Memory that is measured.

_STAGES: dict[str, Callable[[wf.Study[Any], list[object], wf.EKFAC], object]] = {
    "fit": lambda study, queries, method: study.fit(method),
    "score": lambda study, queries, method: study.score(queries, method),
    "low rank": lambda study, queries, method: study.score(queries, replace(method, query_rank=8)),
    "parts": lambda study, queries, method: study.score(
        queries, method, keep=wf.Pairs(layers=True, self_influence=True)
    ),
    "self-influence": lambda study, queries, method: study.self_influence(method),
    "tokens": lambda study, queries, method: study.score(queries, method, keep=wf.Tokens()),
}


def peak(folder: Path, what: str, budget: float) -> str:
    """Bytes that a stage takes at the most beyond what was there, factors for a fit included."""
    _give_freed_memory_back()
    stage, dtype = _STAGES[what], torch.float32
    small = _study(folder / "small", 16, dtype)  # imports, and what libraries keep for themselves
    stage(small, _rows(3, 16, dtype, 2), wf.EKFAC())
    study = _study(folder / "large", _WIDTH, dtype, memory_budget=budget)
    queries = _rows(_QUERIES, _WIDTH, dtype, 2)
    method = wf.EKFAC(factors=None if what == "fit" else study.fit())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    stage(study, queries, method)
    return str(_status("VmHWM") - before)


def factor_bytes() -> int:
    """What the factors of the measured model take."""
    sizes = [(_WIDTH, _WIDTH + 1), (_WIDTH, _WIDTH + 1), (10, _WIDTH + 1)]
    return sum(4 * (one**2 + other**2 + one * other + one + other) for one, other in sizes)


# Larger blocks than this are given back to the system as soon as they are freed.
_RETURNED_BYTES = 2**17


def _give_freed_memory_back() -> None:
    """Count what is held rather than what the allocator keeps: of freed blocks, glibc keeps more the larger they have
    been, and how much depends on addresses, which chance decides (35 to 53 MiB were counted of 40)."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        mmap_threshold = -3  # M_MMAP_THRESHOLD in malloc.h
        assert library.mallopt(mmap_threshold, _RETURNED_BYTES) == 1


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
