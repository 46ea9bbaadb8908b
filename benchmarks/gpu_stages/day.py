"""The order of the day: which stages there are, each as a process with a time limit, and an index of what is done.

Of the standard library alone, as `report`; it must not know what a stage measures, but for two of its failures.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gpu_stages.report import Report, Setting, failed, tail, write_json

INDEX, RUNNING, LOG = "gpu_day.json", "running.json", "log.txt"
_ATTEMPTS = 3


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        function: MODULE:FUNCTION in `gpu_stages`.
        call: in which of the two calls it runs.
        limit: seconds that it may take.
        least: it is not begun with fewer seconds left.
    """

    function: str
    call: int
    limit: float
    least: float = 20.0


# Limits, which a rehearsal does not have, are some twice of what is expected. Those of a call add up to more than it
# has: what comes first is needed most.
STAGES: Mapping[str, Stage] = {
    "environment": Stage("micro:environment", 1, 60),
    "micro": Stage("micro:micro", 1, 90),
    "correctness": Stage("correctness:correctness", 1, 150),
    "draws": Stage("correctness:draws", 1, 40),
    "resume": Stage("robustness:resume", 1, 90),
    "memory": Stage("robustness:memory", 1, 60),
    "job": Stage("job:job", 1, 260, least=60),
    "against kronfluence": Stage("job:against_kronfluence", 2, 120, least=45),
    "job again": Stage("job:job_again", 2, 120, least=45),
    "profiler": Stage("job:profiler", 2, 80, least=30),
    "TF32": Stage("job:quarter", 2, 120, least=45),
    "precision": Stage("job:precision", 2, 100, least=30),
    "two processes": Stage("robustness:two_processes", 2, 120, least=40),
    "0.5B Llama": Stage("llama:llama", 2, 200, least=40),
}


@dataclass
class Day:
    """What was done, as it stands in the index.

    Attributes:
        folder: of the index, the log of all output, and while a stage runs, what it has so far.
        setting: of the stages to come; it changes with what is found not to work.
        stages: of each, its `state` ("done", "failed", "out of time"), `seconds`, `parts` and, of attempts that
            failed, the `setting` and the end of the output.
    """

    folder: Path
    setting: Setting
    command: str
    stages: dict[str, dict[str, object]] = field(default_factory=dict)

    @classmethod
    def opened(cls, folder: Path, setting: Setting, command: str) -> Day:
        """A new day, or one to go on with: also what a stage had measured when its process was killed with this one."""
        folder.mkdir(parents=True, exist_ok=True)
        day = cls(folder, setting, command)
        if (folder / INDEX).exists():
            stored = json.loads((folder / INDEX).read_text())
            day.stages = stored["stages"]
            day.command = f"{stored['command']}; {command}"
            found = Setting(**stored["setting"])
            day.setting = replace(setting, half=found.half, compiled=found.compiled, less_memory=found.less_memory)
        if (folder / RUNNING).exists():
            stored = json.loads((folder / RUNNING).read_text())
            day.stages.setdefault(stored["stage"], {"state": "out of time"})["parts"] = stored["parts"]
            (folder / RUNNING).unlink()
        return day

    def write(self) -> None:
        """The index, whole."""
        content = {"command": self.command, "setting": asdict(self.setting), "stages": self.stages}
        write_json(self.folder / INDEX, content)

    def run(self, names: Sequence[str], seconds: float) -> None:
        """Every stage of these that is not done, as long as there is time."""
        end = time.monotonic() + seconds
        for name in names:
            if self.stages.get(name, {}).get("state") == "done":
                print(f"{name}: done before", flush=True)
                continue
            self._attempts(name, end)
            print(f"{name}: {self.stages[name]['state']}, {end - time.monotonic():.0f} s left", flush=True)

    def _attempts(self, name: str, end: float) -> None:
        """Run a stage; where it fails in a way that is known, once more without what has failed."""
        for _ in range(_ATTEMPTS):
            left = end - time.monotonic()
            if left < STAGES[name].least:
                self.stages.setdefault(name, {"parts": {}, "state": "out of time"})
                break
            limit = left if self.setting.rehearse else min(STAGES[name].limit, left)
            said = self._attempt(name, limit)
            self.setting, before = after_failure(self.setting, self.stages[name], said), self.setting
            if self.stages[name]["state"] == "done" or self.setting == before:
                break
        self.write()

    def _attempt(self, name: str, limit: float) -> str:
        """One process; what it has said is returned and added to the log."""
        stored, start = self.stages.get(name, {}), time.monotonic()
        running = self.folder / RUNNING
        write_json(running, {"stage": name, "parts": stored.get("parts", {})})
        with tempfile.TemporaryDirectory(prefix="gpu-day-", dir=self.setting.scratch or None) as scratch:
            setting = replace(self.setting, scratch=scratch)
            told = ["--running", str(running), "--setting", json.dumps(asdict(setting))]
            status, said = _limited(["--stage", name, *told], limit)
        parts = json.loads(running.read_text())["parts"]
        good = status == 0 and parts and not any(map(failed, parts.values()))
        state = "done" if good else "out of time" if status is None else "failed"
        record: dict[str, object] = {"state": state, "seconds": time.monotonic() - start, "parts": parts}
        attempts = list(stored.get("attempts", []))  # type: ignore[call-overload]
        if not good:
            attempts.append({"setting": asdict(self.setting), "status": status, "said": tail(said)})
        self.stages[name] = {**record, "attempts": attempts}
        self.write()
        running.unlink()
        with (self.folder / LOG).open("a") as log:
            log.write(f"=== {name}: {state}\n{said}\n")
        return said


def _limited(arguments: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Exit status, None after the limit, and all output of a process of this program, which gets no descendant left."""
    script = Path(__file__).parents[1] / "gpu_day.py"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read()


def after_failure(setting: Setting, stage: Mapping[str, object], said: str) -> Setting:
    """The setting to go on with: without what has shown not to work; the same where nothing is known to help."""
    parts = stage["parts"]
    assert isinstance(parts, Mapping)
    if any(failed(part) for name, part in parts.items() if name == "out_dtype"):
        return replace(setting, half=False)
    if stage["state"] == "done":
        return setting
    if re.search(r"out of memory|not fit into memory", said):
        return replace(setting, less_memory=setting.less_memory + 10)
    if setting.compiled and re.search(r"torch\._(dynamo|inductor)|triton", said):
        return replace(setting, compiled=False)
    return setting


def run_stage(name: str, running: Path, setting: Setting) -> None:
    """Run a stage in this process; a part that fails is in its report."""
    module, _, function = STAGES[name].function.partition(":")
    found = getattr(__import__(f"gpu_stages.{module}", fromlist=[function]), function)
    found(Report(running, name), setting)
