"""How far scores go from factors towards the curvature itself, and in which form query gradients wait for them.

This module knows no model and no data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from wherefrom.curvature.solvers.solver import Solver
from wherefrom.runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What a score with factors depends on, beside the factors.

    Attributes:
        damping: added to every eigenvalue; None adds 0.1 x the mean eigenvalue of each layer.
        solver: goes on from what the factors give to the inverse of the damped Gauss-Newton matrix itself; slow. None
            takes what the factors give.
        query_rank: keep each layer's preconditioned query gradient as two matrices of this rank, so that more queries
            fit into memory; `Scores.query_errors` says what that leaves out. None keeps them whole.
        query_bits: 8 keeps whole query gradients as integers of that size, with a scale for each output of each layer
            and query: half of bfloat16's memory. `Scores.query_errors` says what the rounding leaves out.
        rescore: with a query rank or query bits, how many of each query's highest scores are computed again with whole
            gradients of the products' type.

    Raises:
        InputError: one of them is impossible, or two do not go together.
    """

    damping: float | None = None
    solver: Solver | None = None
    query_rank: int | None = None
    query_bits: int | None = None
    rescore: int = 0

    def __post_init__(self) -> None:
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise InputError(f"damping={self.damping}: expected a number >= 0, or None for 0.1 x the mean eigenvalue.")
        if self.query_rank is not None and self.query_rank < 1:
            raise InputError(f"query_rank={self.query_rank}: expected at least 1, or None for whole gradients.")
        if self.query_bits not in (None, 8):
            raise InputError(f"query_bits={self.query_bits}: expected 8, or None for numbers of the products' type.")
        if self.query_bits is not None and self.query_rank is not None:
            raise InputError(
                f"query_bits={self.query_bits} with query_rank={self.query_rank}: matrices of low rank are not stored "
                "as integers. Leave one of them out."
            )
        if self.rescore < 0 or (self.rescore and not self.compressed):
            raise InputError(
                f"rescore={self.rescore}: expected at least 1 together with a query_rank or query_bits, or 0."
            )
        self._check_solver()

    def _check_solver(self) -> None:
        if self.solver is None:
            return
        if not isinstance(self.solver, Solver):
            raise InputError(
                f"solver={self.solver!r}: expected GradientFlow(...), ConjugateGradients(...), Astra(...) or None."
            )
        for name in ("query_rank", "query_bits"):
            if getattr(self, name):
                raise InputError(
                    f"{name}={getattr(self, name)!r} with a solver, whose solutions are whole. Leave one of them out."
                )
        if self.damping == 0:
            raise InputError("damping=0 with a solver: curvature alone has no inverse. Give a number above 0, or None.")

    @property
    def compressed(self) -> bool:
        """Whether something is left out of query gradients."""
        return self.query_rank is not None or self.query_bits is not None

    def whole(self) -> Approximation:
        """The same with whole query gradients."""
        return replace(self, query_rank=None, query_bits=None, rescore=0)

    @property
    def label(self) -> str:
        """What the name of a result says of it; begins with a hyphen, or is empty."""
        parts = [
            self.solver.label if self.solver else "",
            f"rank{self.query_rank}" if self.query_rank else "",
            f"{self.query_bits}bit" if self.query_bits else "",
        ]
        return "".join(f"-{part}" for part in parts if part)

    def approximation_settings(self) -> dict[str, str]:
        """What a fingerprint says of it."""
        found = {"damping": "0.1 x mean eigenvalue" if self.damping is None else repr(self.damping)}
        again = f", the top {self.rescore} whole" if self.rescore else ""
        if self.query_rank is not None:
            found["query rank"] = f"{self.query_rank}{again}"
        if self.query_bits is not None:
            found["query bits"] = f"{self.query_bits}{again}"
        if self.solver is not None:
            found["solver"] = repr(self.solver)
        return found
