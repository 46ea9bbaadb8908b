"""How a person reads a query's scores: as predicted rises of its loss, or where there is no such scale, by their order.

This module knows numbers and words; it must not know texts or how they are laid out.
"""

from __future__ import annotations

from dataclasses import dataclass

from wherefrom.runtime.errors import printable
from wherefrom.scoring.results import Scores, TopScores
from wherefrom.scoring.tokens import TopChunks

_RISE = (
    "predicted rise of the query's loss if the example had been left out, in {unit}: to first order, of one at a time"
)
# A fingerprint with factors and no solver; the leaderboard has the figures.
_BY_FACTORS = ". By fitted factors alone it is far too large, so compare within the query"
_CONTRAST = (
    "predicted rise of the answer's loss less that of the other answer, each summed over its tokens, if the example "
    "had been left out, in {unit}: to first order, of one at a time"
)
_WITHOUT_CURVATURE = ("dot", "cosine")  # whose damping changes nothing
_RELATIVE = (
    "score as a part of the query's largest: scores of {method} have no scale beyond their order, so compare ranks"
)


@dataclass(frozen=True)
class Reading:
    """What a query's scores are shown as.

    Attributes:
        heading: of a column.
        meaning: what that is, in a sentence without an end.
        factor: what a score is multiplied with.
    """

    heading: str
    meaning: str
    factor: float

    def __call__(self, score: float) -> str:
        """A score as it is shown."""
        value = self.factor * score
        # Of four digits and more none becomes an exponent; the point that #g leaves behind three is taken away.
        return f"{value:+,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:+#,.3g}".removesuffix(".")


def reading(scores: Scores | TopScores | TopChunks, query: int = 0) -> Reading:
    """How the scores of a query are read; their words may come from somebody else's file."""
    if scores.rise_per_score is not None:
        factor = float(scores.rise_per_score[query])
        unit = printable(scores.unit)
        return Reading(f"Rise, {unit}", _RISE.format(unit=unit) + _caveat(scores), factor)
    ends = [scores.values] if isinstance(scores, Scores) else [scores.values, scores.lowest_values]
    largest = max(float(each[query].abs().max()) for each in ends)
    method = scores.fingerprint.get("normalized") or scores.fingerprint.get("method", "this kind")
    method = f"sketches of {method}" if scores.fingerprint.get("re-ranked") == "0" else method
    return Reading("Of largest", _RELATIVE.format(method=printable(method)), 1 / largest if largest > 0 else 0.0)


def contrast_reading(scores: Scores | TopScores, tokens: int) -> Reading:
    """How the scores of an answer less those of another are read, which have a rise.

    Args:
        tokens: counted in the answer, the first query.
    """
    assert scores.rise_per_score is not None
    unit = printable(scores.unit.removesuffix(" a token"))
    factor = float(scores.rise_per_score[0]) * tokens
    return Reading(f"Rise, {unit}", _CONTRAST.format(unit=unit) + _caveat(scores), factor)


def computed_by(scores: Scores | TopScores | TopChunks) -> str:
    """The method of scores, and its solver and damping where it has them."""
    solver, damping = (scores.fingerprint.get(name, "") for name in ("solver", "damping"))
    damping = damping if solver or scores.method not in _WITHOUT_CURVATURE else ""
    return ", ".join(filter(None, (scores.method, solver.partition("(")[0], damping and f"damping {damping}")))


def _caveat(scores: Scores | TopScores | TopChunks) -> str:
    return _BY_FACTORS * ("factors" in scores.fingerprint and "solver" not in scores.fingerprint)
