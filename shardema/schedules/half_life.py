"""A decay given by the progress after which half of the average is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_positive, register


@register
@dataclass(frozen=True)
class half_life:
    """``0.5 ** ((t1 - t0) / length)``.

    Args:
        length: progress that halves the weight of the past, in ``unit``, above 0.
        unit: unit of the clock.

    >>> half_life(1000).retention(0, 2000)
    0.25
    """

    length: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_positive(self.length, "schedules.half_life, length")

    def retention(self, t0: float, t1: float) -> float:
        return float(0.5 ** ((t1 - t0) / self.length))
