"""The rule that EDM trained with: a half-life that is at most a share of the run so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardema.schedules.base import check_positive, register


@register
@dataclass(frozen=True)
class edm:
    """``0.5 ** (integral of dt / h(t) from t0 to t1)`` with ``h(t) = min(length, ratio * t)``.

    That is ``(t0 / t1) ** (log(2) / ratio)`` while ``ratio * t`` is below ``length``, and a
    half-life of ``length`` after it; the first update copies. The code of Karras et al. 2022
    (arXiv 2206.00364) takes the half-life at one end of each update; the integral is what that
    tends to for small batches, and is the same for any batch size.

    Args:
        length: half-life after the ramp, in ``unit``, above 0.
        ratio: half-life during the ramp, as a share of the progress so far, above 0; EDM trained
            with 0.05, and EDM2's traditional average takes 0.09.
        unit: unit of the clock.

    >>> edm(500_000).retention(10_000_000, 10_500_000)
    0.5
    """

    length: float
    ratio: float = 0.05
    unit: str = "sample"

    def __post_init__(self) -> None:
        check_positive(self.length, "schedules.edm, length")
        check_positive(self.ratio, "schedules.edm, ratio")

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        end = self.length / self.ratio
        a, b = min(t0, end), min(t1, end)
        ramped = 1.0 if a == b else (a / b) ** (math.log(2) / self.ratio)
        return float(ramped * 0.5 ** ((max(t1, end) - max(t0, end)) / self.length))
