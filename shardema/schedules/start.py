"""Another beginning for a schedule: later, with copies until then, or further on."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_progress, register
from shardema.schedules.nested import nested


@register
@dataclass(frozen=True)
class start(nested):
    """Copies the weights up to and at progress ``at``, then ``schedule`` from its own beginning.

    ``0`` for ``t0 < at``, else ``schedule.retention(t0 - at, t1 - at)``.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        at: the last progress at which an update copies, 0 or more.

    >>> rule = start(0.5, at=2)
    >>> [rule.retention(t, t + 1) for t in range(4)]
    [0.0, 0.0, 0.5, 0.5]
    """

    at: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_progress(self.at, "schedules.start, at")

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        if t0 < self.at:
            return 0.0
        return float(self.schedule.retention(t0 - self.at, t1 - self.at))


@register
@dataclass(frozen=True)
class shift(nested):
    """``schedule.retention(t0 + by, t1 + by)``: the run was ``by`` further on when it began.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        by: progress that is added to the clock, 0 or more.

    >>> from shardema.schedules import power
    >>> shift(power(gamma=0), by=2).retention(0, 1) == 2 / 3
    True
    """

    by: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_progress(self.by, "schedules.shift, by")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.schedule.retention(t0 + self.by, t1 + self.by))
