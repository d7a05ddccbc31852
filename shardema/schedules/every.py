"""An average that moves at some calls only."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_count, register
from shardema.schedules.nested import nested
from shardema.schedules.stepwise import stepwise


@register
@dataclass(frozen=True)
class every(nested, stepwise):
    """The average moves at the steps ``first``, ``first + k``, ``first + 2 k``, ... only.

    The decay there is that of one step, ``schedule.retention(n - 1, n)``, so a larger ``k`` makes
    a longer average, as most libraries have it. ``compensated=True`` takes the whole interval
    since the last move, ``schedule.retention(n - k, n)``: the average is as long as for ``k=1``.
    Whole steps only.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        k: steps between two moves, 1 or more.
        first: the first step that moves the average, 1 or more.
        compensated: whether a move forgets as much as ``k`` steps.

    >>> rule = every(0.5, 3)
    >>> [rule.retention(n - 1, n) for n in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """

    k: int
    first: int = 1
    compensated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "schedules.every, k")
        check_count(self.first, "schedules.every, first")

    def decay_at(self, step: int) -> float:
        if step < self.first or (step - self.first) % self.k:
            return 1.0
        since = step - 1
        if self.compensated:
            since = 0 if step == self.first else step - self.k
        return float(self.schedule.retention(since, step))
