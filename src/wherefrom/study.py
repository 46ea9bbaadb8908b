"""Study: a model, what it was trained on and for, and the directory where what is found out about it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from wherefrom.curvature import (
    CovarianceCollector,
    EigenvalueCollector,
    Factors,
    Preconditioner,
    bases_from_tensors,
    bases_to_tensors,
    checked_strategy,
    diagonalize,
)
from wherefrom.errors import InputError, MismatchError
from wherefrom.fingerprint import LIBRARY, Dataset, Fingerprint, dataset_digest, differences, model_digest
from wherefrom.gradients import GradientBank, bytes_per_query
from wherefrom.layers import select_layers
from wherefrom.memory import checked_batch_size, total_memory
from wherefrom.report.html import render_report
from wherefrom.report.passages import DatasetPassages, Tokenizer
from wherefrom.sampling import Sampler
from wherefrom.scores import PairwiseCollector, Scores
from wherefrom.store import Artifact, Partial, checked_name, remove, write_text
from wherefrom.sweep import Objective, Sweep
from wherefrom.task import Batch, Task

# The part of the memory that resident query gradients may take.
_BANK_SHARE = 0.4


class Study(Generic[Batch]):
    """Fits curvature factors and scores queries for one trained model.

    Args:
        path: the run directory; factors and scores are kept there, and reused when nothing has changed.
        model: the trained model, on the device where it is to run. It is left as it is.
        task: the loss, the measurement, and the tracked layers.
        train: the training examples: anything with `len` and integer positions.
        progress: show progress bars; None shows them when the standard error is a terminal.
        checkpoint_seconds: how often a sweep may save its partial sums, so that it can be resumed; 0 is after every
            batch.

    Raises:
        InputError: `train` is empty.
        LayerError: no layer can be tracked.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        task: Task[Batch],
        *,
        train: Dataset[object],
        progress: bool | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        if len(train) == 0:
            raise InputError("train is empty: expected at least one example. Check the path or the filter.")
        self.path = Path(path)
        self.train = train
        layers = select_layers(model, task.layers, task.head(model))
        self._sweep = Sweep(model, task, layers, progress=progress, checkpoint_seconds=checkpoint_seconds)
        self.layers = layers
        self.profile = self._sweep.profile

    def fit(
        self,
        strategy: str = "ekfac",
        *,
        empirical: bool = False,
        batch_size: int | None = None,
        seed: int = 0,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Factors:
        """Fit curvature factors on the training examples, or load them when they are there.

        Args:
            strategy: "identity", "diagonal", "kfac" or "ekfac".
            empirical: use the dataset's targets instead of targets drawn from the model (the Fisher information).
            batch_size: None finds one; results depend on it only by rounding.
            seed: of the drawn targets.
            name: of the factors in the run directory; "sampled" or "empirical" by default. Strategies share what they
                have in common under one name.
            overwrite: replace what has this name, instead of refusing when it was made from something else.

        Raises:
            WherefromError: see `wherefrom.errors`; what was finished before stays valid.
        """
        needed = checked_strategy(strategy)
        folder = self.path / "factors" / checked_name(name or ("empirical" if empirical else "sampled"))
        fingerprint = self._fingerprint()
        fingerprint["targets"] = "dataset" if empirical else f"sampled, seed {seed}"
        stage = partial(self._stage, folder, fingerprint, overwrite)
        run = partial(self._fit_sweep, self._train_objective(empirical, seed), checked_batch_size(batch_size))
        place = (self._sweep.dtype, self._sweep.device)

        def covariance(sums: Partial) -> dict[str, Tensor]:
            return run("covariance", CovarianceCollector(self.layers, *place), sums)

        def basis(_: Partial) -> dict[str, Tensor]:
            means = stage("covariance", covariance)
            with self.profile.action("eigendecomposition"):
                return bases_to_tensors(diagonalize(means, self.layers))

        def mean_squares(sums: Partial) -> dict[str, Tensor]:
            return run("eigenvalues", EigenvalueCollector(self.layers, bases, len(self.train), *place), sums)

        bases = bases_from_tensors(stage("eigenbasis", basis)) if needed.basis else {}
        eigenvalues = {}
        if needed.eigenvalues == "fitted":
            eigenvalues = stage("eigenvalues" if needed.basis else "diagonal", mean_squares)
        elif needed.eigenvalues == "product":
            eigenvalues = {layer: each.eigenvalues() for layer, each in bases.items()}
        return Factors(strategy, fingerprint, bases, eigenvalues)

    def score(
        self,
        queries: Dataset[object],
        factors: Factors,
        *,
        damping: float | None = None,
        query_batch_size: int | None = None,
        train_batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Scores:
        """Score every (query, training example) pair, or load the scores when they are there.

        The preconditioned query gradients stay in memory, as many as fit, and the training set is swept once for each
        such block of queries.

        Args:
            queries: examples of the kind that the task measures.
            factors: what `fit` returned for this model.
            damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer.
            query_batch_size, train_batch_size: None finds them; results depend on them only by rounding.
            dtype: of the resident query gradients and of the operands of their products with training gradients;
                products are accumulated in float32. None keeps float32 (float64 for a float64 model).
            name: of the scores in the run directory; the strategy by default.
            overwrite: replace what has this name, instead of refusing when it was made from something else.

        Raises:
            WherefromError: see `wherefrom.errors`; what was finished before stays valid.
        """
        study = self._fingerprint()
        _check_same_model(factors.fingerprint, study)
        preconditioner = factors.preconditioner(damping)
        dtype = dtype or self._sweep.dtype
        folder = self.path / "scores"
        name = checked_name(name or factors.strategy)
        sizes = (checked_batch_size(query_batch_size), checked_batch_size(train_batch_size))
        fingerprint = study | {
            "strategy": factors.strategy,
            "factors": factors.fingerprint["training data"],
            "targets": factors.fingerprint["targets"],
            "damping": "0.1 x mean eigenvalue" if damping is None else repr(damping),
            "queries": dataset_digest(queries),
            "dtype": str(dtype),
        }

        def compute(_: Partial) -> dict[str, Tensor]:
            blocks = self._query_blocks(len(queries), dtype)
            stage = partial(self._stage, folder / f"{name}.blocks", fingerprint, overwrite)
            parts = []
            for rows in blocks:
                examples = [queries[row] for row in rows]
                block = partial(self._score_block, examples, preconditioner, dtype, sizes)
                parts.append(stage(f"{rows.start}-{rows.stop}", block)["values"].cpu())
            return {"values": torch.cat(parts)}

        values = self._stage(folder, fingerprint, overwrite, name, compute)["values"].cpu()
        remove(folder / f"{name}.blocks")
        return Scores(values, fingerprint)

    def report(
        self,
        scores: Scores,
        queries: Dataset[object],
        *,
        tokenizer: Tokenizer | None = None,
        path: str | Path | None = None,
        summary: str = "",
        k: int = 10,
    ) -> Path:
        """Write one self-contained HTML page: every query with its most positive and most negative training examples.

        Args:
            scores: what `score` returned for these queries.
            queries: examples; their columns `text`, `title` and `label` are shown where they exist.
            tokenizer: decodes `input_ids` of examples without `text`.
            path: the page; `reports/STRATEGY.html` in the run directory by default.
            summary: a line below the title.
            k: how many examples of each sign are shown.

        Returns:
            Where the page is.
        """
        path = Path(path) if path else self.path / "reports" / f"{scores.strategy}.html"
        page = render_report(
            title=f"Where from? {self.path.name}",
            summary=summary,
            queries=DatasetPassages(queries, tokenizer),
            train=DatasetPassages(self.train, tokenizer),
            values=scores.values,
            settings=scores.fingerprint,
            profile=self.profile.text(),
            k=k,
        )
        write_text(path, page)
        return path

    def _fit_sweep(
        self,
        objective: Objective[Batch],
        batch_size: int | None,
        name: str,
        collector: CovarianceCollector | EigenvalueCollector,
        sums: Partial,
    ) -> dict[str, Tensor]:
        """Sweep the training set with a collector of curvature; what it found."""
        self._sweep.run(name, self.train, collector, objective, batch_size=batch_size, partial=sums)
        return collector.means()

    def _score_block(
        self,
        queries: Sequence[object],
        preconditioner: Preconditioner,
        dtype: torch.dtype,
        batch_sizes: tuple[int | None, int | None],
        sums: Partial,
    ) -> dict[str, Tensor]:
        """Scores of the queries that are resident together: one sweep over them, one over the training set."""
        sweep, (query_size, train_size) = self._sweep, batch_sizes
        bank = GradientBank(self.layers, preconditioner, len(queries), dtype, sweep.device)
        sweep.run("query gradients", queries, bank, self._measurement, batch_size=query_size)
        collector = PairwiseCollector(bank, len(queries), len(self.train), sweep.dtype, sweep.device)
        objective = self._train_objective(empirical=True)
        sweep.run("pairwise scores", self.train, collector, objective, batch_size=train_size, partial=sums)
        return collector.sums

    def _query_blocks(self, queries: int, dtype: torch.dtype) -> list[range]:
        """Runs of queries whose gradients fit into memory together.

        The total memory decides, not what is free, so that a resumed run cuts the same blocks.
        """
        fitting = int(_BANK_SHARE * total_memory(self._sweep.device) / bytes_per_query(self.layers, dtype))
        block = max(1, fitting)
        return [range(start, min(start + block, queries)) for start in range(0, queries, block)]

    def _stage(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        overwrite: bool,
        name: str,
        compute: Callable[[Partial], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Load `folder/name`, or compute it and keep it; `compute` may keep partial sums beside it."""
        artifact = Artifact(folder / name, fingerprint)
        sums = Partial(folder / f"{name}.partial.safetensors", fingerprint)
        if overwrite:
            sums.discard()
        if artifact.available(overwrite):
            with self.profile.action(f"load {name}"):
                tensors = artifact.load(self._sweep.device)
        else:
            # In the layout that loading gives: products of other layouts differ in the last bit.
            tensors = {key: tensor.contiguous() for key, tensor in compute(sums).items()}
            with self.profile.action(f"save {name}"):
                artifact.save(tensors)
        sums.discard()  # only now: until the artifact is there, the sums are all there is
        return tensors

    def _train_objective(self, empirical: bool, seed: int = 0) -> Objective[Batch]:
        task = self._sweep.task

        def objective(model: nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
            return task.train_loss(model, batch, None if empirical else Sampler(seed, rows))

        return objective

    def _measurement(self, model: nn.Module, batch: Batch, rows: Sequence[int]) -> Tensor:
        return self._sweep.task.measurement(model, batch)

    def _fingerprint(self) -> dict[str, str]:
        """What everything in this study depends on; taken anew each time, since weights and lists can change."""
        with self.profile.action("fingerprint"):
            return {
                "library": LIBRARY,
                "model": model_digest(self._sweep.model),
                "task": json.dumps(self._sweep.task.settings(), sort_keys=True),
                "layers": _summary(list(self.layers)),
                "training data": dataset_digest(self.train),
            }


def _summary(names: Sequence[str]) -> str:
    """A list of names on one short line that differs whenever the list does."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{len(names)}, {names[0]} to {names[-1]} ({digest})"


def _check_same_model(factors: Fingerprint, study: Fingerprint) -> None:
    changed = differences(*({name: each[name] for name in ("model", "layers")} for each in (factors, study)))
    if changed:
        raise MismatchError(
            f"factors were fitted on another model. {'; '.join(changed)}. Fit factors on this model, or make the Study "
            "with the model that they belong to."
        )
