"""A half-life that moves from one value to another, in a straight line or along a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shardema.schedules.base import check_positive, register


@register
@dataclass(frozen=True)
class half_life_ramp:
    """``0.5 ** (integral of dt / h(t) from t0 to t1)`` for a half-life h(t) that moves.

    With x = t / over, up to ``over`` ``h = begin + (end - begin) * x`` (linear) or
    ``h = end + (begin - end) * (1 + cos(pi * x)) / 2`` (cosine), and ``end`` after it. Both
    integrals are in closed form, so any interval is exact.

    Args:
        begin: half-life at progress 0, in ``unit``, above 0.
        end: half-life from progress ``over`` on.
        over: progress in which it moves.
        shape: ``"linear"`` or ``"cosine"``.
        unit: unit of the clock.

    >>> round(half_life_ramp(10, 1000, over=100).retention(100, 1100), 12)
    0.5
    """

    begin: float
    end: float
    over: float
    shape: Literal["linear", "cosine"] = "linear"
    unit: str = "step"

    def __post_init__(self) -> None:
        for name in ("begin", "end", "over"):
            check_positive(getattr(self, name), f"schedules.half_life_ramp, {name}")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(
                f"schedules.half_life_ramp: got shape={self.shape!r}, expected 'linear' or 'cosine'"
            )

    def retention(self, t0: float, t1: float) -> float:
        halvings = self._halvings(t1) - self._halvings(t0)
        return float(0.5 ** max(0.0, halvings))  # rounding may take a tiny interval below zero

    def _halvings(self, t: float) -> float:
        """How often the past was halved between 0 and t."""
        x = min(1.0, t / self.over)
        after = max(0.0, t - self.over) / self.end
        if self.shape == "cosine":
            half = math.pi * x / 2
            angle = math.atan2(
                math.sqrt(self.end) * math.sin(half), math.sqrt(self.begin) * math.cos(half)
            )
            ramped = 2 * self.over * angle / (math.pi * math.sqrt(self.begin * self.end))
        elif self.begin == self.end:
            ramped = x * self.over / self.end
        else:
            slope = (self.end - self.begin) / self.over
            ramped = math.log1p(slope * x * self.over / self.begin) / slope
        return ramped + after
