"""The retraining bank: right numbers, nothing trained twice, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import start
from tests.retrain_worker import (
    EXAMPLES,
    FINGERPRINT,
    QUERIES,
    SEEDS,
    SUBSETS,
    MeanModel,
    expected_losses,
    fill,
    fill_until_ended,
    processes,
)
from tests.runs import begun
from wherefrom.evaluate.retrain import Retraining, half_subsets, retrain
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.runtime.errors import DamagedError, InputError, LossError, MismatchError, TrainingError
from wherefrom.store.artifacts import Artifact, read_manifest

RUNS = SUBSETS * len(SEEDS)
MASKS = half_subsets(EXAMPLES, SUBSETS)


def kept(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def finished(path: Path) -> list[Path]:
    return [each for each in path.glob("*") if each.suffix != ".part"]


def leftovers(path: Path) -> list[Path]:
    return [*path.glob("*.part"), *path.parent.glob(f"{path.name}.*")]


def same_bits(found: GroundTruth, expected: GroundTruth) -> bool:
    return torch.equal(found.losses, expected.losses) and torch.equal(found.masks, expected.masks)


def test_losses_are_those_of_the_closed_form(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    found = fill(tmp_path / "bank", tmp_path / "log", 1)
    assert found.losses.dtype == torch.float64
    np.testing.assert_allclose(found.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)
    assert found.losses.is_contiguous()  # as files want it
    assert len(begun(tmp_path / "log")) == len(set(begun(tmp_path / "log"))) == RUNS
    assert leftovers(tmp_path / "bank") == []
    assert torch.get_num_threads() == threads


def test_a_bank_grows_by_what_is_missing(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    fill(bank, log, 1)
    more, seeds = half_subsets(EXAMPLES, SUBSETS + 2).flip(0), (3, 5, 7)
    found = retrain(bank, MeanModel(log), more, seeds, fingerprint=FINGERPRINT, workers=1)
    np.testing.assert_allclose(found.losses, expected_losses(more.numpy(), seeds), rtol=1e-14)
    assert len(begun(log)) == len(set(begun(log))) == (SUBSETS + 2) * len(seeds)
    again = fill(bank, log, 1)  # fewer than there are, in the first order
    np.testing.assert_allclose(again.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)
    assert len(begun(log)) == (SUBSETS + 2) * len(seeds)
    assert leftovers(bank) == []


def test_equal_subsets_are_trained_once(tmp_path: Path) -> None:
    masks = MASKS[[0, 1, 0]]
    found = retrain(tmp_path / "bank", MeanModel(tmp_path / "log"), masks, [1], fingerprint=FINGERPRINT, workers=1)
    np.testing.assert_allclose(found.losses, expected_losses(masks.numpy(), [1]), rtol=1e-14)
    assert len(begun(tmp_path / "log")) == 2


def test_groups_have_subsets_of_one_size(tmp_path: Path) -> None:
    masks = torch.ones(5, EXAMPLES, dtype=torch.bool).tril(-1 + EXAMPLES // 2)
    masks[[1, 3]] = True
    groups: list[list[int]] = []

    def train(retrainings: Sequence[Retraining]) -> Tensor:
        groups.append([len(each.subset) for each in retrainings])
        return MeanModel(tmp_path / "log")(retrainings)

    found = retrain(tmp_path / "bank", train, masks, [1, 2], fingerprint=FINGERPRINT, workers=1, together=3)
    np.testing.assert_allclose(found.losses, expected_losses(masks.numpy(), [1, 2]), rtol=1e-14)
    assert all(len(set(group)) == 1 for group in groups)
    assert max(len(group) for group in groups) == 2  # both seeds of a subset, or of two equal ones


def test_processes_give_the_same_bits(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", tmp_path / "log1", 1)
    two = fill(tmp_path / "two", tmp_path / "log2", 2, meet=2)
    assert same_bits(two, one)
    assert sorted(begun(tmp_path / "log2")) == sorted(begun(tmp_path / "log1"))
    for log, count in ((tmp_path / "log1", 1), (tmp_path / "log2", 2)):
        assert len(processes(log)) == count
        assert {line.split(" | ")[1] for line in log.read_text().splitlines()} == {"1"}  # CPU threads
    assert processes(tmp_path / "log1") == {os.getpid()} and os.getpid() not in processes(tmp_path / "log2")


@dataclass(frozen=True)
class Constant:
    """Returns the same losses whatever was to be trained."""

    losses: Tensor

    def __call__(self, retrainings: Sequence[Retraining]) -> Tensor:
        return self.losses


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody waits for stays as a zombie where there is no init."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("workers", "ends"),
    [(1, [(1, signal.SIGKILL), (4, signal.SIGKILL)]), (2, [(3, signal.SIGKILL), (6, signal.SIGINT)])],
)
def test_interrupted_banks_end_with_the_same_bits(
    tmp_path: Path, workers: int, ends: list[tuple[int, signal.Signals]]
) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    for interruptions, (after, kind) in enumerate(ends, start=1):
        running = start(fill_until_ended, bank, log, workers, after)
        while len(begun(log)) < after and running.process.is_alive():
            time.sleep(0.002)
        assert running.process.pid is not None
        os.kill(running.process.pid, kind)
        assert running.finished().returncode == (130 if kind == signal.SIGINT else -kind)
        deadline = time.monotonic() + 60  # instead of hanging where orphans stay for ever
        while not all(gone(each) for each in processes(log)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(gone(each) for each in processes(log))
        # What was under way is lost, and nothing else.
        assert len(begun(log)) >= after
        assert len(finished(bank)) >= len(begun(log)) - workers * interruptions
    found = fill(bank, log, 1)
    assert same_bits(found, fill(tmp_path / "undisturbed", tmp_path / "log2", 1))
    assert set(begun(log)) == set(begun(tmp_path / "log2"))
    assert len(begun(log)) <= RUNS + workers * len(ends)
    assert leftovers(bank) == []


def test_a_kill_while_a_result_is_written_loses_nothing_else(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    expected = fill(bank, log, 1)
    last = finished(bank)[-1]
    last.rename(last.with_name(f"{last.name}.part"))  # killed before it had its name
    assert same_bits(fill(bank, log, 1), expected)
    assert len(begun(log)) == RUNS + 1
    assert leftovers(bank) == []


def test_a_kill_while_all_is_deleted_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    expected = fill(bank, log, 1)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(bank, log, 1, overwrite=True)
    assert same_bits(fill(bank, log, 1, overwrite=True), expected)
    assert len(begun(log)) == 2 * RUNS
    assert leftovers(bank) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_training_is_named_and_the_rest_kept(tmp_path: Path, workers: int) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    model = MeanModel(log, fail=kept(MASKS[2]))
    with pytest.raises(TrainingError, match="subset 2 with seed 7 failed: ArithmeticError: no such model") as caught:
        retrain(bank, model, MASKS, SEEDS, fingerprint=FINGERPRINT, workers=workers)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    before, stored = begun(log), len(finished(bank))
    assert f"{stored} of {RUNS} retrainings are finished" in str(caught.value)
    assert stored >= 2  # subsets 0 and 1 began before, and what is under way is finished
    found = fill(bank, log, 1)
    np.testing.assert_allclose(found.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)
    assert len(begun(log)) == len(before) + RUNS - stored


def test_a_dead_worker_is_reported_and_the_rest_kept(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    model = MeanModel(log, seconds=0.05, kill=kept(MASKS[2]))
    with pytest.raises(TrainingError, match=r"A training process died.*\d of 8 retrainings are finished"):
        retrain(bank, model, MASKS, SEEDS, fingerprint=FINGERPRINT, workers=2)
    before, stored = len(begun(log)), len(finished(bank))
    assert stored >= 1  # one of subsets 0 and 1, or subset 2 would not have begun
    found = fill(bank, log, 1)
    np.testing.assert_allclose(found.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)
    assert len(begun(log)) == before + RUNS - stored


def test_a_script_that_starts_itself_again_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom tests.retrain_worker import fill\n"
        f"fill(Path({str(tmp_path / 'bank')!r}), Path({str(tmp_path / 'log')!r}), 2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    found = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 1
    message = found.stderr.splitlines()[-1]
    assert "A training process died" in message and "0 of 8 retrainings are finished" in message
    assert 'under `if __name__ == "__main__":`' in message


def test_a_damaged_retraining_is_found_and_can_be_replaced(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    model = MeanModel(log, fail=kept(MASKS[3]))
    with pytest.raises(TrainingError):
        retrain(bank, model, MASKS, SEEDS, fingerprint=FINGERPRINT, workers=1)
    stored = sorted(finished(bank))
    damaged = stored[1]
    file = damaged / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=str(file)):
        fill(bank, log, 1)
    manifest = damaged / "manifest.json"
    manifest.unlink()
    with pytest.raises(DamagedError, match=str(manifest)):
        fill(bank, log, 1)
    shutil.rmtree(damaged)
    before = len(begun(log))
    found = fill(bank, log, 1)
    np.testing.assert_allclose(found.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)
    assert len(begun(log)) == before + RUNS - len(stored) + 1


def test_foreign_banks_are_refused_by_what_changed(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    fill(bank, log, 1)
    with pytest.raises(MismatchError, match="model: stored the mean, now the median"):
        retrain(bank, MeanModel(log), MASKS, SEEDS, fingerprint={"model": "the median"}, workers=1)
    with pytest.raises(MismatchError, match="training examples: stored 10, now 9"):
        retrain(bank, MeanModel(log), MASKS[:, :9], SEEDS, fingerprint=FINGERPRINT, workers=1)
    assert len(begun(log)) == RUNS
    other = {"model": "the median"}
    retrain(bank, MeanModel(log), MASKS, SEEDS, fingerprint=other, workers=1, overwrite=True)
    assert len(begun(log)) == 2 * RUNS
    assert {read_manifest(each)["fingerprint"]["model"] for each in finished(bank)} == {"the median"}


def test_another_machine_reads_a_bank_but_does_not_extend_it(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"
    expected = fill(bank, log, 1)
    for folder in finished(bank):
        fingerprint = read_manifest(folder)["fingerprint"]
        assert torch.__version__ in fingerprint["trained with"] and "1 CPU thread" in fingerprint["trained with"]
        tensors = Artifact(folder, fingerprint).load()
        Artifact(folder, {**fingerprint, "trained with": "an abacus"}).save(tensors)
    assert same_bits(fill(bank, log, 1), expected)
    with pytest.raises(MismatchError, match="trained with: stored an abacus, now wherefrom"):
        retrain(bank, MeanModel(log), MASKS, [*SEEDS, 1], fingerprint=FINGERPRINT, workers=1)
    assert len(begun(log)) == RUNS


def test_functions_that_cannot_travel_work_in_this_process_only(tmp_path: Path) -> None:
    def train(retrainings: Sequence[Retraining]) -> Tensor:
        return MeanModel(tmp_path / "log")(retrainings)

    arguments: dict[str, Any] = {"masks": MASKS, "seeds": SEEDS, "fingerprint": FINGERPRINT}
    with pytest.raises(InputError, match="workers=1"):
        retrain(tmp_path / "bank", train, workers=2, **arguments)
    found = retrain(tmp_path / "bank", train, workers=1, **arguments)
    np.testing.assert_allclose(found.losses, expected_losses(MASKS.numpy(), SEEDS), rtol=1e-14)


def test_losses_that_are_not_finite_name_their_retraining(tmp_path: Path) -> None:
    bank, log = tmp_path / "bank", tmp_path / "log"

    def train(retrainings: Sequence[Retraining]) -> Tensor:
        losses = MeanModel(log)(retrainings)
        bad = [row for row, each in enumerate(retrainings) if each == Retraining(kept(MASKS[1]), 3)]
        losses[bad, 2] = float("nan")
        return losses

    with pytest.raises(LossError, match="subset 1 with seed 3 the loss of query 2 is nan"):
        retrain(bank, train, MASKS, SEEDS, fingerprint=FINGERPRINT, workers=1, together=RUNS)
    assert len(finished(bank)) == RUNS - 1  # the others of its group are kept
    fill(bank, log, 1)
    assert len(begun(log)) == RUNS + 1


def test_losses_of_the_wrong_shape_name_their_retraining(tmp_path: Path) -> None:
    bank, model = tmp_path / "bank", MeanModel(tmp_path / "log")
    arguments: dict[str, Any] = {"masks": MASKS, "fingerprint": FINGERPRINT, "workers": 1}
    for shape in ((), (len(QUERIES),), (1, 0), (0, len(QUERIES)), (2, len(QUERIES))):
        with pytest.raises(InputError, match=r"train returned .* for subset 0 with seed 7.*expected \[1, "):
            retrain(bank, Constant(torch.ones(shape)), seeds=SEEDS, **arguments)
    retrain(bank, model, seeds=SEEDS, **arguments)
    with pytest.raises(InputError, match=rf"\[1, 2\] losses for subset 0 with seed 9.*expected \[1, {len(QUERIES)}\]"):
        retrain(bank, lambda runs: model(runs)[:, :2], seeds=[9], **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": MASKS.float()}, "masks is torch.float32"),
        ({"masks": MASKS[0]}, "expected torch.bool"),
        ({"masks": MASKS[:0]}, "at least one subset"),
        ({"masks": MASKS & (torch.arange(SUBSETS) != 2)[:, None]}, "subset 2 keeps no example"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 2, 1]}, "none of them twice"),
        ({"seeds": [1.5]}, "seed 1.5 is a float"),
        ({"workers": 0}, "workers=0"),
        ({"together": 0}, "together=0"),
    ],
)
def test_arguments_are_checked_before_anything_is_trained(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"masks": MASKS, "seeds": SEEDS, "fingerprint": FINGERPRINT, "workers": 1, **change}
    with pytest.raises(InputError, match=message):
        retrain(tmp_path / "bank", MeanModel(tmp_path / "log"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_half_subsets() -> None:
    masks = half_subsets(101, 40, seed=5)
    assert masks.dtype == torch.bool and masks.sum(1).tolist() == [50] * 40
    assert len({kept(mask) for mask in masks}) == 40
    assert torch.equal(half_subsets(101, 7, seed=5), masks[:7])
    assert not torch.equal(half_subsets(101, 40, seed=6), masks)
    # Each example is kept in about half of them: a count of 40 coin tosses, six standard deviations wide.
    assert bool(((masks.sum(0) - 20).abs() < 19).all())
    for arguments in ((1, 3), (10, 0)):
        with pytest.raises(InputError, match="at least"):
            half_subsets(*arguments)
