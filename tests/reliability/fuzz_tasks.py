"""Tasks, models and datasets that misbehave, each drawn and given to `Study.fit` and `Study.score`.

What comes out must be right, or an error of ours that says what and where, or the exception of the user's own code,
unchanged. What was computed is held against gradients that autograd takes of one example at a time.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Mlp, gpt2, mlp_case, relative_error, token_rows
from tests.reliability.drawing import drawn
from tests.reliability.outcomes import Outcome
from tests.test_language import bert, classified_rows, masked_rows, pair_rows, t5
from tests.test_preference import pairs, reward_model, whole
from wherefrom.engine.loading import map_tensors
from wherefrom.runtime.errors import WherefromError


class OwnError(Exception):
    """What a user's code raises."""


def measure(folder: Path, count: int, number: int) -> list[Outcome]:
    """Run `count` studies, half of them of text, drawn from the seed `number`."""
    return [
        _outcome("studies of text with a wrong example", text_cases(), folder, count // 2, number),
        _outcome(
            "studies with a task, model or dataset that misbehaves", own_cases(), folder, count - count // 2, number
        ),
    ]


def _outcome(what: str, cases: st.SearchStrategy[Case], folder: Path, count: int, number: int) -> Outcome:
    ends: Counter[str] = Counter()

    @drawn(count, number)
    @given(cases)
    def run(case: Case) -> None:
        ends[case.end(folder / "run")] += 1

    run()
    return Outcome(
        what,
        sum(ends.values()),
        f"{ends['right']} gave the scores that autograd gives, {ends['refused']} an error that says what and where, "
        f"{ends['own']} the exception of the user's own code.",
    )


class Case:
    """A study, and where its one fault is.

    Attributes:
        position: of the example at fault; None when it is not in an example.
    """

    def __init__(
        self, model: nn.Module, task: Any, train: Any, queries: Any, fault: str, position: int | None = None
    ) -> None:
        self.model, self.task, self.train, self.queries = model, task, train, queries
        self.fault, self.position = fault, position

    def __repr__(self) -> str:
        return f"<{type(self.task).__name__} of {type(self.model).__name__}: {self.fault}>"

    def end(self, path: Path) -> str:
        """How it ends: "right", "refused" or "own"."""
        shutil.rmtree(path, ignore_errors=True)
        try:
            study = wf.Study(path, self.model, self.task, train=self.train, execution=wf.Execution(progress=False))
            found = study.score(self.queries, wf.Dot()).values
        except WherefromError as error:
            assert self.position is None or self._named(str(error)), (self, str(error))
            assert str(error).endswith("."), (self, str(error))
            return "refused"
        except Exception as error:
            # Of a user's code, or of PyTorch inside a user's model: as it is, with a note.
            if not isinstance(error, OwnError) and (self.position is not None or not getattr(error, "__notes__", [])):
                raise
            return "own"
        finally:
            assert not list(path.rglob("*.part")), self
        expected = self._expected(list(study.layers))
        assert bool(found.isfinite().all()), (self, found)
        scale = float(expected.abs().max())
        assert relative_error(found, expected) < 1e-4 if scale else not bool(found.any()), (self, found, expected)
        return "right"

    def _named(self, message: str) -> bool:
        """Whether a message says which example is at fault, or among which of a batch that does not go together."""
        found = re.search(r"xamples? (\d+)(?: to (\d+))? of", message)
        return found is not None and int(found[1]) <= (self.position or 0) <= int(found[2] or found[1])

    def _expected(self, layers: Sequence[str]) -> Tensor:
        """Products of gradients, one example at a time, with dropout off."""
        model = copy.deepcopy(self.model).eval()
        dtype = next(model.parameters()).dtype
        weights = [each for name in layers for each in model.get_submodule(name).parameters(recurse=False)]
        for each in weights:
            each.requires_grad_(True)

        def gradients(dataset: Any, loss: Callable[..., Tensor]) -> Tensor:
            rows = []
            for position in range(len(dataset)):
                batch = self.task.collate([self.task.select(model, dataset[position])])
                # Where examples are of several types, a batch of them takes the widest.
                value = loss(
                    model, map_tensors(batch, lambda each: each.to(dtype) if each.is_floating_point() else each)
                )
                found = torch.autograd.grad(value, weights, allow_unused=True)
                parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
                rows.append(torch.cat([part.flatten() for part in parts]))
            return torch.stack(rows).double()

        return gradients(self.queries, self.task.measurement) @ gradients(self.train, self.task.train_loss).T


# Examples of text


def _text_case(kind: str) -> Case:
    if kind == "causal":
        return Case(gpt2(layers=1), wf.CausalLM(), token_rows(4), token_rows(2, seed=4), "")
    if kind == "masked":
        return Case(bert(), wf.MaskedLM(), masked_rows(4, 3), masked_rows(2, 4), "")
    if kind == "seq2seq":
        return Case(t5(), wf.Seq2Seq(), pair_rows(4, 1), pair_rows(2, 2), "")
    if kind == "preference":
        return Case(gpt2(layers=1), wf.Preference(wf.DPO(), gpt2(layers=2)), pairs(4, 0), pairs(2, 3), "")
    if kind == "reward":
        return Case(reward_model(decoder=False), wf.RewardModel(), whole(pairs(4, 0)), whole(pairs(2, 3)), "")
    return Case(bert(True), wf.SequenceClassification(), classified_rows(4, 3), classified_rows(2, 4), "")


COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "margin",
           "input_ids", "labels", "label", "attention_mask", "token_type_ids", "completion_mask", "assistant_masks",
           "prompt_length", "text", "position_ids", "seq_lengths", "decoder_input_ids", "inputs_embeds"]  # fmt: skip

