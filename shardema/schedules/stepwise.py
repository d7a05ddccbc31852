"""Schedules defined per step: the retention of an interval is a product, cached by blocks.

::

    steps   1 ... 64 | 65 ... 128 | ...         a block is the product of 64 smaller ones
            |  64 ^ 1             | 64 ^ 1
            |  64 ^ 2 ...                       so an interval needs few factors, however long
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from shardema.errors import ArgumentError
from shardema.schedules.base import (
    check_count,
    check_decay,
    check_positive,
    check_progress,
    register,
    whole_steps,
)

_SPAN = 64


class Stepwise(ABC):
    """A schedule of whole steps n = 1, 2, ..., each with its own decay. Subclasses are hashable."""

    @abstractmethod
    def decay_at(self, step: int) -> float:
        """The decay of the update that advances the clock to ``step``, in [0, 1]."""

    def settled(self) -> float:
        """A step after which every decay is the same; infinite if there is none."""
        return math.inf

    def retention(self, t0: float, t1: float) -> float:
        a, b = whole_steps(t0, t1, f"schedules.{type(self).__name__}")
        if b == a + 1:
            return float(self.decay_at(b))
        end = self.settled()
        if end >= b:
            return _product(self, a, b)
        last = max(a, int(end))
        return _product(self, a, last) * float(self.decay_at(last + 1)) ** (b - last)


def _product(rule: Stepwise, a: int, b: int) -> float:
    """The product of the decays of the steps in (a, b]."""
    kept = 1.0
    while a < b and kept:
        size = 1
        while a % (size * _SPAN) == 0 and a + size * _SPAN <= b:
            size *= _SPAN
        kept *= _block(rule, a, size) if size > 1 else rule.decay_at(a + 1)
        a += size
    return kept


@functools.lru_cache(maxsize=1 << 14)
def _block(rule: Stepwise, a: int, size: int) -> float:
    """The product over (a, a + size]; ``size`` is a power of 64 and divides ``a``."""
    part = size // _SPAN
    if part == 1:
        return math.prod(rule.decay_at(step) for step in range(a + 1, a + size + 1))
    return math.prod(_block(rule, start, part) for start in range(a, a + size, part))


@register
@dataclass(frozen=True)
class exponential(Stepwise):
    """Step n = 1, 2, ... decays by ``decay * (1 - exp(-n / tau))``.

    The rule of ultralytics' YOLO models, with 0.9999 and 2000. Whole steps only.

    Args:
        decay: the decay at the end of the ramp, in [0, 1].
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


@register
@dataclass(frozen=True)
class linear(Stepwise):
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


@register
@dataclass(frozen=True)
class warmup(Stepwise):
    """Step n = 1, 2, ... decays by ``min(decay, 1 - (1 + n / inv_gamma) ** -power)``.

    The rule is Katherine Crowson's; power 2/3 suits runs of a million steps and more, 3/4
    shorter ones (decay 0.999 is reached at step 10 k, 0.9999 at 215 k). Whole steps only.

    Args:
        decay: the decay at the end of the warm-up, in [0, 1].
        inv_gamma: length scale of the warm-up, in steps, above 0.
        power: exponent of the warm-up, above 0.

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
        log = -math.log1p(-self.decay) / self.power  # log of 1 + n / inv_gamma at the end
        return self.inv_gamma * math.expm1(log) + 2 if log < 700 else math.inf


@register
@dataclass(frozen=True)
class bema(Stepwise):
    """Step n = 1, 2, ... decays by ``1 - max(min_weight, (lag + multiplier * n) ** -power)``.

    The average inside of BEMA (Block and Zhang 2025, arXiv 2508.00180, with kappa, rho and gamma
    for power, lag and multiplier), to which BEMA adds a multiple of the way from the initial
    weights. Whole steps only.

    Args:
        power: exponent kappa, 0 or more.
        lag: rho, 0 or more.
        multiplier: gamma, above 0; ``lag + multiplier`` is 1 or more.
        min_weight: least weight of the current step, in [0, 1].

    >>> bema(power=0.5, lag=8).retention(0, 1) == 1 - 9**-0.5
    True
    """

    power: float = 0.5
    lag: float = 10
    multiplier: float = 1.0
    min_weight: float = 0.0
    unit: str = "step"

    def __post_init__(self) -> None:
        check_progress(self.power, "schedules.bema, power")
        check_progress(self.lag, "schedules.bema, lag")
        check_positive(self.multiplier, "schedules.bema, multiplier")
        check_decay(self.min_weight, "schedules.bema, min_weight")
        if self.lag + self.multiplier < 1:
            raise ArgumentError(
                f"schedules.bema: got lag={self.lag!r} and multiplier={self.multiplier!r}, "
                "expected a sum of 1 or more, so that no weight is above 1"
            )

    def decay_at(self, step: int) -> float:
        weight = (self.lag + self.multiplier * step) ** -self.power
        return float(1 - max(self.min_weight, weight))
