"""Memory that runs out: on the device at a random operation or above a size, on the host for real.

Then results must be the undisturbed run's to rounding, after smaller batches and fewer resident queries; or, where
nothing helps, the run must end with a MemoryLimitError that has the numbers, and the next one with the right result.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wherefrom as wf
from tests.models import Case, gpt2_case, mlp_case, relative_error
from tests.processes import start
from tests.reliability.memory_child import limited
from tests.reliability.outcomes import Outcome
from wherefrom.runtime.errors import MemoryLimitError

_NUMBERS = re.compile(r"[\d.]+ GiB free on ")
_ROUNDING = 1e-9


def measure(folder: Path, count: int, seed: int) -> list[Outcome]:
    """Let memory run out `count` times at a random operation, `count` times above a random size, and a quarter as often
    on the host itself, by a limit on the process.

    Raises:
        AssertionError: a run did not end as it should; the message has its seed and case.
    """
    work = _Work(folder, random.Random(seed))
    on_host = run_child(limited, folder / "host", max(1, count // 4), seed)
    return [work.outcome("once", count), work.outcome("above", count), Outcome(**json.loads(on_host))]


def run_child(work: Callable[..., str], *arguments: object) -> str:
    """What a function of `memory_child` returns in a process of its own; a process that dies fails here."""
    # Threads take address space, which is what is limited.
    done = start(_printed, work, arguments, variables={"OMP_NUM_THREADS": "1"}).finished()
    assert done.returncode == 0, f"{arguments}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()[-1]


def _printed(work: Callable[..., str], arguments: Sequence[object]) -> None:
    logging.getLogger("wherefrom").setLevel(logging.ERROR)
    print(work(*arguments), flush=True)


class Scarce(TorchDispatchMode):
    """A device without enough memory: operations raise what PyTorch raises on a GPU.

    Args:
        once: the number of an operation that fails, counted from 1.
        above: bytes; every operation whose result takes more fails.
    """

    def __init__(self, once: int | None = None, above: float = float("inf")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._once, self._above = once, above
        self.count = self.failed = self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = _fresh_bytes(result, args)
        if not fresh:
            return result
        self.count += 1
        self.largest = max(self.largest, fresh)
        if self.count == self._once or fresh > self._above:
            self.failed += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {fresh} bytes")
        return result


def _fresh_bytes(result: object, arguments: Sequence[Any]) -> int:
    """What an operation has allocated: views and results in place take nothing."""
    known = {each.untyped_storage().data_ptr() for each in tree_leaves(arguments) if isinstance(each, Tensor)}
    return sum(
        each.numel() * each.element_size()
        for each in tree_leaves(result)
        if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known
    )


Results = dict[str, Tensor]
Flow = Callable[["wf.Study[Any]", Case], Results]


def _factors(study: wf.Study[Any], case: Case) -> Results:
    return {f"eigenvalues {name}": each for name, each in study.fit().eigenvalues.items()}


def _scores(study: wf.Study[Any], case: Case) -> Results:
    scores = study.score(case.queries, keep=wf.Pairs(layers=True, self_influence=True))
    assert scores.self_influence is not None and scores.preconditioned_norms is not None
    norms = {"self-influence": scores.self_influence, "norms": scores.preconditioned_norms}
    return {"values": scores.values, **norms, **dict(scores.layers)}


def _low_rank(study: wf.Study[Any], case: Case) -> Results:
    scores = study.score(case.queries, wf.KFAC(query_rank=2, rescore=2))
    assert scores.query_errors is not None
    return {"values": scores.values, "errors": scores.query_errors}


def _aggregated(study: wf.Study[Any], case: Case) -> Results:
    return {
        "queries": study.score(case.queries, wf.Diagonal(), keep=wf.Aggregated(queries="mean")).values,
        "train": study.score(case.queries, wf.Diagonal(), keep=wf.Aggregated(train="sum")).values,
    }


def _top(study: wf.Study[Any], case: Case) -> Results:
    found = study.score(case.queries, wf.Dot(), keep=wf.Top(3))
    return {"highest": found.values, "lowest": found.lowest_values}


def _self_influence(study: wf.Study[Any], case: Case) -> Results:
    return {"self-influence": study.self_influence()}


def _tokens(study: wf.Study[Any], case: Case) -> Results:
    return {
        "all": study.score(case.queries, keep=wf.Tokens()).values,
        "top": study.score(case.queries, keep=wf.Tokens(2)).values,
    }


_FLOWS: tuple[Flow, ...] = (_factors, _scores, _low_rank, _aggregated, _top, _self_influence, _tokens)


@dataclass
class _Work:
    """Runs on small models, with too little memory."""

    folder: Path
    random: random.Random

    def outcome(self, kind: str, count: int) -> Outcome:
        """Runs with one kind of fault."""
        recovered = 0
        for case in range(count):
            flow = self.random.choice(_FLOWS)
            make = self.random.choice([mlp_case, gpt2_case])
            try:
                recovered += self._attempt(self.folder / f"{kind}-{case}", kind, flow, make(torch.float64))
            except BaseException as error:
                raise AssertionError(f"{kind}, case {case}, {flow.__name__} of {make.__name__}: {error!r}") from error
        what = {
            "once": "an allocation on the device that fails, at a random operation of a fit or score",
            "above": "a device on which every allocation above a random size fails",
        }
        result = (
            f"{recovered} ended with the undisturbed results to 1e-9, with smaller batches or blocks; "
            f"{count - recovered} with a MemoryLimitError that has the numbers, after which the same call gave them"
        )
        return Outcome(what[kind], count, result)

    def _attempt(self, folder: Path, kind: str, flow: Flow, case: Case) -> bool:
        """One run; whether it went on by itself."""
        counter = Scarce()
        with counter:
            expected = flow(_study(folder / "undisturbed", case), case)
        if kind == "once":
            scarce = Scarce(once=self.random.randint(1, counter.count))
        else:
            scarce = Scarce(above=counter.largest * self.random.uniform(0.05, 1))
        run = folder / "scarce"
        try:
            with scarce:
                found = flow(_study(run, case), case)
        except MemoryLimitError as error:
            assert _NUMBERS.search(str(error)), f"no numbers in: {error}"
            _check_same(flow(_study(run, case), case), expected)
            return False
        assert scarce.failed, "nothing has failed"
        _check_same(found, expected)
        return True


def _study(folder: Path, case: Case) -> wf.Study[Any]:
    return wf.Study(folder, case.model, case.task, train=case.train, execution=wf.Execution(progress=False))


def _check_same(found: Results, expected: Results) -> None:
    assert found.keys() == expected.keys()
    for name, each in found.items():
        error = relative_error(each, expected[name])
        assert error < _ROUNDING, f"{name} differs by {error}"
