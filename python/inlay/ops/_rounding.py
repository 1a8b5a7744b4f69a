"""Where eager code rounds to a 16-bit dtype, for the ops that give its numbers. docs/numerics.md says more."""

from __future__ import annotations

from enum import IntEnum


class Rounding(IntEnum):
    """Mirrors ``inlay::Rounding`` in csrc/common/rounding.h."""

    ONCE = 0
    STEPWISE = 1


# Plain integers: torch takes 3 us longer to convert the members of an enum.
ROUNDING = {"once": int(Rounding.ONCE), "stepwise": int(Rounding.STEPWISE)}
