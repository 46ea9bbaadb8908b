"""Scores of a run directory: each loaded, or computed block by block and kept.

This module brings scoring and stages together; it does not know what fingerprints are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from wherefrom.curvature.solvers import not_converged
from wherefrom.runtime.profile import Profile
from wherefrom.scoring.options import of_values
from wherefrom.scoring.rescoring import exact_scores, rescore
from wherefrom.scoring.results import Scores, TopScores, extremes
from wherefrom.scoring.scoring import Scoring
from wherefrom.scoring.self_influence import SELF_INFLUENCE, SQUARED_NORM
from wherefrom.scoring.token_scoring import TokenScoring
from wherefrom.scoring.tokens import INDEX, TokenParts, TokenScores, extreme_pairs
from wherefrom.store.artifacts import Layout, Partial, check_layout, read_manifest
from wherefrom.store.cache import BlockStages, Stages
from wherefrom.store.files import within
from wherefrom.store.fingerprint import Fingerprint, tensors_digest
from wherefrom.store.names import log_others, result_name
from wherefrom.tasks.task import Batch

logger = logging.getLogger("wherefrom")

Kind = TypeVar("Kind", Scores, TopScores)


@dataclass(frozen=True)
class KeptScores(Generic[Batch]):
    """What scoring gives, in a run directory.

    Attributes:
        label: what the name begins with, where none is given.
        fingerprint: what the scores depend on.
    """

    run: Path
    scoring: Scoring[Batch]
    label: str
    fingerprint: Fingerprint
    profile: Profile

    @cached_property
    def name(self) -> str:
        """What the result is called in its folder."""
        return result_name(self.label, self.fingerprint, self.scoring.options.name)

    @cached_property
    def _path(self) -> Path:
        return within(self.run, "scores", self.name)

    def scores(self) -> Scores:
        """Those of all pairs, or aggregated ones."""
        scoring, options = self.scoring, self.scoring.options
        train = len(scoring.train)

        def compute(blocks: Stages) -> dict[str, Tensor]:
            stages = BlockStages(blocks, train)
            if options.aggregate_queries or options.aggregate_train:
                return scoring.aggregated(stages)
            found = scoring.pairwise(stages, blocks.folder)
            if options.rescore:
                again = BlockStages(replace(blocks, folder=blocks.folder / "rescored"), train)
                found["changes"] = rescore(scoring, found.get("values"), again)
            return found

        self._keep(compute)
        scores = Scores.load(self._path)
        shape = (1 if options.aggregate_queries else len(scoring.queries), 1 if options.aggregate_train else train)
        check_layout(self._path, {"values": scores.values}, {"values": (None, shape)})
        return self._convergence_said(scores)

    def highest(self, k: int) -> TopScores:
        """Each query's highest and lowest."""
        self._keep(lambda blocks: self.scoring.highest(BlockStages(blocks, len(self.scoring.train)), k))
        found = TopScores.load(self._path)
        shape = (len(self.scoring.queries), "kept")
        check_layout(self._path, {"values": found.values}, {"values": (None, shape)})
        return self._convergence_said(found)

    def of_candidates(self, positions: Tensor) -> TopScores:
        """Those of given training examples alone, int64 [queries, candidates], ascending; all of them are kept."""
        count = positions.shape[1]
        wanted = f"{count} candidates of each query ({tensors_digest({'candidates': positions})[:24]})"
        kept = replace(self, label=f"{self.label}-candidates", fingerprint={**self.fingerprint, "kept": wanted})

        def compute(blocks: Stages) -> dict[str, Tensor]:
            stages = BlockStages(blocks, len(self.scoring.train))
            exact = exact_scores(self.scoring, positions, stages)
            return exact | extremes(exact["values"], positions, count)

        kept._keep(compute)
        found = TopScores.load(kept._path)
        check_layout(kept._path, {"values": found.values}, {"values": (None, tuple(positions.shape))})
        return self._convergence_said(found)

    def of_tokens(self, top: int | None, overwrite: bool) -> TokenScores:
        """Those of tokens: of each query's highest and lowest pairs, or of all for None; sequence scores are kept."""
        folder = within(self.run, "scores", f"{self.name}.{'all' if top is None else f'top{top}'}.tokens")
        wanted = "all pairs" if top is None else f"the {top} highest and lowest of each query"
        fingerprint = {**self.fingerprint, "pairs": wanted}
        stages = Stages(folder, fingerprint, self.profile)
        if overwrite:
            stages.clear()

        def compute(_: Partial) -> dict[str, Tensor]:
            tokens = TokenScoring(self.scoring)
            tokens.check_disk(folder, top)
            pairs = None if top is None else extreme_pairs(self._any_scores().values, top)
            return tokens.all_pairs(pairs, TokenParts(folder, fingerprint, self.profile))

        stages.keep(INDEX, compute)
        return TokenScores.load(folder)

    def _any_scores(self) -> Scores:
        """Those of all pairs; what is there with more kept beside the same values is as good."""
        path = self._path
        there = self.scoring.ranks.first(
            lambda: path.exists() and of_values(read_manifest(path)["fingerprint"]) == self.fingerprint
        )
        return self._convergence_said(Scores.load(path)) if there else self.scores()

    def _convergence_said(self, found: Kind) -> Kind:
        """Scores, with a warning if they are of solves that are no solutions, also when they were there."""
        options = self.scoring.options
        if options.solver is not None and found.residuals is not None and self.scoring.ranks.is_main:
            said = not_converged(found.residuals, options.solver, self.fingerprint["damping"])
            if said is not None:
                logger.warning(said)
        return found

    def self_influence(self) -> Tensor:
        """Each training example's score with itself, [train]; kept in a folder of its own."""
        stages = Stages(within(self.run, "self_influence"), self.fingerprint, self.profile)
        if self.scoring.options.overwrite:
            stages.forget(self.name)
        stages.ranks.first(lambda: log_others(stages.folder / self.name, self.fingerprint))
        kept = stages.keep(self.name, self.scoring.train_self_influence)
        found, shape = kept.load(), (len(self.scoring.train),)
        layout: Layout = {SELF_INFLUENCE: (None, shape), SQUARED_NORM: (None, shape)}
        check_layout(kept.path, found, layout)
        return found[SELF_INFLUENCE]

    def _keep(self, compute: Callable[[Stages], dict[str, Tensor]]) -> None:
        """As `keep_scores`."""
        keep_scores(self.run, self.name, self.fingerprint, self.profile, self.scoring.options.overwrite, compute)


def keep_scores(
    run: Path,
    name: str,
    fingerprint: Fingerprint,
    profile: Profile,
    overwrite: bool,
    compute: Callable[[Stages], dict[str, Tensor]],
) -> Path:
    """Have scores in a run directory, computed unless they are there.

    Args:
        compute: makes their tensors, and may keep blocks in the stages that it is given.

    Returns:
        Where they are.
    """
    path = within(run, "scores", name)
    blocks = Stages(within(path.parent, f"{name}.blocks"), fingerprint, profile)
    stages = Stages(path.parent, fingerprint, profile)
    if overwrite:
        blocks.clear()
        stages.forget(name)
    stages.ranks.first(lambda: log_others(path, fingerprint))
    stages.keep(name, lambda _: compute(blocks))
    blocks.clear()
    return path
