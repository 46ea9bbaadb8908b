"""Scores on a device against the same in float64 on the CPU: four models, every strategy, both precisions.

The float64 scores on a CPU are what the test suite holds against brute force. Used by the `gpu` tests too; it must not
know how results are kept.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import wherefrom as wf
from gpu_stages.report import Figures, Report, Setting, UnavailableError
from wherefrom.planning.machine import Machine
from wherefrom.planning.plan import Plan

# The largest difference in units of the largest score.
FULL_LIMIT, HALF_LIMIT = 2e-5, 3e-2
# Where singular values beside the rank are close, rounding chooses between their vectors.
RANK_LIMIT = 2e-3
# Wide enough for more than one tile of a product; in a rehearsal, just wide enough.
WIDTH, SMALL_WIDTH = 64, 16
_VOCABULARY, _POSITIONS, _TRAIN, _QUERIES = 211, 24, 24, 6

# Every strategy of factors, and the method that scores with it.
METHODS = {method.strategy: method for method in wf.METHODS.values() if issubclass(method, wf.Factored)}


@dataclass(frozen=True)
class Case:
    """A model with its task and data; queries are training examples, so that the largest scores are no differences."""

    model: nn.Module
    task: wf.Task[Any]
    train: list[object]

    @property
    def queries(self) -> list[object]:
        """The first training examples."""
        return self.train[:_QUERIES]


def _language_case(model: nn.Module, layers: list[str], shortest: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, _POSITIONS + 1, (_TRAIN,), generator=generator).tolist()
    tokens = [torch.randint(_VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Case(model, wf.CausalLM(layers), [{"input_ids": each} for each in tokens])


def _gpt2(width: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=_VOCABULARY, n_positions=_POSITIONS, n_embd=width, n_layer=2, n_head=4,
        initializer_range=width**-0.5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _gpt2_case(width: int) -> Case:
    """Sequences of different lengths, so that batches are padded and attention is masked."""
    return _language_case(_gpt2(width), ["transformer.h.*"], shortest=5)


def _llama_case(width: int) -> Case:
    """Two queries a key in attention, and no mask, with which the heads would be repeated."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=_POSITIONS, initializer_range=width**-0.5,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return _language_case(LlamaForCausalLM(config), ["model.layers.*proj"], shortest=_POSITIONS)


def _every_layer_case(width: int) -> Case:
    """Embeddings, norms and the output head, which are tracked only by name."""
    layers = ["transformer.w*", "transformer.h.*.ln_*", "transformer.ln_f", "lm_head"]
    return _language_case(_gpt2(width), layers, shortest=5)


def _convolution_case(width: int) -> Case:
    channels = width // 4
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, channels, 3, stride=2, groups=2),
        nn.GELU(), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    examples: list[object] = [
        (torch.randn(3, 12, 12, generator=generator), torch.randint(10, (), generator=generator)) for _ in range(_TRAIN)
    ]
    model(torch.zeros(1, 3, 12, 12))  # the lazy layer counts its inputs
    return Case(model, wf.Classification(), examples)


CASES: dict[str, Callable[[int], Case]] = {
    "GPT-2": _gpt2_case,
    "grouped-query Llama": _llama_case,
    "convolution": _convolution_case,
    "embeddings, norms and head": _every_layer_case,
}


def case(name: str, width: int, dtype: torch.dtype = torch.float32) -> Case:
    """One of `CASES`, the same weights each time, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CASES[name](width)
    if dtype != torch.float32:
        widened = [
            tuple(each.to(dtype) if each.is_floating_point() else each for each in row)
            if isinstance(row, tuple)
            else row
            for row in made.train
        ]
        made = Case(made.model.to(dtype), made.task, widened)
    made.model.eval()
    return made


def scores(given: Case, device: str, method: wf.Method, execution: wf.Execution | None = None) -> Tensor:
    """All scores of a case [query, train] on a device."""
    model = given.model.to(device)
    with tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, model, given.task, train=given.train, execution=execution)
        return study.score(given.queries, method).values.clone()


@functools.cache
def expected(name: str, width: int, method: wf.Method) -> Tensor:
    """The scores in float64 on the CPU."""
    return scores(case(name, width, torch.float64), "cpu", method)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest wanted score."""
    return float((found.double().cpu() - wanted.double()).abs().max() / wanted.abs().max())


def error(name: str, strategy: str, device: str, half: bool, width: int = WIDTH) -> float:
    """How far a case's scores on a device are from float64: half precision with the dataset's own targets.

    Targets that are drawn follow the logits, which half precision moves, and then are others now and then.
    """
    method = METHODS[strategy](empirical=half)
    with exact_convolutions():
        found = scores(case(name, width), device, method, wf.Execution(half_precision=half))
    return difference(found, expected(name, width, method))


class exact_convolutions:  # noqa: N801  (a context manager, named as torch names its own)
    """Within it, convolutions of float32 on a GPU are not of TF32 operands, which is PyTorch's default."""

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cudnn.allow_tf32 = self._before


