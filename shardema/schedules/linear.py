"""A decay that moves in a straight line from one value to another."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_count, check_decay, register
from shardema.schedules.stepwise import stepwise


@register
@dataclass(frozen=True)
class linear(stepwise):
    """Step n = 1, 2, ... decays by ``begin + (end - begin) * min(1, (n - 1) / (over - 1))``.

    Step 1 has ``begin``, step ``over`` and all later ones ``end``: the momentum warm-up of
    pytorch-ignite's EMAHandler, as decays. Whole steps only.

    Args:
        begin: decay of the first step, in [0, 1].
        end: decay of the last step of the ramp and after it, in [0, 1].
        over: steps of the ramp, 1 or more.

    >>> [round(linear(0.5, 0.9, 5).retention(n, n + 1), 12) for n in range(6)]
    [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    """

    begin: float
    end: float
    over: int
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.begin, "schedules.linear, begin")
        check_decay(self.end, "schedules.linear, end")
        check_count(self.over, "schedules.linear, over")

    def decay_at(self, step: int) -> float:
        share = min(1.0, (step - 1) / max(1, self.over - 1))
        return float((1 - share) * self.begin + share * self.end)

    def settled(self) -> float:
        return self.over
