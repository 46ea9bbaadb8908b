"""Adam's preconditioner: against the optimizer's own state and steps, parameter by parameter in its own shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.test_layers import CASES
from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.store.recording import MOMENTS, ParameterGroup, RecordedCheckpoint

BETA, EPS, STEPS = 0.9, 1e-4, 3
GROUP = ParameterGroup(0.01, (0.8, BETA), EPS, 0.0)


def trained(case: Case, folder: Path) -> tuple[RecordedCheckpoint, torch.optim.AdamW]:
    """The case's model after some steps on single examples, and what a recording would hold of it."""
    case.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01, betas=(0.8, BETA), eps=EPS)
    for example in case.train[:STEPS]:
        optimizer.zero_grad()
        case.task.train_loss(case.model, case.task.collate([example])).backward()
        optimizer.step()
    optimizer.zero_grad()
    folder.mkdir()
    parameters = {name: each for name, each in case.model.named_parameters() if each in optimizer.state}
    save_file({name: optimizer.state[each]["exp_avg_sq"] for name, each in parameters.items()}, folder / MOMENTS)
    return RecordedCheckpoint(folder, STEPS, 1.0, STEPS, "AdamW", (GROUP, replace(GROUP, weight_decay=0.1))), optimizer


def gradients(case: Case, example: object, measured: bool) -> dict[str, Tensor]:
    batch = case.task.collate([example])
    loss = case.task.measurement(case.model, batch) if measured else case.task.train_loss(case.model, batch)
    names, parameters = zip(*case.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def stepped(case: Case, optimizer: torch.optim.AdamW, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer's state would make of a momentum of these gradients, in units of the learning rate."""
    found = {}
    for name, parameter in case.model.named_parameters():
        mean_square = optimizer.state[parameter]["exp_avg_sq"] / (1 - BETA**STEPS)
        found[name] = given[name] / (mean_square.sqrt() + EPS)
    return found


@pytest.mark.parametrize("name", ["mlp", "gpt2", "conv2d", "norms", "embedding", "tied gpt2"])
def test_scores_are_products_of_gradients_over_adam_s_roots(tmp_path: Path, name: str) -> None:
    makers: dict[str, Callable[[], Case]] = {**CASES, "mlp": mlp_case, "gpt2": gpt2_case}
    case = makers[name]()
    checkpoint, optimizer = trained(case, tmp_path / "checkpoint-3")
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    scores = study.score(case.queries, wf.Dot(conditioning=wf.adam_conditioning(checkpoint)))
    tracked = {
        id(each) for layer in study.layers.values() for use in layer.uses for each in use.module.parameters(False)
    }
    chosen = [name for name, each in case.model.named_parameters() if id(each) in tracked]
    expected = torch.zeros(len(case.queries), len(case.train), dtype=torch.float64)
    for row, query in enumerate(case.queries):
        divided = stepped(case, optimizer, gradients(case, query, measured=True))
        for column, example in enumerate(case.train):
            own = gradients(case, example, measured=False)
            expected[row, column] = sum((divided[name] * own[name]).sum() for name in chosen)
    assert relative_error(scores.values, expected) < 1e-9


def test_the_preconditioner_is_that_of_a_real_step(tmp_path: Path) -> None:
    """Without momentum, one more step moves each weight by the learning rate times the preconditioned gradient."""
    case = mlp_case()
    checkpoint, _ = trained(case, tmp_path / "checkpoint-3")
    model, group = case.model, replace(GROUP, betas=(0.0, BETA))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.0, BETA), eps=EPS, weight_decay=0)
    case.task.train_loss(model, case.task.collate(case.train[:2])).backward()
    optimizer.step()
    state = {name: optimizer.state[each]["exp_avg_sq"] for name, each in model.named_parameters()}
    save_file(state, checkpoint.path / MOMENTS)
    gradient = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    given = torch.cat([gradient["first.weight"], gradient["first.bias"][:, None]], 1)
    study = wf.Study(tmp_path / "run", model, case.task, train=case.train)
    conditioning = wf.adam_conditioning(replace(checkpoint, step=1, groups=(group,)))
    factors = study.fit(wf.Dot(conditioning=conditioning))
    moved = {name: before[name] - each for name, each in model.named_parameters()}
    expected = torch.cat([moved["first.weight"], moved["first.bias"][:, None]], 1) / 0.01
    assert relative_error(factors.preconditioner().apply("first", given), expected) < 1e-9


def test_what_a_recording_lacks_is_named(tmp_path: Path) -> None:
    case = mlp_case()
    checkpoint, _ = trained(case, tmp_path / "checkpoint-3")
    for groups in ((GROUP, replace(GROUP, eps=1e-8)), (ParameterGroup(0.1),)):
        with pytest.raises(InputError, match=r"\(beta2, eps\)"):
            wf.adam_conditioning(replace(checkpoint, groups=groups))
    with pytest.raises(InputError, match="no second moments were recorded"):
        wf.adam_conditioning(replace(checkpoint, path=tmp_path))
    (tmp_path / "checkpoint-3" / MOMENTS).write_bytes(b"12")
    with pytest.raises(DamagedError, match="cannot be read as weights"):
        wf.adam_conditioning(checkpoint)
