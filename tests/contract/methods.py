"""The table of all ways of scoring: each a call, its independent truth, and what it cannot do, with the reason.

A new way of scoring is one more entry of `METHODS`, and keeps all of the contract with that. This module must not know
what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

import wherefrom as wf
from tests import runs
from tests.contract import truth
from tests.contract.settings import LENGTH, RATES, Setting, tokens
from tests.test_conditioning import numbers
from tests.test_magic import predicted_tokens
from wherefrom.runtime.errors import InputError, RankError, WherefromError

Result = wf.Scores | wf.TopScores | wf.TokenScores | Tensor
Property = Literal[
    "batch size", "order", "padding", "processes", "kill", "half precision", "reuse", "name",
    "damping", "query set", "seed", "training set", "model",
]  # fmt: skip


@dataclass(frozen=True)
class Unsupported:
    """What a way of scoring cannot do.

    Attributes:
        reason: why.
        error: what asking for it raises; None where it cannot be asked for, since there is no such argument.
        message: what the error says.
    """

    reason: str
    error: type[WherefromError] | None = None
    message: str = ""


@dataclass(frozen=True)
class Method:
    """A way of scoring.

    Attributes:
        score: makes it in a run directory.
        truth: its values by other means, in float64.
        query_axis, train_axis: of its values; None where it adds up over them, or has none.
        folder: of a result that is called NAME, below the run directory; None where nothing is kept.
        takes_factors: the strategy of factors that it may be given.
        checks: how many losses are computed to look at its arguments.
        half_precision: how far it may be from full precision, in units of the largest score.
        unsupported: the rest.
    """

    score: Callable[[Path, Setting], Result]
    truth: Callable[[Setting], Tensor]
    query_axis: int | None = 0
    train_axis: int | None = 1
    folder: str | None = "scores/{}"
    takes_factors: str | None = None
    checks: int = 0
    half_precision: float = 0.1
    unsupported: Mapping[Property, Unsupported] = field(default_factory=dict)


def values(result: Result) -> Tensor:
    """Its numbers, in the order of queries and training examples."""
    if isinstance(result, wf.TopScores):
        return torch.zeros_like(result.values).scatter_(1, result.train, result.values)
    if isinstance(result, wf.TokenScores):
        return functional.pad(result.values, (0, LENGTH - result.values.shape[2]))
    return result.values if isinstance(result, wf.Scores) else result


def study_of(run: Path, setting: Setting) -> wf.Study[Any]:
    """The study of a setting in a run directory."""
    execution = wf.Execution(
        half_precision=setting.half_precision,
        query_batch_size=setting.batch_size,
        train_batch_size=setting.batch_size,
        checkpoint_seconds=setting.checkpoint_seconds,
        progress=False,
    )
    history = setting.checkpoints
    return wf.Study(run, setting.model, setting.task, train=setting.train, history=history, execution=execution)


def result(run: Path, setting: Setting, method: wf.Method, keep: wf.Keep[Any] | None = None) -> Result:
    """What a study of the setting returns."""
    study, keep = study_of(run, setting), keep or wf.Pairs()
    found: Result = study.score(setting.queries, method, keep=keep, name=setting.name, overwrite=setting.overwrite)
    return found


def factored(strategy: str, setting: Setting, **fields: Any) -> wf.Factored:
    """A method with the setting's factors, which are fitted unless they are given or there."""
    chosen: dict[str, Any] = {"damping": setting.damping, "factors": setting.factors}
    return runs.factored(strategy, empirical=setting.empirical, seed=setting.seed, **{**chosen, **fields})


def pairwise(strategy: str, keep: Any = None, **fields: Any) -> Callable[[Path, Setting], Result]:
    """With fitted factors."""
    return lambda run, setting: result(run, setting, factored(strategy, setting, **fields), keep)


def rescored(run: Path, setting: Setting) -> Result:
    """Of low rank, and every score once more at full rank."""
    return pairwise("ekfac", query_rank=1, rescore=len(setting.train))(run, setting)


