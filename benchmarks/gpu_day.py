"""A day with a GPU: rates, correctness, robustness, the published job, kronfluence beside it; docs/gpu.md says how.

    python benchmarks/gpu_day.py --folder out --call 1      # under 8 minutes
    python benchmarks/gpu_day.py --folder out --call 2      # under 4 minutes more
    python benchmarks/gpu_day.py --rehearse                 # every stage tiny, on a CPU
    python benchmarks/gpu_day.py --keep out/gpu_day.json    # results/gpu_CARD.json, which the pages are made from

Needs no git, no network and no installed wherefrom. Each stage is a process of its own with a time limit; what it has
measured is in the folder at once, and the same call again goes on with what is missing or has failed. The arguments
are read by the standard library: the machine may have no tyro.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from gpu_stages.day import LOG, STAGES, Day, run_stage
from gpu_stages.report import Setting
from gpu_stages.summary import kept, print_table

ROOT = Path(__file__).parents[1]
# Seconds of a call beyond which no stage runs.
LIMITS = {1: 470.0, 2: 230.0}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu_day", help="where everything is written")
    parser.add_argument("--call", type=int, choices=(1, 2), help="one half of the day; both by default")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), help="these stages only")
    parser.add_argument("--limit", type=float, help="seconds for all of it; what does not fit is left for another call")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU unless --device says otherwise")
    parser.add_argument("--device", help="cuda, or cpu for a rehearsal")
    parser.add_argument(
        "--keep", nargs="+", type=Path, metavar="INDEX", help="put indexes together in benchmarks/results"
    )
    # What this program starts itself with.
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--running", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run stages, or keep their results; the exit status is 1 where a stage has not passed."""
    given = arguments()
    if given.stage:
        run_stage(given.stage, given.running, Setting(**json.loads(given.setting)))
        return 0
    if given.keep:
        print(f"Written: {kept(given.keep)}")
        return 0
    names = given.stages or [name for name, stage in STAGES.items() if given.call in (None, stage.call)]
    usual = sum(seconds for call, seconds in LIMITS.items() if given.call in (None, call))
    limit = given.limit or (3600.0 if given.rehearse else usual)
    device = given.device or ("cpu" if given.rehearse else "cuda")
    # Compiling takes longer than a rehearsal, and has tests of its own.
    setting = Setting(device, given.rehearse, scratch(), compiled=not given.rehearse)
    day = Day.opened(given.folder, setting, " ".join(["python", *sys.argv]))
    day.run(names, limit)
    print_table(day.stages)
    print(f"Figures: {given.folder}; output of the stages: {given.folder / LOG}")
    return int(any(day.stages[name]["state"] != "done" for name in names))


def scratch() -> str:
    """Memory as a directory, where there is plenty; else the system's directory for what is temporary."""
    shared = Path("/dev/shm")
    plenty = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2**34
    return str(shared) if plenty else ""


if __name__ == "__main__":
    sys.exit(main())