numbers = st.integers(-3, 15) | st.sampled_from([-100, -101, 2**31, 2**63, -(2**70), 10**30])
values = st.one_of(
    st.none(),
    numbers,
    st.booleans(),
    st.floats(),
    st.text(max_size=5),
    st.lists(numbers, max_size=14),
    st.lists(st.integers(0, 12), max_size=14),
    st.lists(st.integers(0, 1), min_size=1, max_size=10),
    st.lists(st.floats(), max_size=6),
    st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.none() | numbers, max_size=4),
    st.lists(st.lists(numbers, max_size=3), max_size=3),
    st.lists(st.integers(0, 12), max_size=9).map(lambda each: torch.tensor(each, dtype=torch.int32)),
    st.lists(st.integers(0, 12), max_size=9).map(lambda each: torch.tensor([each])),
    st.lists(st.integers(0, 12), max_size=9).map(lambda each: np.array(each, dtype=np.uint8)),
    st.lists(st.floats(width=32), max_size=9).map(torch.tensor),
    st.lists(st.booleans(), max_size=9),
    st.dictionaries(st.text(max_size=2), numbers, max_size=2),
)


@st.composite
def text_cases(draw: st.DrawFn) -> Case:
    """A study of text of which one example has one or two columns replaced, dropped or cut."""
    case = _text_case(draw(st.sampled_from(["causal", "masked", "seq2seq", "classification", "preference", "reward"])))
    rows = draw(st.sampled_from([case.train, case.queries]))
    position = draw(st.integers(0, len(rows) - 1))
    row = rows[position] = dict(rows[position])
    faults = []
    for column in draw(st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=2, unique=True)):
        how = draw(st.sampled_from(["replace", "drop", "cut", "repeat"]))
        if how == "drop":
            row.pop(column, None)
        elif how in ("cut", "repeat") and isinstance(row.get(column), list):
            row[column] = (
                row[column][: draw(st.integers(0, 3))] if how == "cut" else row[column] * draw(st.integers(2, 9))
            )
        else:
            row[column] = draw(values)
        faults.append(f"{column} of example {position} of {len(rows)}: {row.get(column, 'dropped')!r}")
    case.fault, case.position = "; ".join(faults), position
    return case


# Tasks, models and datasets