def solved(solver: Any, strategy: str = "ekfac") -> Callable[[Path, Setting], Result]:
    """With a solver, and a damping with which it converges."""

    def score(run: Path, setting: Setting) -> Result:
        damping = truth.SOLVER_DAMPING if setting.damping is None else setting.damping
        return result(run, setting, factored(strategy, setting, solver=solver, damping=damping))

    return score


def conditioned(run: Path, setting: Setting) -> Result:
    """In the coordinates of an optimizer."""
    return result(run, setting, factored("shampoo", setting, conditioning=numbers(setting.model)))


def highest(run: Path, setting: Setting) -> Result:
    """The highest and lowest of each query, which are all."""
    return result(run, setting, factored("ekfac", setting), wf.Top(len(setting.train)))


def candidates(setting: Setting) -> Tensor:
    """Four of the training examples by their first tokens, whatever their order: [queries, 4]."""
    order = sorted(range(len(setting.train)), key=lambda row: tokens(setting.train[row]))
    return torch.tensor([order[:4]] * len(setting.queries))


def of_candidates(run: Path, setting: Setting) -> Result:
    method = wf.TwoStage(first=candidates(setting), then=factored("ekfac", setting))
    found = result(run, setting, method, wf.Top(len(setting.train)))
    assert isinstance(found, wf.TopScores)
    dense = torch.zeros(len(setting.queries), len(setting.train), dtype=found.values.dtype)
    assert torch.equal(found.values, found.values.sort(1, descending=True).values)
    return dense.scatter_(1, found.train, found.values)


def of_tokens(run: Path, setting: Setting) -> Result:
    return result(run, setting, factored("ekfac", setting), wf.Tokens())


def self_influence(run: Path, setting: Setting) -> Result:
    study, method = study_of(run, setting), factored("ekfac", setting)
    return study.self_influence(method, name=setting.name, overwrite=setting.overwrite)


def over_checkpoints(run: Path, setting: Setting) -> Result:
    scored = wf.Diagonal(damping=setting.damping, empirical=setting.empirical, seed=setting.seed)
    method = wf.TracIn(scored=scored, checkpoints=[each.path for each in setting.checkpoints], weights=RATES)
    return result(run, setting, method)


def source(adam: bool) -> Callable[[Path, Setting], Result]:
    """SOURCE of two segments; its damping is weight decay's."""

    def score(run: Path, setting: Setting) -> Result:
        method = wf.Source(
            segments=2,
            adam=adam,
            weight_decay=setting.weight_decay,
            loss_scale=1.0,  # of the mean over examples of summed losses
            empirical=setting.empirical,
            seed=setting.seed,
        )
        return result(run, setting, method)

    return score


def projected(kind: Any, **fields: Any) -> Callable[[Path, Setting], Result]:
    """LoGra, TRAK or TrackStar, on random directions or on those of factors."""

    def score(run: Path, setting: Setting) -> Result:
        method = kind(rank=truth.RANK, seed=setting.seed, damping=setting.damping, **fields)
        if fields:
            method = replace(method, factors=setting.factors or study_of(run, setting).fit(factored("kfac", setting)))
        return result(run, setting, method)

    return score


def sampled_fisher(run: Path, setting: Setting) -> Result:
    return result(run, setting, wf.Fisher(samples=truth.SAMPLES, damping=setting.damping, seed=setting.seed))


def training_of(setting: Setting) -> wf.ReplayableTraining[Any]:
    """A short training from the setting's model."""
    recipe = wf.TrainingRecipe(batch_size=3, learning_rates=[0.01, 0.02, 0.01], epsilon=1e-3, seed=setting.seed)
    return wf.ReplayableTraining(setting.model, setting.task, setting.train, recipe, predicted_tokens)


def magic(run: Path, setting: Setting) -> Result:
    return result(run, setting, wf.Magic(training=training_of(setting)))


