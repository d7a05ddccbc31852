"""Bounds for the decay of each step, as `min_decay` in several libraries."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_decay, register
from shardema.schedules.nested import nested
from shardema.schedules.stepwise import stepwise


@register
@dataclass(frozen=True)
class clip(nested, stepwise):
    """Step n decays by ``max(min_decay, min(max_decay, schedule.retention(n - 1, n)))``.

    A step is one unit of the clock, and an interval the product of its steps. Whole steps only.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        min_decay: in [0, 1].
        max_decay: in [0, 1], not below ``min_decay``.

    >>> from shardema.schedules import ramp
    >>> clip(ramp(0.9999), min_decay=0.5).retention(0, 1)
    0.5
    """

    min_decay: float = 0.0
    max_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.min_decay, "schedules.clip, min_decay")
        check_decay(self.max_decay, "schedules.clip, max_decay")
        if self.min_decay > self.max_decay:
            raise ValueError(
                f"schedules.clip: got min_decay={self.min_decay} above max_decay={self.max_decay}"
            )

    def decay_at(self, step: int) -> float:
        decay = float(self.schedule.retention(step - 1, step))
        return float(max(self.min_decay, min(self.max_decay, decay)))
