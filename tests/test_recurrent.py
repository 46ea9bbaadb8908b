"""`nn.RNN`, `nn.GRU` and `nn.LSTM`, of whose steps PyTorch's own code shows nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import wherefrom as wf
from tests.dense_gauss_newton import study_of, system_of
from tests.models import Case, Sequences, relative_error, sequences
from tests.reference import gradient_products
from tests.runs import factored
from wherefrom.engine.modules.written.recurrent import recurrent_forward, recurrent_maps
from wherefrom.runtime.errors import LayerError

KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "projected lstm": (nn.LSTM, {"proj_size": 2}),
}
BATCH, STEPS, FEATURES, HIDDEN = 3, 5, 4, 3


def packed(inputs: Tensor, mask: Tensor, sorted_already: bool = False) -> PackedSequence:
    """Of padded inputs [batch, steps, features]."""
    return pack_padded_sequence(inputs, mask.sum(1), batch_first=True, enforce_sorted=sorted_already)


@pytest.mark.parametrize("form", ["batch", "packed", "packed alone", "alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_what_the_module_computes(kind: str, form: str) -> None:
    torch.manual_seed(0)
    make, options = KINDS[kind]
    for layers, bidirectional, bias, first, given in itertools.product([1, 2], *[[False, True]] * 4):
        flags = {"bias": bias, "batch_first": first, "bidirectional": bidirectional, "dropout": 0.5 * (layers > 1)}
        module = make(FEATURES, HIDDEN, layers, **flags, **options)
        module = module.double().eval()
        inputs: Any = torch.randn(BATCH, STEPS, FEATURES).double()
        shape = (layers * (1 + bidirectional), BATCH)
        state = [torch.randn(*shape, size).double() for size in (module.proj_size or HIDDEN, HIDDEN)]
        if form == "alone":
            inputs, state = inputs[0], [each[:, 0] for each in state]
        elif form == "packed":
            inputs = packed(inputs, torch.arange(STEPS) < torch.tensor([4, 5, 2])[:, None])
        elif form == "packed alone":
            inputs, state = packed(inputs[:1], torch.ones(1, STEPS), True), [each[:, :1] for each in state]
        elif not first:
            inputs = inputs.transpose(0, 1)
        before = (tuple(state) if kind.endswith("lstm") else state[0]) if given else None
        found = recurrent_forward(module, recurrent_maps(module))(inputs, before)
        torch.testing.assert_close(found, module(inputs, before))


class Reading(nn.Module):
    """Reads a sequence, begins with a state of its own, and classifies by all outputs and the last state."""

    def __init__(self, kind: str, packs: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        make, more = KINDS[kind]
        self.packs, self.first = packs, options.get("batch_first", False)
        self.embed = nn.Linear(4, FEATURES)
        self.cells = make(FEATURES, HIDDEN, **more, **options)
        self.sizes = (self.cells.proj_size or HIDDEN, HIDDEN)[: 1 + kind.endswith("lstm")]
        ends = self.cells.num_layers * (1 + self.cells.bidirectional)
        self.begin = nn.Linear(4, ends * sum(self.sizes))
        self.head = nn.Linear((1 + self.cells.bidirectional) * self.sizes[0], 3)
        for each in self.parameters():
            nn.init.normal_(each, std=0.6)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(inputs))
        states = self.begin(inputs[:, 0]).unflatten(1, (-1, sum(self.sizes))).transpose(0, 1).contiguous()
        before = states.split(self.sizes, 2)
        before = before[0] if len(before) == 1 else before
        scale = torch.ones(len(inputs), 1)
        if self.packs:
            outputs, last = self.cells(packed(hidden, mask), before)
            outputs = pad_packed_sequence(outputs, batch_first=True)[0]
            for each in last if isinstance(last, tuple) else (last,):
                scale = scale + each.sum((0, 2)).tanh().unsqueeze(1)
        else:
            outputs, _ = self.cells(hidden if self.first else hidden.transpose(0, 1), before)
            outputs = outputs if self.first else outputs.transpose(0, 1)
        logits: Tensor = self.head((outputs * mask[:, :, None]).sum(1))
        return logits * scale


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "packs", "options"),
    [
        ("tanh", False, {"batch_first": True}),
        ("relu", True, {"bidirectional": True}),
        ("gru", False, {"num_layers": 2}),
        ("gru", True, {"bidirectional": True, "bias": False}),
        ("lstm", False, {"batch_first": True, "num_layers": 2}),
        ("lstm", True, {"num_layers": 2, "bidirectional": True}),
        ("projected lstm", True, {"batch_first": True, "bidirectional": True}),
    ],
)
def test_gradients_are_autograds(
    tmp_path: Path, kind: str, packs: bool, options: dict[str, Any], batch_size: int
) -> None:
    model, task, rows = Reading(kind, packs, **options).double(), Sequences(), sequences(7)
    study = wf.Study(tmp_path, model, task, train=rows)
    weights = [name for name, _ in model.cells.named_parameters() if name.startswith("weight")]
    assert list(study.layers) == ["embed", *(f"cells.{name}" for name in weights), "begin", "head"]
    found = study.score(rows, wf.Dot(), execution=wf.Execution(train_batch_size=batch_size)).values
    expected = gradient_products(model, task, lambda name: True, rows, rows)
    assert relative_error(found, expected) < 1e-12


class Steps(nn.Module):
    """`Reading` with a GRU, of linear layers that are called in every step."""

    def __init__(self, like: Reading) -> None:
        super().__init__()
        self.embed, self.begin, self.head = like.embed, like.begin, like.head
        self.read, self.recall = nn.Linear(FEATURES, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        for each, end in ((self.read, "ih"), (self.recall, "hh")):
            each.weight.data = getattr(like.cells, f"weight_{end}_l0").data.clone()
            each.bias.data = getattr(like.cells, f"bias_{end}_l0").data.clone()

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        reset, update, new = self.read(torch.tanh(self.embed(inputs))).chunk(3, 2)
        state, outputs = self.begin(inputs[:, 0]), []
        for step in range(inputs.shape[1]):
            own_reset, own_update, own_new = self.recall(state).chunk(3, 1)
            kept = torch.sigmoid(update[:, step] + own_update)
            fresh = torch.tanh(new[:, step] + torch.sigmoid(reset[:, step] + own_reset) * own_new)
            state = (1 - kept) * fresh + kept * state
            outputs.append(state)
        logits: Tensor = self.head((torch.stack(outputs, 1) * mask[:, :, None]).sum(1))
        return logits


@pytest.mark.parametrize("strategy", ["kfac", "ekfac", "shampoo"])
def test_scores_are_those_of_linear_layers_in_every_step(tmp_path: Path, strategy: str) -> None:
    """All sequences are of one length, since calls of a linear layer do not say which of them are padding."""
    model, task = Reading("gru", packs=False).double(), Sequences()
    rows: list[Any] = sequences(9)
    rows = [(inputs[:2], label) for inputs, label in rows]
    steps = Steps(model).double()
    torch.testing.assert_close(steps(*task.collate(rows)[:2]), model.eval()(*task.collate(rows)[:2]))
    found, expected = (
        wf.Study(tmp_path / name, each, task, train=rows).score(rows, factored(strategy)).values
        for name, each in (("module", model), ("steps", steps))
    )
    assert relative_error(found, expected) < 1e-9


def test_gauss_newton_products_are_those_of_linear_layers_in_every_step(tmp_path: Path) -> None:
    """There the weights have derivatives, backward and forward, and must have each step's once."""
    model, rows = Reading("gru", packs=False).double(), sequences(4)
    products = []
    for name, each, layers in (("module", model, ["cells.*"]), ("steps", Steps(model).double(), ["read", "recall"])):
        case = Case(each, Sequences(layers), rows, [])
        size = 2 * 3 * HIDDEN + 3 * HIDDEN * (FEATURES + HIDDEN)
        vectors = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        products.append(system_of(study_of(case, tmp_path / name), case).product(vectors))
    assert relative_error(*products) < 1e-10