class Faulty(wf.Classification):
    """A task with one method replaced."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        super().__init__()
        for name, method in methods.items():
            setattr(self, "_" + name, method)

    def __getattribute__(self, name: str) -> Any:
        if name in ("train_loss", "measurement", "mask", "masks", "collate", "head", "settings"):
            replaced = vars(self).get("_" + name)
            if replaced is not None:
                return replaced
        return super().__getattribute__(name)


def _raise(*_: object, **__: object) -> Any:
    raise OwnError("the user's own")


def _loss(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda model, batch, sampler=None: change(wf.Classification().train_loss(model, batch, sampler))


LOSSES: dict[str, Callable[..., Any]] = {
    "None": _loss(lambda loss: None),
    "a float": _loss(lambda loss: float(loss.detach())),
    "an integer tensor": _loss(lambda loss: loss.long()),
    "a vector of one": _loss(lambda loss: loss.reshape(1)),
    "a vector": _loss(lambda loss: loss.repeat(3)),
    "detached": _loss(lambda loss: loss.detach()),
    "a leaf": _loss(lambda loss: loss.detach().requires_grad_()),
    "complex": _loss(lambda loss: loss.to(torch.complex128)),
    "on another device": _loss(lambda loss: loss.to("meta")),
    "nan": _loss(lambda loss: loss * float("nan")),
    "infinite": _loss(lambda loss: loss / 0),
    "minus infinity": _loss(lambda loss: -loss / 0),
    "a tuple": _loss(lambda loss: (loss, None)),
    "half": _loss(lambda loss: loss.half()),
    "zero": _loss(lambda loss: loss * 0),
    "negative": _loss(lambda loss: -loss),
    "raises": _raise,
    "under no_grad": torch.no_grad()(_loss(lambda loss: loss)),
    "under inference_mode": torch.inference_mode()(_loss(lambda loss: loss)),
    "of no layer": lambda model, batch, sampler=None: torch.ones((), requires_grad=True).sum(),
    "a string": lambda model, batch, sampler=None: "loss",
}
COLLATES: dict[str, Callable[..., Any]] = {
    "None": lambda examples: None,
    "an empty dict": lambda examples: {},
    "a string": lambda examples: "batch",
    "one example": lambda examples: examples[0],
    "the examples": list,
    "fewer rows": lambda examples: tuple(torch.stack(side)[:-1] for side in zip(*examples, strict=True)),
    "more rows": lambda examples: tuple(torch.stack(side * 2) for side in zip(*examples, strict=True)),
    "three sides": lambda examples: (*(torch.stack(side) for side in zip(*examples, strict=True)), None),
    "on another device": lambda examples: tuple(torch.stack(side).to("meta") for side in zip(*examples, strict=True)),
    "integers": lambda examples: tuple(torch.stack(side).long() for side in zip(*examples, strict=True)),
    "in half": lambda examples: tuple(torch.stack(side).half() for side in zip(*examples, strict=True)),
    "nan": lambda examples: (torch.full((len(examples), 4), torch.nan).double(), torch.zeros(len(examples)).long()),
    "transposed": lambda examples: (torch.stack([x for x, _ in examples]).T, torch.stack([y for _, y in examples])),
    "labels too high": lambda examples: (torch.stack([x for x, _ in examples]), torch.full((len(examples),), 3)),
    "labels negative": lambda examples: (torch.stack([x for x, _ in examples]), torch.full((len(examples),), -1)),
    "labels of bytes": lambda examples: (
        torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples]).to(torch.uint8)
    ),
    "raises": _raise,
}  # fmt: skip
MASKS: dict[str, Callable[..., Any]] = {
    "a list": lambda batch: [True],
    "a number": lambda batch: 1,
    "floats": lambda batch: torch.ones(len(batch[0]), 1),
    "integers": lambda batch: torch.ones(len(batch[0]), 1, dtype=torch.int64),
    "flat": lambda batch: torch.ones(len(batch[0]), dtype=torch.bool),
    "for more rows": lambda batch: torch.ones(len(batch[0]) + 1, 1, dtype=torch.bool),
    "too long": lambda batch: torch.tensor([[True, False, True]] * len(batch[0])),
    "empty": lambda batch: torch.ones(len(batch[0]), 0, dtype=torch.bool),
    "on another device": lambda batch: torch.ones(len(batch[0]), 1, dtype=torch.bool, device="meta"),
    "raises": _raise,
}
SETTINGS: dict[str, Callable[..., Any]] = {
    "None": lambda: None,
    "a list": lambda: ["a"],
    "not for JSON": lambda: {"class": object()},
    "with mixed keys": lambda: {"class": "a", 3: "b"},
    "raises": _raise,
}


class Wrong:
    """A dataset with one habit."""

    def __init__(self, rows: Sequence[object], length: Any, item: Callable[[Sequence[object], int], object]) -> None:
        self._rows, self._length, self._item = rows, length, item

    def __len__(self) -> Any:
        return self._length

    def __getitem__(self, position: int) -> object:
        return self._item(self._rows, position)


def _key_error(rows: Sequence[object], position: int) -> object:
    return {"a": 1}["b" if position == 2 else "a"]


DATASETS: dict[str, Callable[[Sequence[object]], Any]] = {
    "longer than it is": lambda rows: Wrong(rows, len(rows) + 2, lambda each, place: each[place]),
    "shorter than it is": lambda rows: Wrong(rows, len(rows) - 1, lambda each, place: each[place]),
    "of negative length": lambda rows: Wrong(rows, -1, lambda each, place: each[place]),
    "of length 2.5": lambda rows: Wrong(rows, 2.5, lambda each, place: each[place]),
    "raising": lambda rows: Wrong(rows, len(rows), lambda each, place: _raise() if place == 1 else each[place]),
    "raising KeyError": lambda rows: Wrong(rows, len(rows), _key_error),
    "a generator": lambda rows: (row for row in rows),
    "an iterator": iter,
    "a set": lambda rows: set(range(len(rows))),
    "a dict": lambda rows: dict(enumerate(rows)),
    "a dict of columns": lambda rows: {"input_ids": [[1, 2]] * 4, "labels": [0] * 4},
    "a string": lambda rows: "text",
    "None": lambda rows: None,
    "empty": lambda rows: [],
    "of Nones": lambda rows: [None] * 3,
    "of objects": lambda rows: [object()] * 3,
    "of numbers": lambda rows: list(range(4)),
    "of tensors": lambda rows: [row[0] for row in rows],  # type: ignore[index]
    "of mixed kinds": lambda rows: [rows[0], {"a": 1}, "text", None],
    "of mixed shapes": lambda rows: [rows[0], (torch.ones(5).double(), torch.tensor(0))],
    "of mixed types": lambda rows: [rows[0], (torch.ones(4), torch.tensor(0))],
    "of mixed keys": lambda rows: [{"a": 1, 2: 3}],
    "of itself": lambda rows: [_endless()],
    "of text": lambda rows: [{"text": "words"}] * 3,
    "of tensors on another device": lambda rows: [tuple(each.to("meta") for each in row) for row in rows],  # type: ignore[attr-defined]
    "of sparse tensors": lambda rows: [(row[0].to_sparse(), row[1]) for row in rows],  # type: ignore[index]
    "of duplicates": lambda rows: [rows[0]] * 5,
    "an array": lambda rows: np.ones((3, 4)),
    "a tensor": lambda rows: torch.ones(3, 4),
}


def _endless() -> list[object]:
    found: list[object] = []
    found.append(found)
    return found


class Dropping(nn.Module):
    """A model with dropout, left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.dropout = Mlp(), nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(self.dropout(inputs))
        return logits


