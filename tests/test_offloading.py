"""Factors on the host: pinned where a GPU copies them for every batch, and the same numbers wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import wherefrom as wf
from tests.models import mlp_case, relative_error
from tests.runs import factored
from wherefrom.curvature.factors import Factors
from wherefrom.curvature.fitting import Fitting
from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.profile import Profile
from wherefrom.store.cache import Cache


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "shampoo", "diagonal"])
def test_all_that_is_copied_for_a_batch_is_pinned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """Of finished factors, as a GPU's study would load them; without a GPU, a note of what was pinned stands for it."""
    case = mlp_case()
    study = wf.Study(tmp_path, case.model, case.task, train=case.train, execution=wf.Execution(offload_factors=True))
    plain = study.fit(factored(strategy))
    pinned: dict[int, Tensor] = {}

    def pin(self: Tensor) -> Tensor:
        copy = self.clone()
        return pinned.setdefault(id(copy), copy)

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: id(self) in pinned)
    monkeypatch.setattr(Sweep, "device", property(lambda self: torch.device("cuda")))
    folder = next(path for path in (tmp_path / "factors").iterdir() if path.is_dir())
    cache = Cache(folder, plain.fingerprint, Profile())
    fitting = Fitting(study._sweep, Examples(case.train, case.task, "drawn"), cache)
    factors = fitting.factors(strategy)
    preconditioner = factors.preconditioner(0.1)
    copied = [
        each for transform in preconditioner.transforms(study.layers).values() for each in transform if each is not None
    ]
    copied += preconditioner.aligned_filters(study.layers).values()
    assert len(copied) == len(study.layers) * (1 if strategy == "diagonal" else 3)
    assert all(each.is_pinned() for each in copied)
    assert isinstance(factors, Factors)
    for name, each in plain.preconditioner(0.1).filters.items():
        assert relative_error(preconditioner.filters[name], each) < 1e-15


def test_offloaded_factors_give_the_same_scores(tmp_path: Path) -> None:
    case = mlp_case()
    found = []
    for offload in (False, True):
        execution = wf.Execution(offload_factors=offload)
        study = wf.Study(tmp_path / str(offload), case.model, case.task, train=case.train, execution=execution)
        found.append(study.score(case.queries, wf.EKFAC()).values)
    assert torch.equal(*found)
