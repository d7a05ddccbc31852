"""The same decay at every step."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_decay, register


@register
@dataclass(frozen=True)
class constant:
    """``decay ** (t1 - t0)``.

    Args:
        decay: share that one unit of progress leaves, in [0, 1].
        unit: unit of the clock.

    >>> constant(0.5).retention(0, 3)
    0.125
    """

    decay: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.constant")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.decay ** (t1 - t0))
