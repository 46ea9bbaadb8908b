"""A disk that fills up, a quota, directories that become read-only: at a random moment of a run, which then ends.

Each run happens on a small file system in memory, in a process with mounts of its own. The moment is one of those at
which Python opens, renames, deletes or makes a file of the run. Then the run must end with a StorageError that says
what was needed and what was free, leave nothing half-written, and end with the undisturbed run's bits when it is
started again with the disk in order.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import wherefrom as wf
from tests.models import mlp_case
from tests.reliability.outcomes import Outcome
from wherefrom.evaluate.retrain import Retraining, half_subsets, retrain
from wherefrom.runtime.errors import StorageError
from wherefrom.store.artifacts import Artifact, read_manifest
from wherefrom.store.recording import read_recording

_ROOT = Path(__file__).parents[2]
_DISK_MIB = 16
_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
# What a failed write may not leave behind: our temporary names, and those of safetensors; but matrices stay, with the
# blocks that were put into them.
_TEMPORARY = re.compile(r"\.part$|^\.tmp")
_MATRICES = "matrices.safetensors"
_MESSAGE = re.compile(r"[\d,.]+ MiB needed, [\d,.]+ MiB free|Cannot (delete|move) .* Check permissions")


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Put `count` faults of each kind into runs: a full disk, a quota, directories that become read-only.

    Without the right to mount, only quotas are tried.

    Raises:
        AssertionError: a run did not end as it should; the message has its seed and case.
    """
    kinds = list(_KINDS) if can_mount() else ["quota"]
    folder.mkdir(parents=True, exist_ok=True)
    # A process for all faults: a signal that kills it must not kill the tests.
    command = [sys.executable, "-m", "tests.reliability.space", str(folder), str(count), str(seed), *kinds]
    if can_mount():
        command = [*UNSHARED, *_PLAIN, *command]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [Outcome(**each) for each in json.loads(done.stdout.splitlines()[-1])]


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount file systems where no other process sees them."""
    tried = "mount -t tmpfs -o size=1m tmpfs /mnt"
    return (
        None not in (shutil.which("unshare"), shutil.which("setpriv"))
        and subprocess.run([*UNSHARED, *_PLAIN, "sh", "-c", tried], capture_output=True, check=False).returncode == 0
    )


UNSHARED = ("unshare", "--map-root-user", "--mount")
# Permissions of files bind this root user.
_PLAIN = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


# What follows runs in the process.


@dataclass
class Disk:
    """The file system of a run, or a plain folder where none can be mounted."""

    folder: Path

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    def protect(self, mode: int) -> None:
        """Permissions of all directories."""
        for folder, _, _ in os.walk(self.folder):
            Path(folder).chmod(mode)

    def used(self) -> int:
        """Bytes."""
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def fill(self, left: int) -> None:
        """Leave so many bytes free."""
        taken = shutil.disk_usage(self.folder).free - left
        if taken > 0:
            with (self.folder / "filler").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, taken)

    def restore(self) -> None:
        """Everything as it was before the fault."""
        self.protect(0o755)
        (self.folder / "filler").unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Moments:
    """Counts what Python does to files of a folder, and acts at one of these moments."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._act: Callable[[int], object] | None = None
        self.count = 0
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._act is None or event not in _EVENTS or not str(arguments[0]).startswith(self._folder):
            return
        act, self._act = self._act, None  # what it does to files does not count
        self.count += 1
        act(self.count)
        self._act = act

    @contextmanager
    def watched(self, act: Callable[[int], object]) -> Iterator[None]:
        """Call `act` with the number of each moment."""
        self.count, self._act = 0, act
        try:
            yield
        finally:
            self._act = None


def _study(run: Path) -> None:
    """Everything that a study keeps, sums after every batch."""
    case = mlp_case(torch.float32)
    execution = wf.Execution(checkpoint_seconds=0, train_batch_size=5, query_batch_size=3, progress=False)
    study = wf.Study(run, case.model, case.task, train=case.train, execution=execution)
    scores = study.score(case.queries, keep=wf.Pairs(layers=True, self_influence=True))
    rescored = wf.EKFAC(query_rank=1, rescore=2)
    study.score(case.queries, rescored)
    study.score(case.queries, wf.EKFAC(damping=0.5), execution=replace(execution, memory_budget=1e-9))  # in blocks
    study.score(case.queries, keep=wf.Aggregated(queries="sum"))
    study.score(case.queries, keep=wf.Top(3))
    study.score(case.queries, rescored, keep=wf.Tokens(2))
    study.score(case.queries, keep=wf.Tokens())
    study.self_influence()
    study.report(scores)


def _losses(retrainings: Sequence[Retraining]) -> Tensor:
    """Stands for training: a number of the subset and the seed."""
    return torch.stack([torch.tensor(each.subset[-3:]).double() * (each.seed + 1) for each in retrainings])


def _bank(run: Path) -> None:
    """A bank of retrainings, and then a larger one."""
    masks = half_subsets(12, 3, seed=0)
    for seeds in (range(1), range(2)):
        retrain(run / "retrainings", _losses, masks, seeds, fingerprint={"recipe": "1"}, workers=1, progress=False)


class _TrainerError(Exception):
    """The Trainer itself has met the fault, before the recorder was called."""


