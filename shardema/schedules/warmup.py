"""The inverse-gamma warm-up that timm, diffusers and ema-pytorch share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardema.schedules.base import check_decay, check_positive, register, whole_steps

_CHUNK = 1 << 16  # steps multiplied at a time, so that a long interval needs little memory


@register
@dataclass(frozen=True)
class warmup:
    """Step n = 1, 2, ... decays by ``min(decay, 1 - (1 + n / inv_gamma) ** -power)``.

    The rule is Katherine Crowson's; power 2/3 suits runs of a million steps and more, 3/4
    shorter ones (decay 0.999 is reached at step 10 k, 0.9999 at 215 k).

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

    def retention(self, t0: float, t1: float) -> float:
        a, b = whole_steps(t0, t1, "schedules.warmup")
        kept = 1.0
        while a < b:
            if self._rule(a + 1) >= self.decay:  # the rule only grows: the rest is constant
                return float(kept * self.decay ** (b - a))
            stop = min(b, a + _CHUNK)
            steps = np.arange(a + 1, stop + 1, dtype=np.float64)
            rule = 1 - (1 + steps / self.inv_gamma) ** -self.power
            kept *= float(np.prod(np.minimum(rule, self.decay)))
            a = stop
        return kept

    def _rule(self, step: int) -> float:
        return float(1 - (1 + step / self.inv_gamma) ** -self.power)
