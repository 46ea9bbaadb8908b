"""The digits example at a small size: what it writes is recomputed from what it left on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from tests.processes import run_script
from tests.runs import only

SCRIPT = Path(__file__).parents[1] / "examples" / "digits" / "find_mislabels.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    sizes = ("--num_seeds", "1", "--epochs", "8", "--shown_epoch", "8", "--max_train_examples", "400")
    done = run_script(SCRIPT, "--run_dir", str(folder), *sizes)
    assert done.returncode == 0, done.stderr
    assert "40 of 400 labels are wrong" in done.stdout
    return folder


def flipped() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels with flips, by the rule that the page gives, and which are wrong."""
    true = torch.from_numpy(load_digits().target)[:400]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(400, generator=generator)[:40]
    labels = true.clone()
    labels[chosen] = (true[chosen] + torch.randint(1, 10, (40,), generator=generator)) % 10
    return labels, labels != true


@pytest.mark.parametrize(
    ("strategy", "label"), [("identity", "dot"), ("diagonal", "diagonal"), ("kfac", "kfac"), ("ekfac", "ekfac")]
)
def test_the_area_follows_from_the_self_influence_on_disk(run: Path, strategy: str, label: str) -> None:
    _, wrong = flipped()
    assert int(wrong.sum()) == 40
    numbers = json.loads((run / "evaluation" / "mislabels.json").read_text())
    file = only(run / "seed0-epoch8" / "self_influence", label) / "tensors.safetensors"
    found = load_file(file)["self_influence"]
    stage = numbers["rankings"]["8"][strategy]
    assert stage["auc"] == [pytest.approx(roc_auc_score(wrong.numpy(), found.numpy()), abs=1e-12)]
    assert stage["found"] == [pytest.approx(float(wrong[found.topk(40).indices].double().mean()))]
    assert stage["auc"][0] > 0.9


def test_the_plot_is_there(run: Path) -> None:
    assert (run / "evaluation" / "mislabels.png").read_bytes().startswith(b"\x89PNG")
