"""Run directories under test: what is in them, and who may read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import wherefrom as wf
from wherefrom.store.names import labelled


def results(run: Path) -> dict[str, Tensor]:
    """Every finished tensor, by its place in the run directory."""
    return {
        f"{file.parent.relative_to(run)}/{name}": tensor
        for kind in ("tensors", "matrices")
        for file in run.rglob(f"{kind}.safetensors")
        for name, tensor in load_file(file).items()
    }


def only(folder: Path, label: str) -> Path:
    """The one result of a label, whatever its digest."""
    (found,) = (path for path in folder.iterdir() if labelled(path.name) == (label, path.name[-8:]))
    return found


def labels(folder: Path) -> list[str]:
    """The labels of what is in a folder, without digests."""
    return sorted(labelled(path.name)[0] for path in folder.iterdir())


def begun(log: Path) -> list[str]:
    """The batches or retrainings in the order in which they began: what each line says first."""
    return [line.split(" | ")[0] for line in log.read_text().splitlines()] if log.exists() else []


def lines(log: Path) -> int:
    """How many batches were begun."""
    return len(begun(log))


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user to whom permissions apply: for root they mean nothing."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(0)


def factored(strategy: str, **fields: Any) -> wf.Factored:
    """The method of a strategy of factors."""
    kinds = (wf.EKFAC, wf.KFAC, wf.Diagonal, wf.Shampoo, wf.Dot)
    return {kind.strategy: kind for kind in kinds}[strategy](**fields)


def with_factors(factors: wf.Factors, **fields: Any) -> wf.Factored:
    """The method that scores with factors which are there."""
    return factored(factors.strategy, factors=factors, **fields)
