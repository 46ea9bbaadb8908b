"""What every way of scoring is: a frozen dataclass whose fields say what a result depends on.

A method turns a study's `Context`, queries and what is to be kept of their scores into a stored result. To add one,
write a subclass of `Method` in a file of its own (see CONTRIBUTING). This module knows the cache and results; it does
not know which methods there are.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

import torch
from torch import Tensor

from wherefrom.curvature.factors import Factors
from wherefrom.engine.loading import Examples, token_counts
from wherefrom.engine.sweep import Sweep
from wherefrom.planning.plan import Plan
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.keep import Keep, Pairs, Scores_co, Top
from wherefrom.scoring.results import RISE, Result, extremes
from wherefrom.scoring.tokens import TokenScores
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.files import within
from wherefrom.store.fingerprint import MODEL, QUERIES, UNIT, Dataset, Fingerprint
from wherefrom.store.names import check_result_name, log_others, result_name
from wherefrom.store.weights import ModelStates
from wherefrom.tasks.task import Batch, checked_settings, unit_of

if TYPE_CHECKING:
    from wherefrom.store.recording import RecordedCheckpoint

    Checkpoint = str | Path | RecordedCheckpoint

logger = logging.getLogger("wherefrom")

# Bytes of a dense matrix that are put into its file at a time.
_CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class Context(Generic[Batch]):
    """What a study gives a method: where results lie, the model and its training examples, and how to compute.

    Attributes:
        path: the run directory.
        history: checkpoints of the training, in order.
        fingerprint: what everything in the study depends on.
        states: enters the weights of checkpoints.
    """

    path: Path
    sweep: Sweep[Batch]
    train: Examples[Batch]
    history: Sequence[Checkpoint]
    fingerprint: Fingerprint
    states: ModelStates

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.sweep.ranks

    def measured(self, queries: Dataset[object]) -> Examples[Batch]:
        """Queries, of which the measurement is meant."""
        return Examples(queries, self.sweep.task, "measurement")

    def query_settings(self, queries: Examples[Batch]) -> dict[str, str]:
        """What a fingerprint says of queries.

        Raises:
            RankError: another process has others.
        """
        measured = checked_settings(self.sweep.task).get("measure", "measurement")
        found = {QUERIES: queries.digest, "measured": measured, UNIT: unit_of(self.sweep.task)}
        for name, value in found.items():
            self.ranks.check_alike(name, value)
        return found

    def cache(self, folder: Path, fingerprint: Fingerprint) -> Cache:
        """Results of a folder."""
        return Cache(folder, fingerprint, self.sweep.profile)

    def folder(self, *names: str) -> Path:
        """A folder of the run directory."""
        return within(self.path, *names)

    def at(self, checkpoint: str, path: Path) -> Context[Batch]:
        """The same for the weights of a checkpoint, whose results lie in `RUN/checkpoints/NAME`; enter them first."""
        fingerprint = {**self.fingerprint, MODEL: self.states.digest(path)}
        return replace(self, path=self.folder("checkpoints", checkpoint), fingerprint=fingerprint)


@dataclass(frozen=True)
class Job:
    """A score that a method is ready to compute.

    Attributes:
        label: what the result's name begins with.
        settings: what it depends on, beside the study, the queries and what is kept.
        compute: makes its tensors.
        without: entries of the study's fingerprint that it does not depend on.
    """

    label: str
    settings: Mapping[str, str]
    compute: Callable[[Unfinished], Mapping[str, Tensor]]
    without: Sequence[str] = ()


@dataclass(frozen=True)
class Method(ABC):
    """A way of scoring; its fields are what a result depends on, and flags of `wherefrom score`.

    Attributes:
        name: what the command and results call it.
        keeps: what can be kept of its scores.
    """

    name: ClassVar[str]
    keeps: ClassVar[tuple[type[Keep[Any]], ...]] = (Pairs, Top)

    def __str__(self) -> str:
        """The class, and the fields that are not what they are unless said otherwise."""
        said = []
        for each in fields(self):
            value = getattr(self, each.name)
            usual = each.default if each.default_factory is MISSING else each.default_factory()
            if each.repr and value is not usual and value != usual:
                said.append(f"{each.name}={value}")
        return f"{type(self).__name__}({', '.join(said)})"

    @abstractmethod
    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        """The computation of a score: of all pairs, unless `keeps` says that it can do more."""

    def check(self, keep: Keep[Any], half_precision: bool) -> None:
        """Refuse what this method cannot do.

        Raises:
            InputError: names the method and what it can.
        """
        if half_precision and self.full_precision:
            raise InputError(
                f"half_precision=True with {type(self).__name__}, whose {self.full_precision}. Leave it out."
            )
        if not isinstance(keep, self.keeps):
            known = ", ".join(f"{each.__name__}()" for each in self.keeps)
            raise InputError(
                f"keep={keep!r} with {type(self).__name__}: its scores cannot be had so; expected {known}, or another "
                "method, such as EKFAC()."
            )
        if isinstance(keep, Pairs) and keep != Pairs() and not self.parts:
            raise InputError(
                f"keep={keep!r} with {type(self).__name__}, whose scores have no parts by layer and no norms: expected "
                "Pairs(), or another method, such as EKFAC()."
            )

    def rise(self, train: int) -> float | None:
        """What a score is multiplied with to be the predicted rise of the query's loss if that example is left out.

        None where scores have no such scale: then they can be ranked, and compared with each other.

        Args:
            train: how many training examples there are.
        """
        return None

    # Why it has no half precision; empty where it has.
    full_precision: ClassVar[str] = ""
    # Whether scores are sums over layers whose parts can be stored.
    parts: ClassVar[bool] = False
    # Whether the highest scores are found without all of them.
    streams: ClassVar[bool] = False

    def score(
        self,
        context: Context[Any],
        queries: Dataset[object],
        keep: Keep[Scores_co],
        name: str | None = None,
        overwrite: bool = False,
    ) -> Scores_co:
        """A result of a study, loaded or computed and stored.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; what was finished before stays valid.
        """
        self.check(keep, context.sweep.execution.half_precision)
        check_result_name(name)
        examples = context.measured(queries)
        about = context.query_settings(examples)
        if isinstance(keep, Top) and not self.streams:
            job = self._highest_job(context, queries, examples, keep)
        else:
            job = self.job(context, examples, keep)
        study = {key: each for key, each in context.fingerprint.items() if key not in job.without}
        fingerprint = {**study, "method": self.name, **about, **job.settings, **keep.settings()}
        called = result_name("-".join(filter(None, (job.label, keep.label))), fingerprint, name)
        folder, item = keep.location(context.folder(keep.folder), called)
        cache = context.cache(folder, fingerprint)
        if overwrite:
            keep.forget(cache, item)
        context.ranks.first(lambda: log_others(context.folder(keep.folder, called), fingerprint))
        tensors = cache.get_or_compute(item, job.compute, beside=lambda: self.scale(context, examples, keep))
        result = keep.opened(folder / item, tensors, len(examples), len(context.train))
        remark = self.remark(result)
        if remark is not None and context.ranks.is_main:
            logger.warning(remark)
        return replace(result, queries=queries)

    def scale(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> dict[str, Tensor]:
        """`rise_per_score` of a result, [query]: by the query's token. Nothing where scores have no such scale."""
        rise = self.rise(len(context.train))
        if rise is None or not keep.of_sequences:
            return {}
        counts = torch.tensor(token_counts(queries, context.sweep.model), dtype=torch.float64)
        # Of nothing counted, all scores are 0.
        return {RISE: rise / keep.of_queries(counts).clamp_min(1)}

    def _highest_job(self, context: Context[Any], queries: Dataset[object], examples: Examples[Any], keep: Top) -> Job:
        """The highest of scores that this method only knows how to compute together."""
        job = self.job(context, examples, Pairs())

        def compute(_: Unfinished) -> dict[str, Tensor]:
            whole = self.score(context, queries, Pairs())
            return {**whole.accuracy, **extremes(whole.values, torch.arange(whole.values.shape[1]), keep.k)}

        return replace(job, compute=compute)

    def remark(self, result: Result | TokenScores) -> str | None:
        """What has to be said whenever a result is handed out."""
        return None

    def fit(self, context: Context[Any], name: str | None = None, overwrite: bool = False) -> Factors:
        """What is fitted before queries are known; most methods have nothing.

        Raises:
            InputError: there is nothing.
        """
        raise InputError(f"fit({self!r}): {type(self).__name__} has no factors to fit ahead; score with it directly.")

    def plan(self, context: Context[Any], queries: Dataset[object], keep: Keep[Any]) -> Plan:
        """What a score would cost.

        Raises:
            InputError: nobody has written that down for this method.
        """
        raise InputError(
            f"plan of {type(self).__name__}: only methods with factors are planned; expected one such as EKFAC()."
        )

    def self_influence(self, context: Context[Any], name: str | None = None, overwrite: bool = False) -> Tensor:
        """Each training example's score with itself, [train].

        Raises:
            InputError: this method has none.
        """
        raise InputError(
            f"self_influence of {type(self).__name__}: expected a method whose scores are products of gradients, such "
            "as EKFAC()."
        )


def dense(
    result: Unfinished, queries: int, train: int, itemsize: int, values: Callable[[range], Tensor]
) -> dict[str, Tensor]:
    """Scores [queries, train] that are put into their file some queries at a time.

    Args:
        values: those of some queries, [some, train].
    """
    blocks, everything = result.blocks(queries, train), range(train)
    some = max(1, _CHUNK_BYTES // (train * itemsize))
    for start in range(0, queries, some):
        chosen = range(start, min(start + some, queries))
        blocks.get_or_compute(chosen, everything, partial(_values, values, chosen))
    return {}


def _values(values: Callable[[range], Tensor], chosen: range, _: Unfinished) -> dict[str, Tensor]:
    return {"values": values(chosen)}
