"""Memory that a container leaves: as the system's own files say, and in a real control group."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wherefrom.runtime import memory as containers
from wherefrom.runtime.memory import memory_left

MIB = 2**20


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(containers, "_ROOT", tmp_path)
    monkeypatch.setattr(containers, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def test_the_tightest_of_nested_groups_counts(system: Path) -> None:
    (system / "membership").write_text("0::/slurm/job\n")
    write(system / "slurm", {"memory.max": 900, "memory.current": 500, "memory.stat": "anon 1\ninactive_file 50"})
    write(system / "slurm" / "job", {"memory.max": "max", "memory.current": 400, "memory.stat": "inactive_file 50"})
    assert memory_left() == 900 - 500 + 50
    write(system / "slurm" / "job", {"memory.max": 420})
    assert memory_left() == 420 - 400 + 50


def test_a_container_sees_its_own_group_as_the_root(system: Path) -> None:
    (system / "membership").write_text("4:memory:/docker/0123\n0::/\n")
    files = {"memory.limit_in_bytes": 1000, "memory.usage_in_bytes": 700, "memory.stat": "total_inactive_file 100"}
    write(system / "memory", files)
    assert memory_left() == 400


def test_without_groups_there_is_no_limit(system: Path) -> None:
    assert memory_left() == math.inf
    (system / "membership").write_text("0::/\n")
    assert memory_left() == math.inf


@contextmanager
def real_group(limit: int) -> Iterator[Path]:
    """A control group of the system with a limit; skips where none may be made."""
    root = Path("/sys/fs/cgroup")
    folder = (root / "memory" if (root / "memory").is_dir() else root) / f"wherefrom-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        limits = [name for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists()]
        if not limits:
            pytest.skip("control groups do not limit memory here")
        (folder / limits[0]).write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def test_a_process_in_a_group_plans_with_what_the_group_leaves() -> None:
    code = "import torch\nfrom wherefrom.runtime.memory import free_memory\nprint(free_memory(torch.device('cpu')))"
    with real_group(2048 * MIB) as folder:
        child = subprocess.run(
            ["sh", "-c", f"echo $$ > {folder}/cgroup.procs && exec {sys.executable} -c \"{code}\""],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert 1024 * MIB < int(child.stdout) < 2048 * MIB
