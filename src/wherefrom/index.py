"""An index on disk: the compressed gradient of every training example, made once, that answers queries in one product.

Rows lie in shards, each a stage of its own, so that a killed build goes on with the shard that it was in; beside them
lie the projections that they were made with, which come first and refuse what is made from something else. Rows are
raw, so that any damping is free: a query's gradient is preconditioned, not theirs. A query reads the shards, memory-
mapped, block by block. This module brings compressed gradients, sweeps and stages together; it does not know what
fingerprints are made of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from wherefrom.compression import (
    ROWS,
    SCALES,
    CompressedGradients,
    Compression,
    Projection,
    inverse_curvature,
    packed,
    parts,
    preconditioned,
    projections_from_tensors,
    projections_to_tensors,
    unpacked,
)
from wherefrom.curvature import Factors, checked_strategy
from wherefrom.disk import Step, check_space, used_bytes
from wherefrom.errors import InputError, LossError, MismatchError
from wherefrom.files import within
from wherefrom.fingerprint import Dataset, Fingerprint, checked_length, dataset_digest, model_digest
from wherefrom.layouts import Layout, check_layout
from wherefrom.loading import Rows
from wherefrom.options import Options
from wherefrom.rescoring import exact_scores
from wherefrom.scores import TopScores, extremes, merged_extremes
from wherefrom.scoring import Scoring, measurement, training_loss
from wherefrom.stages import BlockStages, Stages
from wherefrom.store import Partial
from wherefrom.sweep import Objective, Sweep
from wherefrom.task import Batch, checked_settings

# Compressed gradients of a shard while they are added up, and what is read and widened at a time.
_SHARD_BYTES, _BLOCK_BYTES = 2**28, 2**26
_PROJECTIONS = "projections"


@dataclass(frozen=True)
class GradientIndex(Generic[Batch]):
    """Compressed gradients of the training examples of a `Study`, open for queries: what `Study.index` returns.

    It answers for the model that it was made with, and refuses one whose weights have changed since.

    Attributes:
        factors: whose curvature queries are preconditioned with, and whose scores `query` approximates.
        compression: how gradients are compressed.
        projections: of every layer.
    """

    sweep: Sweep[Batch]
    train: Dataset[object]
    factors: Factors
    compression: Compression
    projections: Mapping[str, Projection]
    stages: Stages

    @classmethod
    def of(
        cls,
        sweep: Sweep[Batch],
        train: Dataset[object],
        factors: Factors,
        compression: Compression,
        run: Path,
        study: Fingerprint,
    ) -> GradientIndex[Batch]:
        """The index of a run directory, made unless it is there.

        Args:
            study: what everything in the run depends on.

        Raises:
            WherefromError: see `wherefrom.errors`; finished shards stay valid.
        """
        factors.check_model(study)
        projections = compression.projections(sweep.layers, factors)
        fingerprint = {**study, "precision": str(sweep.precision), **compression.fingerprint(projections)}
        stages = Stages(within(run, "index", compression.result_name), fingerprint, sweep.profile)
        if compression.overwrite:
            stages.clear()
        projections = _kept(projections, stages)
        index = cls(sweep, train, factors, compression, projections, stages)
        index._build()
        return index

    @property
    def fingerprint(self) -> Fingerprint:
        """What the index was made from."""
        return self.stages.fingerprint

    @property
    def path(self) -> Path:
        """Its directory, in the run directory."""
        return self.stages.folder

    def __len__(self) -> int:
        """How many training examples there are."""
        return len(self.train)

    @cached_property
    def _parts(self) -> dict[str, slice]:
        return parts(self.projections)

    @property
    def size(self) -> int:
        """How many numbers an example has."""
        return sum(each.size for each in self.projections.values())

    @property
    def bytes_per_example(self) -> int:
        """What an example takes on disk."""
        scales = len(self.projections) * self.sweep.dtype.itemsize if self.compression.numbers == "int8" else 0
        return self.size * self._number_type.itemsize + scales

    @property
    def _number_type(self) -> torch.dtype:
        return {"float32": self.sweep.dtype, "bfloat16": torch.bfloat16, "int8": torch.int8}[self.compression.numbers]

    @cached_property
    def _shards(self) -> list[range]:
        """Runs of training examples that lie in a file; they depend on nothing but sizes."""
        rows = max(1, _SHARD_BYTES // (self.size * self.sweep.dtype.itemsize))
        return [range(start, min(start + rows, len(self))) for start in range(0, len(self), rows)]

    def _build(self) -> None:
        """Make the shards that are missing: a sweep over the training examples of each."""
        kept, ranks = len(self) * self.bytes_per_example, self.stages.ranks
        sums = min(_SHARD_BYTES, len(self) * self.size * self.sweep.dtype.itemsize)
        step = Step("index", kept, kept + 2 * ranks.count * sums)
        ranks.first(lambda: check_space(self.path, [step], used_bytes([self.path])))
        for shard in self._shards:
            self.stages.keep(_name(shard), partial(self._shard, shard))

    def _shard(self, shard: range, sums: Partial) -> dict[str, Tensor]:
        rows = self._compressed("index", Rows(self.train, shard), training_loss(self.sweep.task), sums)
        return packed(rows, self.compression.numbers, self._parts)

    def _compressed(
        self, name: str, dataset: Dataset[object], objective: Objective[Batch], sums: Partial | None = None
    ) -> Tensor:
        """Compressed gradients [examples, numbers]."""
        sweep = self.sweep
        collector = CompressedGradients(sweep.layers, self.projections, len(dataset), sweep.dtype, sweep.device)
        sweep.run(name, dataset, collector, objective, batch_size=self.compression.batch_size, partial=sums)
        return collector.sums[ROWS]

    def query(
        self, queries: Dataset[object], k: int = 10, *, damping: float | None = None, rerank: int = 0
    ) -> TopScores:
        """Each query's `k` highest and `k` lowest scores, from compressed gradients.

        The first call reads the whole index once to check it; later ones read it as fast as the disk or the system's
        cache gives it. Nothing is written.

        Args:
            queries: examples of the kind that the task measures.
            damping: as in `Study.score`; above 0 with random directions.
            rerank: how many of each query's highest, and as many of its lowest, are scored again with whole gradients
                (a sweep over these training examples), and `k` of either taken from them; 0 is none.

        Raises:
            InputError: an argument is impossible, or there are several processes.
            LossError: a layer without curvature has gradients.
            MismatchError: the model, or what is on the disk, is not what the index was opened with.
            DamagedError: a file is not what was written.
        """
        self._check_query(queries, k, rerank)
        self._model.check()
        filters = self._filter(damping)
        asked = self._compressed("query gradients", queries, measurement(self.sweep.task))
        best = self.highest(preconditioned(asked, filters, self._parts), max(k, rerank))
        if rerank:
            best = self._exact(queries, best, damping, k)
        return TopScores(**best, fingerprint=self._asked(queries, damping, k, rerank))

    def _asked(self, queries: Dataset[object], damping: float | None, k: int, rerank: int) -> Fingerprint:
        """What an answer depends on."""
        options = Options(damping=damping, top=k, half_precision=self.compression.half_precision)
        return {
            **options.fingerprint(self.fingerprint, self.factors, str(self.sweep.precision)),
            "queries": dataset_digest(queries),
            "measured": checked_settings(self.sweep.task).get("measure", "measurement"),
            "re-ranked": str(rerank),
        }

    def _check_query(self, queries: Dataset[object], k: int, rerank: int) -> None:
        checked_length("queries", queries)
        if k < 1:
            raise InputError(f"k={k}: expected at least 1.")
        if rerank and rerank < k:
            raise InputError(f"rerank={rerank} with k={k}: expected at least k, or 0.")
        if self.stages.ranks.count > 1:
            raise InputError(f"query on {self.stages.ranks.count} processes: expected one, which is enough.")

    @cached_property
    def _model(self) -> _Weights:
        return _Weights(self.sweep.model, self.fingerprint["model"], self.path)

    @cached_property
    def _filter(self) -> Callable[[float | None], dict[str, Tensor]]:
        """The inverse curvature by damping; the latest is kept for the next query."""
        return lru_cache(maxsize=1)(self._checked_filter)

    def _checked_filter(self, damping: float | None) -> dict[str, Tensor]:
        found = inverse_curvature(self.factors, self.projections, self.compression.directions, damping)
        for name, inverse in found.items():
            part = self._parts[name]
            if not bool(inverse.any()) and any(bool(each[ROWS][:, part].any()) for _, each in self._mapped):
                raise LossError(
                    f"Layer {name!r}: its curvature is zero in all directions of the index, and training examples "
                    "have gradients there. Give a damping above 0, or fit with empirical=True."
                )
        return {name: inverse.to(self.sweep.device, self.sweep.dtype) for name, inverse in found.items()}

    def highest(self, asked: Tensor, k: int) -> dict[str, Tensor]:
        """The fields of `TopScores` for preconditioned compressed gradients [queries, numbers]."""
        best: dict[str, Tensor] = {}
        for rows, block in self._blocks():
            part = extremes((asked @ block.T).cpu(), torch.arange(rows.start, rows.stop), k)
            best = merged_extremes([best, part], k) if best else part
        return best

    def _blocks(self) -> Iterator[tuple[range, Tensor]]:
        """Rows some at a time, on the device: [rows, numbers]."""
        dtype, device = self.sweep.dtype, self.sweep.device
        count = max(1, _BLOCK_BYTES // (self.size * dtype.itemsize))
        for shard, tensors in self._mapped:
            for start in range(0, len(shard), count):
                piece = {name: each[start : start + count].to(device) for name, each in tensors.items()}
                block = unpacked(piece, dtype, self._parts)
                yield range(shard.start + start, shard.start + start + len(block)), block

    @cached_property
    def _mapped(self) -> list[tuple[range, dict[str, Tensor]]]:
        """The shards, memory-mapped, after a look at all of their bytes."""
        found = []
        for shard in self._shards:
            artifact = self.stages.artifact(_name(shard))
            if not artifact.available():  # another process may have replaced the index since it was opened
                raise MismatchError(f"{artifact.path} has gone since the index was opened. Call Study.index again.")
            tensors = artifact.mapped()
            layout: Layout = {ROWS: (self._number_type, (len(shard), self.size))}
            if self.compression.numbers == "int8":
                layout = {**layout, SCALES: (self.sweep.dtype, (len(shard), len(self.projections)))}
            check_layout(self.path / _name(shard), tensors, layout)
            found.append((shard, tensors))
        return found

    def _exact(
        self, queries: Dataset[object], best: Mapping[str, Tensor], damping: float | None, k: int
    ) -> dict[str, Tensor]:
        """The highest and the lowest of candidates, by whole gradients."""
        sweep, preconditioner = self.sweep, self.factors.preconditioner(damping)
        options = Options(damping=damping, half_precision=self.compression.half_precision)
        strategy = checked_strategy(self.factors.strategy)
        scoring = Scoring(sweep, strategy, preconditioner, queries, self.train, options)
        both = [best[name].sort(1).values for name in ("train", "lowest_train")]
        with tempfile.TemporaryDirectory() as folder:
            stages = Stages(Path(folder), self.fingerprint, sweep.profile)
            scores = exact_scores(scoring, torch.cat(both, 1), BlockStages(stages, len(self)))
        highest, lowest = (extremes(each, train, k) for each, train in zip(scores.chunk(2, 1), both, strict=True))
        return {name: (lowest if name.startswith("lowest_") else highest)[name] for name in highest}


class _Weights:
    """The weights that an index answers for.

    Args:
        digest: of the model that the index was made with.
        path: of the index.
    """

    def __init__(self, model: nn.Module, digest: str, path: Path) -> None:
        self._model, self._digest, self._path = model, digest, path
        self._versions: dict[str, tuple[int, int]] = {}

    def check(self) -> None:
        """Refuse others. All bytes are read at first, and again when tensors have been written to.

        Raises:
            MismatchError: the model has changed.
        """
        state = {name: each for name, each in self._model.state_dict().items() if isinstance(each, Tensor)}
        versions = {name: (each.data_ptr(), each._version) for name, each in state.items()}
        if versions == self._versions:
            return
        if model_digest(self._model) != self._digest:
            raise MismatchError(
                f"The model's weights have changed since {self._path} was opened. Put them back, or call Study.index "
                "with another name to index the training set for these."
            )
        self._versions = versions


def _kept(projections: Mapping[str, Projection], stages: Stages) -> dict[str, Projection]:
    """Projections as the rows were made with: random ones may differ in the last bits on another machine."""
    computed = projections_to_tensors(projections)
    artifact = stages.keep(_PROJECTIONS, lambda _: computed)
    stored = artifact.load()
    check_layout(artifact.path, stored, {name: (each.dtype, tuple(each.shape)) for name, each in computed.items()})
    return projections_from_tensors(stored, projections)


def _name(shard: range) -> str:
    return f"{shard.start}-{shard.stop}"
