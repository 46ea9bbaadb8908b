"""Scoring in processes of its own: one that is killed, or several that share the work.

This module must not know what is checked afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.contract.methods import METHODS, values
from tests.contract.settings import Setting
from wherefrom.runtime.distributed import Ranks, join_ranks
from wherefrom.runtime.errors import WherefromError

OUTCOME = "outcome.json"


def score_alone(folder: Path, names: Iterable[str], setting: Setting, kill_at: int = 0) -> None:
    """Score in these ways, each in a run directory of its own.

    Args:
        kill_at: end the process with SIGKILL at this loss of each; 0 is never.
    """
    torch.set_num_threads(1)
    for name in names:
        _score(folder / name, name, setting, kill_at)


def score_together(folder: Path, names: Iterable[str], setting: Setting) -> None:
    """The same as one of several processes."""
    torch.set_num_threads(1)
    join_ranks()
    try:
        for name in names:
            _score(folder / name, name, setting, 0)
    finally:
        dist.destroy_process_group()


def _score(folder: Path, name: str, setting: Setting, kill_at: int) -> None:
    """Leave the run directory and what came of it: values, how many losses were computed, or an error."""
    setting.task.kill_at(kill_at)
    outcome: dict[str, str | int] = {}
    try:
        found = values(METHODS[name].score(folder / "run", setting))
        outcome["calls"] = setting.task.calls
    except WherefromError as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
    ranks = Ranks.current()
    outcome_folder = folder / f"rank{ranks.index}"
    outcome_folder.mkdir(parents=True, exist_ok=True)
    if "error" not in outcome:
        save_file({"values": found.contiguous()}, outcome_folder / "values.safetensors")
    (outcome_folder / OUTCOME).write_text(json.dumps(outcome))
