"""What a batch takes: counted of one example, and held against a count of every tensor that lives."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wherefrom as wf
from wherefrom.curvature.collectors import EigenvalueCollector
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.memory import SavedBytes
from wherefrom.tasks.losses import summed_cross_entropy

CPU = torch.device("cpu")


def test_weights_are_no_part_of_what_an_example_takes() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 2))
    task = wf.Classification()
    sweep: Sweep[Any] = Sweep(model, task, select_layers(model))
    rows: list[object] = [(torch.randn(1000), torch.tensor(0))]
    found = sweep.footprint(Examples(rows, task))
    assert found.tokens == 1
    assert found.gradient_bytes == 4 * 1000 * 1008
    assert found.saved_bytes < 50_000  # the activations of three layers; the weights are 4 MB
    assert found.flop == 2 * (1000 * 1000 + 2 * 1000 * 2)  # the first layer's inputs need no gradient


def test_a_storage_counts_once_and_as_large_as_it_is() -> None:
    """Autograd keeps views of one tensor for products of its parts, and of a broadcast one what is there of it."""
    model = nn.Linear(6, 8, bias=False)
    inputs = torch.randn(5, 6, requires_grad=True)
    saved = SavedBytes(model)
    with saved.counting():
        one, other = model(inputs).split(4, 1)
        (one * other).sum()
        (one * torch.ones((), requires_grad=True).expand(5, 4)).sum()
    # The inputs and the layer's output, whose two halves are views of it, and the single number.
    assert (saved.total, saved.shared) == (4 * 5 * 6 + 4 * 5 * 8 + 4, 0)


def test_weights_cast_for_a_pass_belong_to_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast makes a copy of every weight of every batch, which the backward pass needs once."""
    monkeypatch.setattr("wherefrom.runtime.precision.native_bfloat16", lambda device: True)
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 200), nn.Tanh(), nn.Linear(200, 3))
    task = wf.Classification()
    sweep: Sweep[Any] = Sweep(model, task, select_layers(model), wf.Execution(half_precision=True))
    rows: list[object] = [(torch.randn(1000), torch.tensor(0))] * 3
    found = sweep.footprint(Examples(rows, task))
    assert found.shared_bytes == 2 * (1000 * 200 + 200 * 3)  # the first layer's inputs need no gradient
    assert found.saved_bytes < 7_000  # of which 4,000 are the inputs
    assert found.batch_bytes(3) == found.shared_bytes + 3 * found.bytes
    assert found.affordable(found.batch_bytes(3)) == 3
    assert found.affordable(found.batch_bytes(3) - 1) == 2
    assert found.affordable(0) == 0


class TokenClassification(wf.Task[tuple[Tensor, Tensor]]):
    """A class for each position."""

    def train_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], sampler: object = None) -> Tensor:
        inputs, labels = batch
        return summed_cross_entropy(model(inputs), labels)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were there at once, beyond those of a model; by their storages' lives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = [each.untyped_storage() for each in model.parameters()]
        self._known = {each._cdata for each in self._model}
        self._now = self.most = 0

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self._known:
                storage = each.untyped_storage()
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._now)
        return result


@pytest.mark.parametrize("classes", [8, 2000])
def test_a_batch_takes_what_is_estimated(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Against a count of all tensors that live at once, in a batch of eight; with few classes, layers take the most."""
    # Chunks of which a few are no part of an example.
    monkeypatch.setattr("wherefrom.tasks.losses._CHUNK_BYTES_PER_THREAD", 2**14)
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU()) for _ in range(6)]
    model = nn.Sequential(*blocks, nn.Linear(64, classes))
    rows: list[object] = [(torch.randn(100, 64), torch.randint(classes, (100,)))] * 8
    task = TokenClassification()
    layers = select_layers(model, ["?.?"])
    sweep: Sweep[Any] = Sweep(model, task, layers)
    eigenvalues = EigenvalueCollector(layers, {}, 8, torch.float32, CPU)
    expected = sweep.footprint(Examples(rows, task)).batch_bytes(8)
    with LiveBytes(model) as live:
        sweep.probe(Examples(rows, task), lambda layer, each: eigenvalues.collect(layer, each, slice(0, 8)), count=8)
    assert 0.85 * live.most < expected < 1.15 * live.most
