"""The inverse-gamma warm-up that timm, diffusers and ema-pytorch share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardema.schedules.base import check_decay, check_positive, register
from shardema.schedules.stepwise import stepwise


@register
@dataclass(frozen=True)
class warmup(stepwise):
    """Step n = 1, 2, ... decays by ``min(decay, 1 - (1 + n / inv_gamma) ** -power)``.

    The rule is Katherine Crowson's; power 2/3 suits runs of a million steps and more, 3/4
    shorter ones (decay 0.999 is reached at step 10 k, 0.9999 at 215 k). Whole steps only.

    Args:
        decay: the decay that the warm-up ends in, in [0, 1].
        inv_gamma: stretches the warm-up, in steps, above 0.
        power: bends it, above 0.

    >>> round(warmup(0.9999).retention(0, 1), 4)
    0.37
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2 / 3
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.warmup")
        check_positive(self.inv_gamma, "schedules.warmup, inv_gamma")
        check_positive(self.power, "schedules.warmup, power")

    def decay_at(self, step: int) -> float:
        return float(min(self.decay, 1 - (1 + step / self.inv_gamma) ** -self.power))

    def settled(self) -> float:
        if self.decay == 1:
            return math.inf
        log = -math.log1p(-self.decay) / self.power  # of 1 + n / inv_gamma at the end
        return self.inv_gamma * math.expm1(log) + 2 if log < 700 else math.inf
