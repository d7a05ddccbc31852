"""The (1 + n) / (10 + n) ramp that diffusers, torch_ema and LitEma share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardema.schedules.base import check_decay, register, whole_steps


@register
@dataclass(frozen=True)
class ramp:
    """Step n = 1, 2, ... decays by ``min(decay, (1 + n) / (10 + n))``.

    The product of (1 + n) / (10 + n) over n in (a, b] telescopes to the product of
    ``(a + k) / (b + k)`` over k = 2 ... 10, so any interval of whole steps has a closed form.

    Args:
        decay: the decay that the ramp ends in, in [0, 1].

    >>> ramp(0.9999).retention(0, 1) == 2 / 11
    True
    """

    decay: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.ramp")

    def retention(self, t0: float, t1: float) -> float:
        a, b = whole_steps(t0, t1, "schedules.ramp")
        end = self._end()
        if b == a + 1:
            return float(min(self.decay, (1 + b) / (10 + b)))
        ramped = math.prod((min(a, end) + k) / (min(b, end) + k) for k in range(2, 11))
        return float(ramped * self.decay ** (max(b, end) - max(a, end)))

    def _end(self) -> float:
        """The last step whose ramp is not above ``decay``."""
        if self.decay == 1:
            return math.inf
        end = max(0, math.floor((10 * self.decay - 1) / (1 - self.decay)) + 1)
        while end > 0 and (1 + end) / (10 + end) > self.decay:
            end -= 1
        return end
