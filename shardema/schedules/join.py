"""One schedule after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardema.schedules.base import check_progress, register
from shardema.schedules.custom import as_schedule


@register
@dataclass(frozen=True)
class join:
    """The first schedule up to ``at[0]``, the second up to ``at[1]``, ..., the last for ever.

    The product of their retentions over the parts of the interval. Each counts its progress from
    its own beginning, so one that copies first, as ``power``, copies there.

    Args:
        schedules: two or more of one unit; schedules, decays or callables.
        at: progress at which the next one takes over, rising, one fewer than schedules.

    >>> join([0.5, 0.25], at=[2]).retention(1, 3)
    0.125
    """

    schedules: Sequence[Any]
    at: Sequence[float]

    def __post_init__(self) -> None:
        schedules, at = tuple(map(as_schedule, self.schedules)), tuple(self.at)
        for bound in at:
            check_progress(bound, "schedules.join, at")
        rising = all(a < b for a, b in itertools.pairwise((0.0, *at)))
        if len(at) != len(schedules) - 1 or not at or not rising:
            raise ValueError(
                f"schedules.join: got {len(schedules)} schedules and at={list(at)}, expected "
                "rising progress above 0, one fewer than schedules"
            )
        units = sorted({schedule.unit for schedule in schedules})
        if len(units) > 1:
            raise ValueError(f"schedules.join: got schedules in {units}, expected one unit")
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "at", at)

    @property
    def unit(self) -> str:
        """Unit of the clock."""
        return str(self.schedules[0].unit)

    def retention(self, t0: float, t1: float) -> float:
        kept = 1.0
        begins, ends = (0.0, *self.at), (*self.at, float("inf"))
        for schedule, begin, end in zip(self.schedules, begins, ends, strict=True):
            a, b = max(t0, begin), min(t1, end)
            if a < b:
                kept *= schedule.retention(a - begin, b - begin)
        return float(kept)
