"""Bias correction as a schedule: the average forgets the weights that it was built with."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import register
from shardema.schedules.nested import nested


@register
@dataclass(frozen=True)
class debiased(nested):
    """``r(t0, t1) * (1 - r(0, t0)) / (1 - r(0, t1))`` for the retention r of ``schedule``.

    An average that starts at zero and is divided by ``1 - r(0, t)`` (Kingma and Ba 2015, arXiv
    1412.6980, section 3) follows exactly these decays, without any state:
    ``1 - (1 - r(t0, t1)) / (1 - r(0, t1))``, so the first update copies. For a constant decay d
    that is ``1 - (1 - d) / (1 - d ** n)`` at step n.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``; a callable must be
            multiplicative, since it is asked for ``r(0, t)``.

    >>> [round(debiased(0.5).retention(n - 1, n), 4) for n in (1, 2, 3)]
    [0.0, 0.3333, 0.4286]
    """

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        present = 1 - self.schedule.retention(0, t1)
        if present == 0:  # nothing was forgotten since the beginning, so there is no bias
            return 1.0
        before = 1 - self.schedule.retention(0, t0)
        return float(min(1.0, self.schedule.retention(t0, t1) * before / present))
