"""Whether the patched model's numbers agree with the unpatched one's, by a yardstick measured in the same run.

Two correct ways to compute one formula differ by rounding, and a model makes more or less of that: training amplifies
it step by step. So the run includes a third model, unpatched, whose weights were moved by one unit in the last place.
Its distance from the unpatched model is what rounding does here; the patched model may be ``FACTOR`` times as far away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

FACTOR = 8.0


@dataclass(frozen=True)
class Check:
    """One comparison: how far patched and unpatched lie apart, and how far rounding takes them."""

    name: str
    difference: float
    rounding: float
    """The nudged model's distance, or one unit in the last place of what is compared if that is more."""

    @property
    def ratio(self) -> float:
        if self.difference == 0:
            return 0.0
        return self.difference / self.rounding if self.rounding else math.inf

    @property
    def passed(self) -> bool:
        """False if any of the numbers is NaN."""
        return self.ratio <= FACTOR


def worst(checks: Iterable[Check]) -> Check:
    """The check with the greatest ratio; one that is NaN above all."""
    return max(checks, key=lambda check: (math.isnan(check.ratio), check.ratio))
