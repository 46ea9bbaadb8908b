"""Dense Gauss-Newton matrices in float64, made of Jacobians, one example and one output at a time; and their models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, gpt2, mlp_case, token_rows
from tests.reference import BruteForce
from wherefrom.curvature.factors import Factors
from wherefrom.curvature.gauss_newton import DampedGaussNewton
from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples

Logits = Callable[[nn.Module, object], Tensor]
"""The rows [outputs, classes] that one example's loss is a function of."""


def regression_case() -> Case:
    case = mlp_case()
    generator = torch.Generator().manual_seed(5)
    examples: list[object] = [(each[0], torch.randn(3, generator=generator).double()) for each in case.train]  # type: ignore[index]
    return Case(case.model, wf.Regression(), examples, examples[:4])


def convolution_case() -> Case:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 3)
    ).double()
    examples: list[object] = [(torch.randn(2, 4, 4).double(), torch.randint(3, ())) for _ in range(6)]
    return Case(model, wf.Classification(["*"]), examples[:5], examples[5:])


def gpt2_case() -> Case:
    """Padded batches, a prompt that is not counted, an MLP and an attention."""
    rows = token_rows(9)
    assert isinstance(rows[0], dict)
    rows[0]["prompt_length"] = 1
    return Case(gpt2(layers=1), wf.CausalLM(["transformer.h.*"]), rows[:5], rows[5:])


def tied_case() -> Case:
    """The embedding, which is the head too, and a normalisation."""
    case = gpt2_case()
    return Case(case.model, wf.CausalLM(["lm_head", "transformer.ln_f", "transformer.h.0.mlp.c_fc"]), case.train, [])


def label_rows(model: nn.Module, example: object) -> Tensor:
    """The output for one example of pairs, as one row."""
    assert isinstance(example, tuple)
    row: Tensor = model(example[0].unsqueeze(0))
    return row


def token_logits(model: nn.Module, example: object) -> Tensor:
    """The logits of the positions whose next token is counted, of a sequence alone, without padding."""
    assert isinstance(example, dict)
    logits: Tensor = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
    return logits[max(0, example.get("prompt_length", 0) - 1) : -1]


CASES: dict[str, tuple[Callable[[], Case], Logits]] = {
    "classification": (mlp_case, label_rows),
    "regression": (regression_case, label_rows),
    "convolution": (convolution_case, label_rows),
    "gpt2": (gpt2_case, token_logits),
    "tied": (tied_case, token_logits),
}


def study_of(case: Case, folder: Path) -> wf.Study[object]:
    return wf.Study(folder, case.model, case.task, train=case.train)


def dense(case: Case, study: wf.Study[object], logits: Logits) -> Tensor:
    """The Gauss-Newton matrix [weights, weights]: J^T (d^2 loss / d z^2) J, one example and one output at a time."""
    brute = BruteForce(case.model, case.task, list(study.layers), [], [])
    names, weights = zip(*brute.model.named_parameters(), strict=True)
    total = torch.zeros(())
    for example in case.train:
        rows = logits(brute.model.requires_grad_(), example)
        for row in rows:
            parts = [torch.autograd.grad(each, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
                     for each in row]  # fmt: skip
            gradients = [dict(zip(names, part, strict=True)) for part in parts]
            jacobian = torch.stack(
                [torch.cat([brute.matrix(name, each).flatten() for name in brute.layers]) for each in gradients]
            )
            p = row.detach().softmax(0)
            inner = torch.eye(len(row)) if isinstance(case.task, wf.Regression) else p.diag() - torch.outer(p, p)
            total = total + jacobian.T @ inner.double() @ jacobian
    return total / len(case.train)


def system_of(
    study: wf.Study[object], case: Case, damping: float = 0.1, pairs: int = 1000, factors: Factors | None = None
) -> DampedGaussNewton[object]:
    preconditioner = Operator({}, {}) if factors is None else factors.preconditioner(damping)
    return DampedGaussNewton(study._sweep, preconditioner, Examples(case.train, case.task), damping, pairs)
