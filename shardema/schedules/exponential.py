"""The exponential ramp of the decay that ultralytics uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardema.schedules.base import check_decay, check_positive, register
from shardema.schedules.stepwise import stepwise


@register
@dataclass(frozen=True)
class exponential(stepwise):
    """Step n = 1, 2, ... decays by ``decay * (1 - exp(-n / tau))``.

    The rule of ultralytics' YOLO models, which take 0.9999 and 2000. Whole steps only.

    Args:
        decay: the decay that the ramp ends in, in [0, 1].
        tau: steps in which the distance to ``decay`` falls by the factor e, above 0.

    >>> round(exponential(0.9999, tau=2000).retention(1999, 2000), 4)
    0.6321
    """

    decay: float
    tau: float = 2000.0
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.exponential")
        check_positive(self.tau, "schedules.exponential, tau")

    def decay_at(self, step: int) -> float:
        return float(self.decay * -math.expm1(-step / self.tau))

    def settled(self) -> float:
        return 40 * self.tau  # exp(-40) is below half of the last bit of 1