def recorded_training(setting: Setting) -> wf.ReplayableTraining[Any]:
    """One whose checkpoints could have been the setting's."""
    group = setting.checkpoints[0].groups[0]
    assert group.betas is not None and group.eps is not None and group.weight_decay is not None
    recipe = wf.TrainingRecipe(3, RATES, group.weight_decay, group.betas, group.eps)
    return wf.ReplayableTraining(setting.model, setting.task, setting.train, recipe, predicted_tokens)


def trajectory(run: Path, setting: Setting) -> Result:
    method = wf.TrajectoryFisher(training=recorded_training(setting), draws=truth.SAMPLES, seed=setting.seed)
    return result(run, setting, method)


def trajectory_flow(run: Path, setting: Setting) -> Result:
    flow = wf.GradientFlow(300, 0.0, block_size=2)
    return result(run, setting, wf.TrajectoryFlow(training=recorded_training(setting), flow=flow))


def indexed(run: Path, setting: Setting) -> Result:
    """An index of so many numbers that nothing is lost, and a query of it."""
    method, sketch = factored("ekfac", setting), wf.Sketch(numbers=2**16, bits=32, focus=0)
    index = study_of(run, setting).index(method, sketch, name=setting.name, overwrite=setting.overwrite)
    return index.query(setting.queries, k=len(setting.train))


def bm25(run: Path, setting: Setting) -> Result:
    queries, train = ([{"text": text} for text in texts] for texts in setting.texts)
    study = wf.Study(run, setting.model, setting.task, train=train)
    return study.score(queries, wf.BM25(), name=setting.name, overwrite=setting.overwrite)


_NOTHING_DRAWN = Unsupported("nothing is drawn")
_NO_DAMPING = Unsupported("there is no curvature to be damped")
_FULL_PRECISION = Unsupported("filters are of full precision", InputError, "half_precision=True with")
_UNKNOWN_OPTION = Unsupported("gradients are projected in full precision", InputError, "half_precision=True with")
_ANY_FACTORS = Unsupported("a solution does not depend on the factors that it was found with")