def correctness(report: Report, setting: Setting) -> None:
    """Every case, strategy and precision, then ways of keeping query gradients and factors."""
    width = SMALL_WIDTH if setting.rehearse else WIDTH
    strategies = ("identity", "ekfac") if setting.rehearse else tuple(METHODS)
    for name in CASES:
        for half in (False, True) if setting.half else (False,):
            precision, limit = ("half", HALF_LIMIT) if half else ("float32", FULL_LIMIT)
            report.measure(
                f"{name}, {precision}",
                functools.partial(_strategy_figures, name, strategies, setting.device, half, width, limit),
            )
    for way, (measured, limit) in WAYS.items():
        report.measure(way, functools.partial(_way_figures, measured, setting.device, width, limit))


def _strategy_figures(
    name: str, strategies: tuple[str, ...], device: str, half: bool, width: int, limit: float
) -> Figures:
    errors = {strategy: error(name, strategy, device, half, width) for strategy in strategies}
    return {"errors": errors, "limit": limit, "passed": all(each < limit for each in errors.values())}


def _way_figures(measured: Callable[[str, int], float], device: str, width: int, limit: float) -> Figures:
    found = measured(device, width)
    return {"error": found, "limit": limit, "passed": found < limit}


def low_rank_error(device: str, width: int = WIDTH) -> float:
    """Query gradients as two matrices of rank 4."""
    method = wf.EKFAC(query_rank=4)
    found = scores(case("GPT-2", width), device, method)
    return difference(found, expected("GPT-2", width, method))


def offload_error(device: str, width: int = WIDTH) -> float:
    """Factors in the host's memory."""
    found = scores(case("GPT-2", width), device, wf.EKFAC(), wf.Execution(offload_factors=True))
    return difference(found, expected("GPT-2", width, wf.EKFAC()))


def blocks_error(device: str, width: int = WIDTH) -> float:
    """Query gradients in two or more blocks, since no more fit; copies are said to take for ever, sweeps no time."""
    slow_copies = Machine(matmul=1e30, copy=1e-9, host=2**40)
    return _planned_error(device, width, slow_copies, lambda plan: plan.sweeps > 1)


def offloaded_error(device: str, width: int = WIDTH) -> float:
    """Query gradients in the host's memory, brought to the device for every batch: sweeps are said to take for ever.

    Raises:
        UnavailableError: the device is the host.
    """
    if device == "cpu":
        raise UnavailableError("there is no other memory than the host's")
    slow_sweeps = Machine(matmul=1e-9, copy=1e30, host=2**30)
    return _planned_error(device, width, slow_sweeps, lambda plan: plan.form.offloaded)


def _planned_error(device: str, width: int, machine: Machine, wanted: Callable[[Plan], bool]) -> float:
    """With the largest memory budget, of some, with which a machine's plan is as wanted."""
    given = case("GPT-2", width)
    given.model.to(device)
    with patch.object(Machine, "measured", staticmethod(lambda *_: machine)), tempfile.TemporaryDirectory() as folder:
        study = wf.Study(folder, given.model, given.task, train=given.train)
        for budget in [2.0**-step for step in range(24)]:
            execution = wf.Execution(train_batch_size=6, query_batch_size=2, memory_budget=budget)
            if wanted(study.plan(given.queries, execution=execution)):
                found = scores(given, device, wf.EKFAC(), execution)
                return difference(found, expected("GPT-2", width, wf.EKFAC()))
    raise UnavailableError("no memory budget makes such a plan")


WAYS: dict[str, tuple[Callable[[str, int], float], float]] = {
    "low rank": (low_rank_error, RANK_LIMIT),
    "factors offloaded": (offload_error, FULL_LIMIT),
    "several blocks of queries": (blocks_error, FULL_LIMIT),
    "query gradients streamed": (offloaded_error, FULL_LIMIT),
}


def draws(report: Report, setting: Setting) -> None:
    """Targets that are drawn on the device, against those on the CPU."""
    count, classes = (64, 300) if setting.rehearse else (4096, 50257)
    report.measure("classes, float64 logits", lambda: draw_figures(setting.device, count, classes, torch.float64, 0.0))
    report.measure("classes, float32 logits", lambda: draw_figures(setting.device, count, classes, torch.float32, 1e-3))
    report.measure("normal", lambda: _normal_figures(setting.device, count))


def draw_figures(device: str, count: int, classes: int, dtype: torch.dtype, limit: float) -> Figures:
    """The share of `count` draws that differ: sums in another order may move one that is close to a boundary."""
    logits = 3 * torch.randn(8, count // 8, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    where = torch.rand(8, count // 8, generator=torch.Generator().manual_seed(1)) < 0.9
    sampler = wf.Sampler(5, list(range(8)))
    here, there = (sampler.categorical(logits.to(each), where.to(each)).cpu() for each in ("cpu", device))
    part = float((here != there).double().mean())
    return {"draws": count, "part_that_differs": part, "limit": limit, "passed": part <= limit}


def _normal_figures(device: str, count: int) -> Figures:
    mean = torch.randn(8, count // 8, generator=torch.Generator().manual_seed(0))
    sampler = wf.Sampler(5, list(range(8)))
    found = difference(sampler.normal(mean.to(device)), sampler.normal(mean))
    return {"error": found, "passed": found < 1e-6}