def _recorder(run: Path) -> None:
    """What a Trainer would call, at two checkpoints."""
    from wherefrom.hf.recording import TrainingRecorder  # slow to import

    torch.manual_seed(0)
    model, recorder = nn.Linear(40, 30), TrainingRecorder()
    optimizer = torch.optim.Adam(model.parameters())
    arguments: Any = SimpleNamespace(output_dir=str(run))
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, epoch=0.0)
    control: Any = None
    recorder.on_train_begin(arguments, state, control)
    for step in (1, 2):
        model(torch.ones(40)).sum().backward()
        optimizer.step()
        state.global_step, state.epoch = step, float(step)
        try:
            os.makedirs(run / f"checkpoint-{step}", exist_ok=True)  # noqa: PTH103
        except OSError as error:
            raise _TrainerError from error
        recorder.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        recorder.on_save(arguments, state, control, model=model, optimizer=optimizer)
    assert [each.step for each in read_recording(run)] == [1, 2]


_FLOWS: dict[str, Callable[[Path], None]] = {"study": _study, "bank": _bank, "recorder": _recorder}


def tensors(run: Path) -> dict[str, Tensor]:
    """Every stored tensor that a repeated run must repeat; copies, since files that are mapped hold the disk."""
    return {
        f"{file.relative_to(run)}/{name}": tensor.clone()
        for file in run.rglob("*.safetensors")
        if ".partial" not in file.name
        for name, tensor in load_file(file).items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(each, other[name]) for name, each in one.items())


@dataclass
class Harness:
    """Runs with faults on one disk."""

    disk: Disk
    moments: Moments
    expected: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def undisturbed(self) -> None:
        """What every flow leaves, and how many moments it has."""
        for name, flow in _FLOWS.items():
            with self.moments.watched(lambda number: None):
                flow(self.disk.run)
            self.expected[name], self.counts[name] = tensors(self.disk.run), self.moments.count
            shutil.rmtree(self.disk.run)

    def attempt(self, kind: str, name: str, chance: random.Random) -> bool:
        """One run with a fault, and the same again without; whether the first was refused."""
        moment = chance.randint(1, self.counts[name])
        left = chance.choice([0, chance.randrange(2**12), chance.randrange(2**16)])
        refused = False

        def act(number: int) -> None:
            if number == moment:
                _KINDS[kind](self.disk, left)

        try:
            with self.moments.watched(act):
                _FLOWS[name](self.disk.run)
        except StorageError as error:
            refused = True
            assert _MESSAGE.search(str(error)), f"no sizes in: {error}"
        except _TrainerError:
            pass
        finally:
            leftover = [] if kind == "read-only" else _leftover(self.disk.run)
            self.disk.restore()
        assert not leftover, f"left behind: {leftover}"
        self._check_finished(name)
        _FLOWS[name](self.disk.run)
        assert same(tensors(self.disk.run), self.expected[name]), "other results after the fault"
        leftover = [*_leftover(self.disk.run), *self.disk.run.rglob("*.blocks"), *self.disk.run.rglob("*.partial*")]
        assert not leftover, f"left behind at the end: {leftover}"
        shutil.rmtree(self.disk.run)
        return refused

    def _check_finished(self, name: str) -> None:
        """What has its name is whole, and what it should be."""
        for manifest in (file for file in self.disk.run.rglob("manifest.json") if file.parent.suffix != ".part"):
            artifact = Artifact(manifest.parent, read_manifest(manifest.parent)["fingerprint"])
            place = manifest.parent.relative_to(self.disk.run)
            for tensor, value in artifact.load().items():
                files = (f"{place}/{file}.safetensors/{tensor}" for file in ("tensors", "matrices"))
                expected = next((self.expected[name][file] for file in files if file in self.expected[name]), None)
                assert expected is None or torch.equal(value, expected), f"wrong result: {place}"


def _leftover(run: Path) -> list[Path]:
    found = [path for path in run.rglob("*") if _TEMPORARY.search(path.name)]
    return [path for path in found if not path.is_dir() or [each.name for each in path.iterdir()] != [_MATRICES]]


def _quota(disk: Disk, left: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))


# What a fault does, given the bytes that it leaves.
_KINDS: dict[str, Callable[[Disk, int], object]] = {
    "full disk": Disk.fill,
    "quota": _quota,
    "read-only": lambda disk, left: disk.protect(0o555),
}


def main(folder: str, count: str, seed: str, *kinds: str) -> None:
    """All faults of these kinds; the last line of the output is their outcomes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    logging.getLogger("wherefrom").setLevel(logging.ERROR)
    disk = Disk(Path(folder))
    if can_mount():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", folder], check=True)
    harness = Harness(disk, Moments(disk.run))
    harness.undisturbed()
    outcomes = []
    for kind in kinds:
        chance, refused = random.Random(seed), 0
        for case in range(int(count)):
            name = chance.choices(list(_FLOWS), weights=[3, 1, 1])[0]
            try:
                refused += harness.attempt(kind, name, chance)
            except Exception:
                print(f"{kind}, seed {seed}, case {case}, {name}:\n{traceback.format_exc()}")
                sys.exit(1)
        outcomes.append(asdict(_outcome(kind, int(count), refused)))
    print(json.dumps(outcomes))


def _outcome(kind: str, count: int, refused: int) -> Outcome:
    what = {
        "full disk": "a disk that fills up at a random moment of a fit, score, bank of retrainings or recording",
        "quota": "a limit on the size of files that comes at such a moment",
        "read-only": "directories that become read-only at such a moment",
    }
    result = (
        f"{refused} ended with a StorageError that says what was needed and free, {count - refused} had room enough; "
        "nothing was half-written, and the same call then ended with the undisturbed run's bits"
    )
    return Outcome(what[kind], count, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
