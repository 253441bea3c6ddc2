"""The one number for a trial: the burst that the admissions amounted to, over all windows."""

from __future__ import annotations

from collections.abc import Iterable


def effective_burst(acts: Iterable[tuple[float, float]], rate: float) -> float:
    """Return the most that any window admitted above rate * its length; acts are (second, cost)."""
    worst = best = 0.0
    before = None
    for at, cost in sorted(acts):
        if before is not None:
            best = max(best - rate * (at - before), 0.0)
        best += cost
        worst = max(worst, best)
        before = at
    return worst
