"""The explainer for quanda, where quanda is installed: its scores are those of autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import wherefrom as wf

pytest.importorskip("quanda", reason="pip install quanda")


@pytest.fixture
def explainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "digits"))
    from quanda_metrics import WherefromExplainer  # type: ignore[import-not-found,unused-ignore]

    return WherefromExplainer


def test_explanations_are_products_of_gradients(explainer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    torch.save(model.state_dict(), tmp_path / "model.pt")
    gradients = []
    for image, label in zip(images, labels, strict=True):
        loss = functional.cross_entropy(model(image[None]), label[None])
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([each.flatten() for each in slopes]))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    for weight in model.parameters():  # those of the file are explained
        weight.data.zero_()
    dataset = torch.utils.data.TensorDataset(images[:7], labels[:7])
    found = explainer(model, dataset, [str(tmp_path / "model.pt")], method=wf.Dot(), run=tmp_path / "run")
    torch.testing.assert_close(found.explain(images[7:], labels[7:]), expected[7:, :7])
    torch.testing.assert_close(found.explain(images[7:], labels[7:].tolist()), expected[7:, :7])
    torch.testing.assert_close(found.self_influence(), expected.diagonal()[:7])
    random = explainer(model, dataset, method=wf.Random(), run=tmp_path / "run")
    alone = random.explain(images[:7], labels[:7])
    torch.testing.assert_close(random.self_influence().double(), alone.diagonal().double())