def test_factors_do_not_depend_on_padding(tmp_path: Path) -> None:
    model, rows = Reading("lstm", packs=True).double(), sequences(7)
    scores = [
        wf.Study(tmp_path / str(size), model, Sequences(), train=rows)
        .score(rows, wf.EKFAC(), execution=wf.Execution(train_batch_size=size, query_batch_size=size))
        .values
        for size in (1, 7)
    ]
    assert relative_error(scores[1], scores[0]) < 1e-9


class Sorting(Reading):
    """As it was done before `enforce_sorted`: a batch is sorted by length, and put back."""

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True)
        outputs, _ = self.cells(packed(inputs[order], mask[order], sorted_already=True))
        outputs = pad_packed_sequence(outputs, batch_first=True)[0][order.argsort()]
        logits: Tensor = self.head((outputs * mask[:, :, None]).sum(1))
        return logits


def test_sequences_whose_examples_are_not_known_are_refused(tmp_path: Path) -> None:
    model, rows = Sorting("gru", packs=True).double(), sequences(7)
    alone, together = wf.Execution(train_batch_size=1, query_batch_size=1), wf.Execution(train_batch_size=4)
    task = Sequences(["cells.*", "head"])
    found = wf.Study(tmp_path, model, task, train=rows).score(rows, wf.Dot(), execution=alone).values
    tracked = lambda name: name.startswith(("cells", "head"))  # noqa: E731
    assert relative_error(found, gradient_products(model, task, tracked, rows, rows)) < 1e-12
    with pytest.raises(LayerError, match="GRU reads a PackedSequence .* with enforce_sorted=False"):
        wf.Study(tmp_path, model, task, train=rows).fit(wf.EKFAC(), execution=together)
