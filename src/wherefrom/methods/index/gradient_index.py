"""An index on disk: a sketch of the gradient of every training example, made once, that answers queries.

Sketches are whitened for one curvature and damping, which are a part of what an index is. This module knows how they
are made and stored only as `SketchStore`; it does not know what fingerprints are made of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional

from wherefrom.curvature.factors import Factors, bases_to_tensors
from wherefrom.engine.loading import Examples, indexed
from wherefrom.methods.factored import Factored
from wherefrom.methods.index.search import Search
from wherefrom.methods.index.sketches import Projector, Sketch
from wherefrom.methods.index.store import SketchStore
from wherefrom.methods.method import Context
from wherefrom.runtime.errors import InputError, MismatchError, check_argument
from wherefrom.runtime.memory import within_memory
from wherefrom.runtime.placement import is_sharded_tensor, read_tensor
from wherefrom.runtime.precision import own_precision
from wherefrom.scoring.keep import Tokens, Top
from wherefrom.scoring.rescoring import exact_scores
from wherefrom.scoring.results import RISE, TopScores, extremes
from wherefrom.scoring.tokens import TopChunks
from wherefrom.store.fingerprint import MODEL, TRAIN, Dataset, Fingerprint, model_digest, tensors_digest
from wherefrom.store.names import check_result_name, log_others, result_name
from wherefrom.tasks.task import Batch


@dataclass(frozen=True)
class GradientIndex(Generic[Batch]):
    """Sketched gradients of the training examples of a `Study`, open for queries: what `Study.index` returns.

    It answers for the model that it was made with, and refuses one whose weights have changed since.

    Attributes:
        store: the sketches.
        method: whose scores `query` approximates; factors: with whose curvature.
    """

    context: Context[Batch]
    store: SketchStore[Batch]
    method: Factored
    factors: Factors

    @classmethod
    def of(
        cls, context: Context[Batch], method: Factored, sketch: Sketch, name: str | None, overwrite: bool
    ) -> GradientIndex[Batch]:
        """The index of a run directory; examples that are not in it are added.

        Raises:
            WherefromError: see `wherefrom.runtime.errors`; finished shards stay valid.
        """
        check_argument(isinstance(method, Factored), "method", method, "one with factors, such as EKFAC()")
        if method.solver is not None or method.compressed:
            raise InputError(f"index of {method}: it compresses gradients itself. Leave all but the factors out.")
        check_result_name(name)
        factors = method.fit(context)
        sweep = context.sweep
        # The factors themselves, since others of the same data may have eigenvectors that point elsewhere. Not the
        # training examples: those of a longer or shorter training set take what there is.
        fitted = tensors_digest({**bases_to_tensors(factors.bases), **factors.eigenvalues, **factors.scaling})[:24]
        settings = {"method": method.name, **method.settings(context, factors), "fitted": fitted, **sketch.settings}
        fingerprint = {name: each for name, each in context.fingerprint.items() if name != TRAIN} | settings
        label = f"{method.name}-{sketch.label}" + "-half" * sweep.execution.half_precision
        cache = context.cache(context.folder("index", result_name(label, fingerprint, name)), fingerprint)
        context.ranks.first(lambda: log_others(cache.folder, fingerprint))
        if overwrite:
            cache.clear()
        projector = Projector(sketch, sweep.layers, factors.preconditioner(method.damping), sweep.device, sweep.dtype)
        store = SketchStore(sweep, context.train, sketch, projector, cache)
        store.make()
        return cls(context, store, method, factors)

    @property
    def fingerprint(self) -> Fingerprint:
        """What the index was made from."""
        return {**self.context.fingerprint, **self.store.cache.fingerprint}

    @property
    def path(self) -> Path:
        """Its directory, in the run directory."""
        return self.store.cache.folder

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on disk, on average where it is in chunks."""
        return self.store.bytes_per_example

    def __len__(self) -> int:
        """How many training examples there are."""
        return len(self.store)

    def query(self, queries: Dataset[object], k: int = 10, *, rerank: int = 0, normalized: bool = False) -> TopScores:
        """Each query's `k` highest and `k` lowest scores, from sketches.

        They rank examples; what a score is in nats, `predicted_rise`, is known after `rerank`, or of a
        `Sketch(focus=0)` of 8 or 32 bits, whose products are the scores themselves.

        The first call reads the whole index once to check it; later ones read it as fast as the disk or the system's
        cache gives it. Nothing is written.

        Args:
            queries: examples of the kind that the task measures.
            rerank: how many of each query's highest, and as many of its lowest, are scored again with whole gradients
                (a sweep over these training examples), and `k` of either taken from them; 0 is none.
            normalized: divide by the norms of both whitened gradients, sqrt(g^T (H + damping)^-1 g): cosines, as
                `Scores.normalized("cosine")`. Not with `rerank`, whose scores are not divided.

        Raises:
            InputError: an argument is impossible, there are several processes, or the index is of chunks.
            MismatchError: the model, or what is on the disk, is not what the index was opened with.
            DamagedError: a file is not what was written.
            MemoryLimitError: the queries' sketches do not fit.
        """
        if self.store.sketch.chunk is not None:
            raise InputError(
                f"query of {self.path}, which has sketches of chunks of {self.store.sketch.chunk} token(s): call "
                "query_chunks, or make an index of whole examples, with Sketch(chunk=None)."
            )
        return self._best(queries, k, rerank, normalized)

    def query_chunks(
        self, queries: Dataset[object], k: int = 10, *, rerank: int = 0, normalized: bool = False
    ) -> TopChunks:
        """Each query's `k` highest and `k` lowest scores of chunks, from an index with `Sketch(chunk=...)`.

        Args:
            rerank: how many chunks of each query's highest, and as many of its lowest, are scored again as the sums of
                their tokens' scores (`keep=Tokens(...)` of their examples), and `k` of either taken from them.
            queries, normalized: as in `query`.

        Raises:
            WherefromError: as `query`.
            InputError: the index is of whole examples.
        """
        if self.store.sketch.chunk is None:
            raise InputError(
                f"query_chunks of {self.path}, which has sketches of whole examples: call query, or make an index of "
                "chunks, such as with Sketch(chunk=64)."
            )
        top = self._best(queries, k, rerank, normalized)
        highest, lowest = (self.store.chunks.spans[each] for each in (top.train, top.lowest_train))  # [query, k, 3]
        return TopChunks(
            values=top.values,
            train=highest[..., 0],
            spans=highest[..., 1:],
            lowest_values=top.lowest_values,
            lowest_train=lowest[..., 0],
            lowest_spans=lowest[..., 1:],
            fingerprint=top.fingerprint,
            rise_per_score=top.rise_per_score,
            queries=top.queries,
        )

    def _best(self, queries: Dataset[object], k: int, rerank: int, normalized: bool) -> TopScores:
        """What `query` returns; of an index of chunks, with their numbers in `SketchStore.chunks` for positions."""
        queries = indexed("queries", queries)
        self._check_query(k, rerank, normalized)
        self._model.check()
        store, examples = self.store, self.context.measured(queries)
        advice = "Give fewer queries at once, or make an index of fewer numbers."
        device = store.sweep.device
        with within_memory("query does", device, advice), own_precision(device):
            counters, norms = store.of("query gradients", examples)
            shards = store.shards if store.sketch.chunk is None else store.chunks.shards
            search = Search(store.sketch, shards, store.sweep.device)
            best = search.best(counters, norms, max(k, rerank), normalized)
            if rerank:
                best = self._exact(examples, best, k)
        fingerprint = {
            **self.fingerprint,
            **self.context.query_settings(examples),
            **Top(k).settings(),
            "re-ranked": str(rerank),
            **({"normalized": "cosine"} if normalized else {}),
        }
        both = best["values"], best["train"], best["lowest_values"], best["lowest_train"]
        # Without focus the sketch's products are the scores, but those of signs; otherwise they only rank.
        in_units = rerank or (store.sketch.focus == 0 and store.sketch.bits > 1 and not normalized)
        scale = self.method.scale(self.context, examples, Top(k)).get(RISE) if in_units else None
        return TopScores(*both, fingerprint=fingerprint, rise_per_score=scale, queries=queries)

    def prune(self) -> int:
        """Delete from the disk what is stored of examples that are not in the study's training set.

        Another process that has the index open refuses its next answer, or gives it from what it has read. A file
        system or a backup may still have the bytes, and factors are means over all examples that they were fitted on.

        Returns:
            How many examples are deleted.

        Raises:
            RankError: there are several processes.
            WherefromError: see `wherefrom.runtime.errors`.
        """
        self.context.ranks.check_alone("prune")
        return self.store.prune()

    def _check_query(self, k: int, rerank: int, normalized: bool) -> None:
        check_argument(k >= 1, "k", k, "at least 1")
        if rerank and rerank < k:
            raise InputError(f"rerank={rerank} with k={k}: expected at least k, or 0.")
        if rerank and normalized:
            raise InputError(f"rerank={rerank} with normalized=True: expected one of them.")
        if self.context.ranks.count > 1:
            raise InputError(f"query on {self.context.ranks.count} processes: expected one, which is enough.")

    @cached_property
    def _model(self) -> _Weights:
        return _Weights(self.store.sweep.model, self.fingerprint[MODEL], self.path)

    def _exact(self, queries: Examples[Any], best: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The highest and the lowest of candidates, by whole gradients."""
        both = [best[name].sort(1).values for name in ("train", "lowest_train")]
        exact = self._exact_examples if self.store.sketch.chunk is None else self._exact_chunks
        with tempfile.TemporaryDirectory() as folder:
            values = exact(queries, torch.cat(both, 1), Path(folder))
        highest, lowest = (extremes(each, train, k) for each, train in zip(values.chunk(2, 1), both, strict=True))
        return {name: (lowest if name.startswith("lowest_") else highest)[name] for name in highest}

    def _exact_examples(self, queries: Examples[Any], positions: Tensor, folder: Path) -> Tensor:
        """Scores of training examples, int64 [query, n]."""
        scoring = self.method.scoring(self.context, queries, self.factors)
        return exact_scores(scoring, positions, self.context.cache(folder, self.fingerprint))["values"]

    def _exact_chunks(self, queries: Examples[Any], numbers: Tensor, folder: Path) -> Tensor:
        """Scores of chunks, int64 [query, n], as the sums of their tokens'."""
        chosen = self.store.chunks.spans[numbers].tolist()  # train, start, stop
        pairs = {(query, train) for query, each in enumerate(chosen) for train, _, _ in each}
        method, context = replace(self.method, factors=self.factors), replace(self.context, path=folder)
        tokens = method.score(context, queries.dataset, Tokens(pairs=tuple(sorted(pairs))))
        sums = [
            tokens[query, train][start:stop].sum() for query, each in enumerate(chosen) for train, start, stop in each
        ]
        return torch.stack(sums).view(numbers.shape)


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
