"""Which sweeps a fit takes: one for covariances, whose eigenvectors are the basis, and one for eigenvalues in it.

This module brings collectors, sweeps and the cache together; it does not know what factors are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from wherefrom.curvature.collectors import CovarianceCollector, EigenvalueCollector, GradientCovarianceCollector
from wherefrom.curvature.damping import check_covariances, check_mean_squares
from wherefrom.curvature.eigen import eigenvectors, finite_sum
from wherefrom.curvature.factors import STRATEGIES, Factors, Strategy, bases_from_tensors, bases_to_tensors, fit_steps
from wherefrom.curvature.operators import Basis
from wherefrom.engine.loading import Examples
from wherefrom.engine.sweep import Sweep
from wherefrom.runtime.errors import InputError
from wherefrom.store.artifacts import Layout
from wherefrom.store.cache import Cache, Unfinished
from wherefrom.store.space import check_space, used_bytes
from wherefrom.tasks.task import Batch


@dataclass(frozen=True)
class Fitting(Generic[Batch]):
    """Factors to fit on training examples.

    Attributes:
        examples: with the training loss, or with targets that are drawn from the model.
        cache: where they are stored.
        overwrite: begin anew, whatever is there.
        scaling: P^(1/2) [out, in] of every layer, to fit factors of gradients P^(1/2) * G; empty for those as they are.
    """

    sweep: Sweep[Batch]
    examples: Examples[Batch]
    cache: Cache
    overwrite: bool = False
    scaling: Mapping[str, Tensor] = field(default_factory=dict)

    def factors(self, name: str) -> Factors:
        """Those of a strategy; what strategies have in common is computed once.

        Raises:
            InputError: a basis of tokens' covariances is wanted of conditioned gradients.
        """
        strategy = STRATEGIES[name]
        if self.scaling and strategy.basis == "covariances":
            raise InputError(
                f"strategy={name!r} with a conditioning: conditioned gradients are no products of activations and "
                "output gradients, so their covariances have no basis for them. Use 'shampoo', 'diagonal' or "
                "'identity'."
            )
        self.sweep.ranks.first(lambda: self._check_disk(strategy))
        if self.overwrite:
            # Eigenvalues, even where they are not wanted now, belong to the basis that is being replaced, and go before
            # it. All of it at once, so that an interrupted fit goes on when it is called without this.
            self.cache.forget(*strategy.stages)
        bases = self.bases(strategy, partial(self.covariances, strategy)) if strategy.basis else {}
        eigenvalues: dict[str, Tensor] = {}
        if strategy.eigenvalues == "fitted":
            eigenvalues = self.mean_squares(strategy, bases)
        elif strategy.eigenvalues == "product":
            eigenvalues = self.sweep.pinned({layer: each.eigenvalues() for layer, each in bases.items()})
        return Factors(name, self.cache.fingerprint, bases, eigenvalues, self.scaling)

    def _check_disk(self, strategy: Strategy) -> None:
        """Refuse to begin what there is too little disk space for; what is there already needs none."""
        sweep, folder = self.sweep, self.cache.folder
        steps = fit_steps(sweep.layers, strategy, sweep.dtype, sweep.ranks.count)
        there = set() if self.overwrite else {name for name in steps if (folder / name).exists()}
        if strategy.basis and strategy.stage("eigenbasis") in there:
            there.add(strategy.stage("covariance"))  # which is needed for nothing else
        elif strategy.basis:
            there.discard(strategy.stage("eigenvalues"))  # of another basis
        missing = {name: step for name, step in steps.items() if name not in there}
        if missing:
            begun = [path for name in missing for path in (folder / name, *folder.glob(f"{name}.part*"))]
            check_space(folder, list(missing.values()), used_bytes(begun))

    def covariances(self, strategy: Strategy) -> dict[str, Tensor]:
        """Of every layer, `LAYER.activations` and `LAYER.gradients`: what the strategy's basis is made of."""
        sweep = self.sweep

        def covariance(result: Unfinished) -> dict[str, Tensor]:
            target = sweep.layers, sweep.dtype, sweep.factors_device
            whole = strategy.basis == "gradients"
            collector = GradientCovarianceCollector(*target, self.scaling) if whole else CovarianceCollector(*target)
            self._run("covariance", collector, result)
            means = collector.means()
            check_covariances(means)
            return means

        return self.cache.get_or_compute(strategy.stage("covariance"), covariance, device=sweep.factors_device)

    def bases(self, strategy: Strategy, covariances: Callable[[], dict[str, Tensor]]) -> dict[str, Basis]:
        """The eigenvectors of every layer's covariances, which are computed where the basis is not there."""
        sweep = self.sweep

        def basis(_: Unfinished) -> dict[str, Tensor]:
            self.cache.forget(strategy.stage("eigenvalues"))  # those that are there belong to a basis that is gone
            means = covariances()
            with sweep.profile.action("eigendecomposition"):
                return self._diagonalized(means)

        stage, device = strategy.stage("eigenbasis"), sweep.factors_device
        found = self.cache.get_or_compute(stage, basis, self._basis_layout(), device)
        return bases_from_tensors(sweep.pinned(found))

    def _basis_layout(self) -> Layout:
        layout: dict[str, tuple[None, tuple[int, ...]]] = {}
        for name, layer in self.sweep.layers.items():
            factors = zip(("gradient", "activation"), layer.shape, layer.diagonal_factors, strict=True)
            for factor, size, diagonal in factors:
                layout[f"{name}.{factor}_eigenvalues"] = (None, (size,))
                if not diagonal:
                    layout[f"{name}.{factor}s"] = (None, (size, size))
        return layout

    def _diagonalized(self, covariances: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every layer's basis; on several processes each finds a part of them, of neighbours that may be equal."""
        ranks = self.sweep.ranks
        mine = ranks.share_of({name: sum(size**3 for size in each.shape) for name, each in self.sweep.layers.items()})
        with ranks.agreeing():
            chosen = {name: each for name, each in covariances.items() if name.rpartition(".")[0] in mine}
            bases = bases_to_tensors(diagonalize(chosen, mine, self.sweep.device))
        return ranks.all_gather(bases, self.sweep.factors_device)

    def mean_squares(self, strategy: Strategy, bases: dict[str, Basis]) -> dict[str, Tensor]:
        """Lambda of every layer: mean squared gradients in these bases, or as they are without one."""
        sweep = self.sweep

        def mean_squares(result: Unfinished) -> dict[str, Tensor]:
            collector = EigenvalueCollector(
                sweep.layers, bases, len(self.examples), sweep.dtype, sweep.factors_device, self.scaling
            )
            self._run("eigenvalues", collector, result)
            means = collector.means()
            check_mean_squares(means)
            return means

        layout: Layout = {name: (None, layer.shape) for name, layer in sweep.layers.items()}
        stage = strategy.stage("eigenvalues")
        return sweep.pinned(self.cache.get_or_compute(stage, mean_squares, layout, sweep.factors_device))

    def _run(self, name: str, collector: CovarianceCollector | EigenvalueCollector, result: Unfinished) -> None:
        size = self.sweep.execution.train_batch_size
        self.sweep.run(name, self.examples, collector, batch_size=size, partial=result.sums)


def diagonalize(covariances: Mapping[str, Tensor], layers: Iterable[str], device: torch.device) -> dict[str, Basis]:
    """The eigenvectors of every layer's covariances, found in float64 and returned in the covariances' dtype.

    Args:
        covariances: as `CovarianceCollector.means` gives them.
        device: where eigenvectors are found; they are returned on that of the covariances.

    Raises:
        LossError: a covariance is not finite.
    """
    diagonals = {name: each for name, each in covariances.items() if each.dim() == 1}
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        **eigenvectors({name: each for name, each in covariances.items() if name not in diagonals}, device)
    }
    for name, each in diagonals.items():
        finite_sum(each, name)
        found[name] = (each, None)
    bases = {}
    for layer in layers:
        (activation_values, activations), (gradient_values, gradients) = (
            found[f"{layer}.{factor}"] for factor in ("activations", "gradients")
        )
        bases[layer] = Basis(activations, gradients, activation_values, gradient_values)
    return bases
