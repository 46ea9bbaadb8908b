"""An index on disk: the compressed gradient of every training example, made once, that answers queries in one product.

Stored gradients are raw, so that any damping is free: a query's gradient is preconditioned, not theirs. This module
knows how they are made and stored only as `StoredGradients`; it does not know what fingerprints are made of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.curvature.factors import Factors
from wherefrom.engine.loading import Examples, indexed
from wherefrom.methods.factored import Factored
from wherefrom.methods.method import Context
from wherefrom.methods.projected.gradient_store import StoredGradients
from wherefrom.methods.projected.projections import Compression, inverse_curvature, preconditioned
from wherefrom.runtime.errors import InputError, LossError, MismatchError, check_argument
from wherefrom.runtime.memory import within_memory
from wherefrom.runtime.placement import is_sharded_tensor, read_tensor
from wherefrom.scoring.keep import Top
from wherefrom.scoring.rescoring import exact_scores
from wherefrom.scoring.results import RISE, TopScores, extremes, merged_extremes
from wherefrom.store.fingerprint import Dataset, Fingerprint, model_digest
from wherefrom.store.names import check_result_name, log_others, result_name
from wherefrom.tasks.task import Batch


@dataclass(frozen=True)
class GradientIndex(Generic[Batch]):
    """Compressed gradients of the training examples of a `Study`, open for queries: what `Study.index` returns.

    It answers for the model that it was made with, and refuses one whose weights have changed since.

    Attributes:
        gradients: of the training examples.
        method: whose scores `query` approximates; factors: with whose curvature.
    """

    context: Context[Batch]
    gradients: StoredGradients[Batch]
    method: Factored
    factors: Factors

    @classmethod
    def of(
        cls, context: Context[Batch], method: Factored, compression: Compression, name: str | None, overwrite: bool
    ) -> GradientIndex[Batch]:
        """The index of a run directory, made unless it is there.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; finished shards stay valid.
        """
        check_argument(isinstance(method, Factored), "method", method, "one with factors, such as EKFAC()")
        if method.solver is not None or method.compressed:
            raise InputError(f"index of {method}: it compresses gradients itself. Leave all but the factors out.")
        check_result_name(name)
        factors = method.fit(context)
        if factors.scaling:
            raise InputError("factors are conditioned, and an index is not: fit factors without a conditioning.")
        sweep = context.sweep
        projections = compression.projections(sweep.layers, factors)
        precision = {"precision": str(sweep.precision)}
        fingerprint = {**context.fingerprint, **precision, **compression.fingerprint(projections)}
        label = compression.label + "-half" * sweep.execution.half_precision
        cache = context.cache(context.folder("index", result_name(label, fingerprint, name)), fingerprint)
        context.ranks.first(lambda: log_others(cache.folder, fingerprint))
        if overwrite:
            cache.clear()
        gradients = StoredGradients.made(sweep, context.train, compression, projections, cache)
        return cls(context, gradients, method, factors)

    @property
    def fingerprint(self) -> Fingerprint:
        """What the index was made from."""
        return self.gradients.cache.fingerprint

    @property
    def path(self) -> Path:
        """Its directory, in the run directory."""
        return self.gradients.cache.folder

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on disk."""
        return self.gradients.bytes_per_example

    def __len__(self) -> int:
        """How many training examples there are."""
        return len(self.gradients)

    def query(
        self, queries: Dataset[object], k: int = 10, *, damping: float | None = None, rerank: int = 0
    ) -> TopScores:
        """Each query's `k` highest and `k` lowest scores, from compressed gradients.

        The first call reads the whole index once to check it; later ones read it as fast as the disk or the system's
        cache gives it. Nothing is written.

        Args:
            queries: examples of the kind that the task measures.
            damping: as in `EKFAC`; None is that of the index's method. Above 0 with random directions.
            rerank: how many of each query's highest, and as many of its lowest, are scored again with whole gradients
                (a sweep over these training examples), and `k` of either taken from them; 0 is none.

        Raises:
            InputError: an argument is impossible, or there are several processes.
            LossError: a layer without curvature has gradients.
            MismatchError: the model, or what is on the disk, is not what the index was opened with.
            DamagedError: a file is not what was written.
            MemoryLimitError: the queries' compressed gradients, or the dense curvature, do not fit.
        """
        queries = indexed("queries", queries)
        self._check_query(k, rerank)
        self._model.check()
        method = self.method if damping is None else replace(self.method, damping=damping)
        examples = self.context.measured(queries)
        advice = "Give fewer queries at once, or make an index of a smaller rank."
        with within_memory("query does", self.gradients.sweep.device, advice):
            filters = self._filter(method.damping)
            projected = self.gradients.of("query gradients", examples)
            best = self.highest(preconditioned(projected, filters, self.gradients.parts), max(k, rerank))
            if rerank:
                best = self._exact(method, examples, best, k)
        fingerprint = {
            **self.fingerprint,
            "method": method.name,
            **method.settings(self.context, self.factors),
            **self.context.query_settings(examples),
            **Top(k).settings(),
            "re-ranked": str(rerank),
        }
        both = best["values"], best["train"], best["lowest_values"], best["lowest_train"]
        scale = method.scale(self.context, examples, Top(k)).get(RISE)
        return TopScores(*both, fingerprint=fingerprint, rise_per_score=scale, queries=queries)

    def _check_query(self, k: int, rerank: int) -> None:
        check_argument(k >= 1, "k", k, "at least 1")
        if rerank and rerank < k:
            raise InputError(f"rerank={rerank} with k={k}: expected at least k, or 0.")
        if self.context.ranks.count > 1:
            raise InputError(f"query on {self.context.ranks.count} processes: expected one, which is enough.")

    @cached_property
    def _model(self) -> _Weights:
        return _Weights(self.gradients.sweep.model, self.fingerprint["model"], self.path)

    @cached_property
    def _filter(self) -> Callable[[float | None], dict[str, Tensor]]:
        """The inverse curvature by damping; the latest is held for the next query."""
        return lru_cache(maxsize=1)(self._checked_filter)

    def _checked_filter(self, damping: float | None) -> dict[str, Tensor]:
        gradients, sweep = self.gradients, self.gradients.sweep
        found = inverse_curvature(self.factors, gradients.projections, gradients.compression.directions, damping)
        for name, inverse in found.items():
            if not bool(inverse.any()) and gradients.any(name):
                raise LossError(
                    f"Layer {name!r}: its curvature is zero in all directions of the index, and training examples "
                    "have gradients there. Give a damping above 0, or fit with empirical=True."
                )
        return {name: inverse.to(sweep.device, sweep.dtype) for name, inverse in found.items()}

    def highest(self, queries: Tensor, k: int) -> dict[str, Tensor]:
        """The fields of `TopScores` for preconditioned compressed gradients [queries, numbers]."""
        best: dict[str, Tensor] = {}
        for examples, block in self.gradients.blocks():
            part = extremes((queries @ block.T).cpu(), torch.arange(examples.start, examples.stop), k)
            best = merged_extremes([best, part], k) if best else part
        return best

    def _exact(self, method: Factored, queries: Examples[Any], best: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The highest and the lowest of candidates, by whole gradients."""
        scoring = method.scoring(self.context, queries, self.factors)
        both = [best[name].sort(1).values for name in ("train", "lowest_train")]
        with tempfile.TemporaryDirectory() as folder:
            parts = self.context.cache(Path(folder), self.fingerprint)
            scores = exact_scores(scoring, torch.cat(both, 1), parts)
        highest, lowest = (
            extremes(each, train, k) for each, train in zip(scores["values"].chunk(2, 1), both, strict=True)
        )
        return {name: (lowest if name.startswith("lowest_") else highest)[name] for name in highest}


class _Weights:
    """The weights that an index answers for.

    Args:
        digest: of the model that the index was made with.
        path: of the index.
    """

    def __init__(self, model: nn.Module, digest: str, path: Path) -> None:
        self._model, self._digest, self._path = model, digest, path
        self._seen: dict[str, tuple[int, int]] = {}

    def check(self) -> None:
        """Refuse others. The digest is taken at first, and again when a tensor's sum or version is another.

        Raises:
            MismatchError: the model has changed.
        """
        state = {name: each for name, each in self._model.state_dict().items() if isinstance(each, Tensor)}
        # A version alone does not count what fused optimizers write, nor what goes through `.data`.
        seen = {name: (each._version, _sum(read_tensor(self._model, name, each))) for name, each in state.items()}
        if seen == self._seen:
            return
        if model_digest(self._model) != self._digest:
            raise MismatchError(
                f"The model's weights have changed since {self._path} was opened. Put them back, or call Study.index "
                "with another name to index the training set for these."
            )
        self._seen = seen


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, eight at a time as a whole number: quicker than a digest, where the tensor lies."""
    own = tensor.full_tensor() if is_sharded_tensor(tensor) else tensor
    read = own.detach().flatten().view(torch.uint8)
    return int(functional.pad(read, (0, -len(read) % 8)).view(torch.int64).sum())
