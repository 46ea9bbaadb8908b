"""A template: copy it to `src/wherefrom/methods/NAME.py`, and fill in what is marked with FILL.

Say here what the method is, in a sentence, with the paper and its equation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from wherefrom.curvature.factors import STRATEGIES
from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples
from wherefrom.methods.method import Context, Job, Method
from wherefrom.runtime.errors import InputError
from wherefrom.scoring.keep import Keep
from wherefrom.scoring.scoring import Scoring


@dataclass(frozen=True, kw_only=True)
class Template(Method):  # FILL: the name
    """FILL: what a score is, as a formula, what it costs, and what it is good for (AUTHORS YEAR, arXiv NUMBER).

    Attributes:
        damping: FILL: every field is a part of what a result is, and a flag of `wherefrom score`.

    Raises:
        InputError: a field is impossible.
    """

    damping: float = 1.0

    name: ClassVar[str] = "template"  # FILL: the word of `wherefrom score`, and what results are called

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"damping={self.damping}: expected a number above 0.")

    def job(self, context: Context[Any], queries: Examples[Any], keep: Keep[Any]) -> Job:
        # FILL: what query gradients are multiplied with before they meet training gradients; nothing in this template.
        # A method that is no product of gradients makes tensors by itself: `compute` is given the `Unfinished` result,
        # and returns {"values": [queries, train]}, or puts them block by block into `result.blocks(...)`.
        operator = Operator(bases={}, filters={})
        scoring = Scoring(context.sweep, STRATEGIES["identity"], operator, queries, context.train)
        settings = {"damping": repr(self.damping), "precision": str(context.sweep.precision)}
        return Job(label=self.name, settings=settings, compute=scoring.pairwise)