METHODS: dict[str, Method] = {
    **{
        strategy: Method(pairwise(strategy), truth.factored(strategy), takes_factors=strategy)
        for strategy in ("diagonal", "kfac", "ekfac", "shampoo")
    },
    "identity": Method(
        pairwise("identity"),
        truth.factored("identity"),
        takes_factors="identity",
        unsupported={"seed": _NOTHING_DRAWN, "damping": _NO_DAMPING},
    ),
    "parts and self-influence": Method(
        pairwise("ekfac", wf.Pairs(layers=True, self_influence=True)), truth.factored("ekfac"), takes_factors="ekfac"
    ),
    "low rank, rescored": Method(rescored, truth.factored("ekfac"), takes_factors="ekfac"),
    "conditioned": Method(conditioned, truth.conditioned, takes_factors="shampoo"),
    "sum of queries": Method(
        pairwise("ekfac", wf.Aggregated(queries="sum")), truth.summed(0), query_axis=None, takes_factors="ekfac"
    ),
    "mean of training": Method(
        pairwise("ekfac", wf.Aggregated(train="mean")), truth.mean_of_training, train_axis=None, takes_factors="ekfac"
    ),
    "conjugate gradients": Method(
        solved(wf.ConjugateGradients(iterations=100, tolerance=1e-11)),
        truth.gauss_newton,
        takes_factors="ekfac",
        unsupported={"seed": _ANY_FACTORS},
    ),
    "gradient flow": Method(
        solved(wf.GradientFlow(100, 0.0, block_size=2), "identity"),
        truth.flow,
        takes_factors="identity",
        unsupported={"seed": _NOTHING_DRAWN},
    ),
    "ASTRA": Method(
        solved(wf.Astra(iterations=8, batch_size=None, learning_rate=1.0, momentum=0.0, decay=1.0)),
        truth.gauss_newton,
        takes_factors="ekfac",
        unsupported={"seed": _ANY_FACTORS},
    ),
    "highest": Method(highest, truth.factored("ekfac"), takes_factors="ekfac"),
    "candidates": Method(of_candidates, truth.of_candidates(candidates), takes_factors="ekfac"),
    "tokens": Method(of_tokens, truth.of_tokens, folder="tokens/{}", takes_factors="ekfac"),
    "self-influence": Method(
        self_influence,
        truth.self_influence,
        query_axis=None,
        train_axis=0,
        folder="self_influence/{}",
        takes_factors="ekfac",
        unsupported={"query set": Unsupported("there are no queries")},
    ),
    "checkpoints": Method(over_checkpoints, truth.over_checkpoints),
    "SOURCE": Method(source(adam=False), truth.source(adam=False), unsupported={"half precision": _FULL_PRECISION}),
    "SOURCE of Adam": Method(
        source(adam=True), truth.source(adam=True), unsupported={"half precision": _FULL_PRECISION}
    ),
    "LoGra": Method(projected(wf.LoGra), truth.logra, unsupported={"half precision": _UNKNOWN_OPTION}),
    "LoGra of eigenvectors": Method(
        projected(wf.LoGra, directions="eigenvectors"),
        truth.logra_of_eigenvectors,
        takes_factors="kfac",
        unsupported={"half precision": _UNKNOWN_OPTION},
    ),
    "TRAK": Method(projected(wf.Trak), truth.trak, unsupported={"half precision": _UNKNOWN_OPTION}),
    "TrackStar": Method(projected(wf.TrackStar), truth.trackstar, unsupported={"half precision": _UNKNOWN_OPTION}),
    "sampled Fisher": Method(
        sampled_fisher,
        truth.sampled_fisher,
        unsupported={
            "order": Unsupported("an example's position decides which targets are drawn for it"),
            "half precision": _FULL_PRECISION,
        },
    ),
    "MAGIC": Method(
        magic,
        truth.magic(training_of),
        checks=4,
        unsupported={
            "order": Unsupported("an example's position decides in which steps it is trained on"),
            "damping": _NO_DAMPING,
            "half precision": _FULL_PRECISION,
            "processes": Unsupported("a training is one chain of steps", RankError, "Magic in 2 processes"),
        },
    ),
    "trajectory": Method(
        trajectory,
        truth.trajectory(recorded_training),
        checks=4,
        unsupported={
            "order": Unsupported("an example's position decides in which steps it is trained on"),
            "damping": _NO_DAMPING,
            "half precision": _FULL_PRECISION,
        },
    ),
    "trajectory flow": Method(
        trajectory_flow,
        truth.trajectory_flow(recorded_training),
        checks=4,
        unsupported={
            "seed": _NOTHING_DRAWN,
            "order": Unsupported("an example's position decides in which steps it is trained on"),
            "damping": _NO_DAMPING,
        },
    ),
    "index": Method(
        indexed,
        truth.factored("ekfac"),
        folder="index/{}",
        takes_factors="ekfac",
        unsupported={
            "reuse": Unsupported("answers are not kept, only the rows that they are made from"),
            "processes": Unsupported("one process is enough for a query", InputError, "query on 2 processes"),
        },
    ),
    "BM25": Method(
        bm25,
        truth.bm25,
        folder=None,
        unsupported={
            "batch size": Unsupported("there are no batches"),
            "padding": Unsupported("texts have none"),
            "processes": Unsupported("each process has all of it at once"),
            "kill": Unsupported("nothing is kept"),
            "half precision": Unsupported("there is no model"),
            "reuse": Unsupported("nothing is kept"),
            "name": Unsupported("nothing is kept"),
            "damping": _NO_DAMPING,
            "seed": _NOTHING_DRAWN,
            "model": Unsupported("there is no model"),
        },
    ),
}
