"""Cases that hypothesis draws by the thousand, from a seed."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, seed, settings


def drawn(count: int, number: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Run what `given` has decorated on `count` cases from the seed `number`; the first that fails is made small."""
    chosen = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(number)(chosen(test))
