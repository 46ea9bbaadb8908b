"""TracIn: scores at several checkpoints of a training, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from wherefrom.engine.loading import Examples
from wherefrom.methods.checkpoints import chosen_checkpoints, named_paths, sum_settings, weighted_sum
from wherefrom.methods.factored import Dot, Factored
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.keep import Keep, Pairs
from wherefrom.store.cache import Unfinished
from wherefrom.store.fingerprint import MODEL

if TYPE_CHECKING:
    from wherefrom.methods.method import Checkpoint


@dataclass(frozen=True, kw_only=True)
class TracIn(Method):
    """Scores at each of several checkpoints, added up: `sum_k weight_k scores_k`.

    With dot products and learning rates as weights this is TracInCP (Pruthi et al. 2020, arXiv 2002.08484):
    `sum_k eta_k g(theta_k, query) . g(theta_k, example)`, with losses summed over tokens. Other methods with factors
    fit them at each checkpoint. Each part is in `RUN/checkpoints/CHECKPOINT/scores`, and serves other sums too.

    Attributes:
        scored: what is scored at each checkpoint.
        checkpoints: directories that `save_pretrained` or a Trainer wrote (of a whole model, or of the study's
            adapter), single files of weights (safetensors or torch), or what `read_recording` returned; None is the
            study's history.
        weights: one for each checkpoint; None is the learning rates that were recorded, and for paths 1.
    """

    scored: Factored = field(default_factory=Dot)
    checkpoints: Sequence[Checkpoint] | None = None
    weights: Sequence[float] | None = None

    name: ClassVar[str] = "tracin"

    def check(self, keep: Keep[Any], half_precision: bool) -> None:
        super().check(keep, half_precision)
        self.scored.check(Pairs(), half_precision)

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        checkpoints = chosen_checkpoints(context, self.checkpoints)
        paths, weights = named_paths(checkpoints), self._weights(checkpoints)
        if self.scored.factors is not None:
            raise InputError("scored: has factors of its own, and each checkpoint needs others. Leave them out.")
        parts: dict[str, Mapping[str, str]] = {}
        for checkpoint, path in paths.items():
            with context.states.entered(path):
                there = context.at(checkpoint, path)
                settings = self.scored.settings(there, self.scored.fit(there))
                parts[checkpoint] = {"models": there.fingerprint[MODEL], "scored": self.scored.name, **settings}

        def compute(result: Unfinished) -> Mapping[str, Tensor]:
            found = []
            for checkpoint, path in paths.items():
                with context.states.entered(path):
                    found.append(self.scored.score(context.at(checkpoint, path), queries.dataset, Pairs()))
            return weighted_sum(found, weights, result)

        label = "tracin" if self.scored.name == Dot.name else f"tracin-{self.scored.name}"
        return Job(label, sum_settings(parts, weights), compute, without=[MODEL])

    def _weights(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        if self.weights is None:
            return [1.0 if isinstance(each, str | Path) else each.learning_rate for each in checkpoints]
        if len(self.weights) != len(checkpoints):
            raise InputError(f"weights: {len(self.weights)} for {len(checkpoints)} checkpoints; expected one for each.")
        return [float(each) for each in self.weights]
