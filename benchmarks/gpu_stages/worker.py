"""A fit and a score as a process of its own, to be killed or to meet another: `python -m gpu_stages.worker --help`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import wherefrom as wf
from gpu_stages import correctness


class Logged(wf.CausalLM):
    """Writes a line for every batch before it is computed, and takes its time.

    Attributes:
        log: where.
        pause: seconds.
    """

    _log: Path
    _pause: float

    def train_loss(self, *arguments: object) -> Tensor:
        with self._log.open("a") as stream:
            stream.write("batch\n")
        time.sleep(self._pause)
        return super().train_loss(*arguments)  # type: ignore[arg-type]


def work(run: Path, device: str, width: int, pause: float) -> Tensor:
    """Scores of the small GPT-2, with partial sums that are saved after every batch."""
    given = correctness.case("GPT-2", width)
    task = Logged(given.task.layers)
    run.mkdir(parents=True, exist_ok=True)
    task._log, task._pause = run / "batches.log", pause
    execution = wf.Execution(train_batch_size=2, query_batch_size=3, checkpoint_seconds=0, progress=False)
    study = wf.Study(run, given.model.to(device), task, train=given.train, execution=execution)
    return study.score(given.queries).values.clone()


def main() -> None:
    """Join the other processes where torchrun has started several, do the work, write the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=correctness.WIDTH)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--join", action="store_true", help="the processes that torchrun has started share the work")
    given = parser.parse_args()
    device = str(wf.join_ranks()) if given.join else given.device
    values = work(given.run, device, given.width, given.pause)
    if not given.join or not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_file({"values": values}, given.output)


if __name__ == "__main__":
    main()
