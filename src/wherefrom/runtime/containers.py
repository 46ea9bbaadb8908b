"""What a container, or a job scheduler, leaves of the host's memory: the system itself tells the whole machine's.

Control groups of Linux, version 2 and 1; elsewhere there is no limit. This module knows files of the system only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Of each version: the limit, what is used, and the part of that which is given back when it is needed.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left() -> float:
    """Bytes until the first limit of a control group that this process is in; infinite without one."""
    return min((_left(folder, version) for folder, version in _groups()), default=math.inf)


def _groups() -> Iterator[tuple[Path, int]]:
    """The groups that limit memory, each with its version: limits of those around it hold too."""
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root, version = (_ROOT / "memory", 1) if controllers else (_ROOT, 2)
                group = Path(path.lstrip("/"))
                # In a container, its own group is what it sees as the root, whatever the path says.
                yield from ((root / each, version) for each in (group, *group.parents))


def _left(folder: Path, version: int) -> float:
    limit_file, used_file, reclaimable = _FILES[version]
    try:
        limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(0, int(limit) - used + int(entries.get(reclaimable, 0)))
