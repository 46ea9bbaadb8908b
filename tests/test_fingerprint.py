"""Digests: of every byte, each hashed once, and the same whatever the number of threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import gpt2_case
from tests.runs import with_factors
from wherefrom.store import fingerprint
from wherefrom.store.fingerprint import model_digest, tensors_digest


def by_hand(tensors: dict[str, Tensor], piece: int) -> str:
    """What `tensors_digest` says that it is."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        data = tensor.contiguous().numpy().tobytes()
        pieces = [data[start : start + piece] for start in range(0, len(data), piece)]
        hashed = b"".join(hashlib.sha256(each).digest() for each in pieces)
        described = f"{tensor.dtype} {list(tensor.shape)}\n".encode()
        lines.append(f"{name} {hashlib.sha256(described + hashed).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_digests_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(fingerprint, "_PIECE", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    sizes = {"b": (25,), "a": (7, 30), "exact": (50,), "none": (0, 4), "one": ()}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors["transposed"] = tensors["a"].T
    assert tensors_digest(tensors) == by_hand(tensors, 100)
    for name, tensor in tensors.items():
        for position in range(tensor.numel()):  # every number counts
            changed = tensor.clone().contiguous()
            changed.view(-1)[position] += 1
            assert tensors_digest({**tensors, name: changed}) != tensors_digest(tensors)
    # Two tensors that have changed places, and the same bytes as other shapes and types, are others.
    assert tensors_digest({**tensors, "b": tensors["exact"], "exact": tensors["b"]}) != tensors_digest(tensors)
    for other in (tensors["a"].view(30, 7), tensors["a"].view(torch.int32)):
        assert tensors_digest({**tensors, "a": other}) != tensors_digest(tensors)


def test_a_model_with_tied_weights_is_told_from_one_with_equal_weights_changed() -> None:
    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight if tied else nn.Parameter(self.first.weight.detach().clone())

    tied, untied = Twice(tied=True), Twice(tied=False)
    before = model_digest(tied)
    assert model_digest(untied) == before  # as offloading makes two tensors of one
    untied.second.weight.data[2, 3] += 1  # which no version counts
    assert model_digest(untied) != before
    tied.first.weight.data[2, 3] += 1
    assert model_digest(tied) not in {model_digest(untied), before}


def test_weights_without_an_address_are_never_taken_for_each_other() -> None:
    """As quantized ones are, which wrap tensors of their own."""

    class Wrapped(Tensor):
        def data_ptr(self) -> int:
            return 0

    def model(value: float) -> nn.Module:
        found = nn.Module()
        for name, number in (("a", 1.0), ("b", value)):
            found.register_buffer(name, torch.full((3,), number).as_subclass(Wrapped))
        return found

    assert model_digest(model(1.0)) != model_digest(model(2.0))


def test_every_call_reads_each_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are never carried from one call to the next, since weights may change without a sign."""
    case, read = gpt2_case(torch.float32), [0]  # its head is its embedding
    weights = {each.data_ptr(): each for each in case.model.state_dict().values()}
    expected = sum(each.numel() * each.element_size() for each in weights.values())
    exact = fingerprint._bytes

    def counted(tensor: Tensor) -> memoryview:
        found = exact(tensor)
        read[0] += len(found) * (tensor.data_ptr() in weights)
        return found

    monkeypatch.setattr(fingerprint, "_bytes", counted)
    study = wf.Study(tmp_path, case.model, case.task, train=case.train)
    for _ in range(2):  # computed, and loaded
        factors = study.fit(wf.EKFAC())
        study.score(case.queries, with_factors(factors))
    assert read == [4 * expected]
    study.score(case.queries, with_factors(factors), keep=wf.Tokens(2))
    assert read == [5 * expected]
