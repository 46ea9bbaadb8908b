"""Settings for all tests: nothing is fetched, one thread a process, and what several files share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.contract.answers import Answers

os.environ["HF_HUB_OFFLINE"] = "1"
# A cache of their own, gone with the process: what a developer has fetched changes no test.
_CACHE = tempfile.TemporaryDirectory(prefix="wherefrom-hub-")
for _name, _folder in {"HF_HOME": ".", "HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets"}.items():
    os.environ[_name] = str(Path(_CACHE.name, _folder))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small models gain nothing from several threads, and tests may run in several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_IN_MEMORY = Path("/dev/shm")
# Some times what the tests' directories take. Containers may have as little as 64 MiB there.
_ROOM = 2**31


def _fit_for_directories(root: Path) -> bool:
    """Whether tests may keep their directories there; some execute a script in them."""
    if not root.is_dir() or not os.access(root, os.W_OK):
        return False
    state = os.statvfs(root)
    return state.f_bavail * state.f_frsize >= _ROOM and not state.f_flag & os.ST_NOEXEC


if _fit_for_directories(_IN_MEMORY):
    # Whatever the library writes is flushed to the disk, which takes milliseconds a file, and in memory nothing.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_IN_MEMORY))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the mark `gpu` need one."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # after the number of threads is set

    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false: this test needs a GPU")


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What each way of scoring answers, found once."""
    from tests.contract.answers import Answers  # which imports models, and few tests need it

    return Answers(tmp_path_factory.mktemp("answers"))