def _partly(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(model)
    return model


MODELS: dict[str, Callable[[nn.Module], Any]] = {
    "training": lambda model: model.train(),
    "dropout in training": lambda model: Dropping().double().train(),
    "frozen": lambda model: model.requires_grad_(False),
    "partly frozen": lambda model: _partly(model, lambda each: each.first.requires_grad_(False)),
    "on another device": lambda model: model.to("meta"),
    "partly on another device": lambda model: _partly(model, lambda each: each.first.to("meta")),
    "in half": lambda model: model.half(),
    "in float32": lambda model: model.float(),
    "in DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "quantised": lambda model: torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}),
    "without weights": lambda model: nn.Flatten(),
    "without layers": lambda model: nn.ParameterList([torch.ones(2)]),
    "not a module": lambda model: model.forward,
    "None": lambda model: None,
    "with nan": lambda model: _partly(model, lambda each: each.first.weight.data.fill_(torch.nan)),
    "with infinity": lambda model: _partly(model, lambda each: each.plain.weight.data.fill_(torch.inf)),
    "with zeros": lambda model: _partly(model, lambda each: each.plain.weight.data.zero_()),
    "one output": lambda model: nn.Sequential(model, nn.Linear(3, 1).double(), nn.Flatten(0)),
    "more dimensions": lambda model: nn.Sequential(model, nn.Unflatten(1, (3, 1))),
    "complex": lambda model: model.to(torch.complex128),
}


@st.composite
def own_cases(draw: st.DrawFn) -> Case:
    """A study of a small classifier of which one part, or two, misbehave."""
    base = mlp_case()
    train, queries = base.train[:5], base.queries[:2]
    case = Case(base.model, wf.Classification(), train, queries, "")
    methods: dict[str, Callable[..., Any]] = {}
    faults = []
    tables: dict[str, dict[str, Callable[..., Any]]] = {
        "train_loss": LOSSES, "measurement": LOSSES, "collate": COLLATES, "mask": MASKS, "settings": SETTINGS,
        "model": MODELS, "train": DATASETS, "queries": DATASETS,
    }  # fmt: skip
    for part in draw(st.lists(st.sampled_from(sorted(tables)), min_size=1, max_size=2, unique=True)):
        how = draw(st.sampled_from(sorted(tables[part])))
        faults.append(f"{part} {how}")
        if part == "model":
            case.model = MODELS[how](case.model)
        elif part in ("train", "queries"):
            setattr(case, part, DATASETS[how](getattr(case, part)))
        else:
            methods[part] = tables[part][how]
    if methods:
        case.task = Faulty(**methods)
    case.fault = ", ".join(faults)
    return case
