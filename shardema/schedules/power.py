"""Schedules whose width is proportional to progress: EDM2's power function, EDM's half-life."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from shardema.schedules.base import check_positive, check_progress, register

_MAX_STD = 12**-0.5  # the std of the uniform profile, gamma = 0


def gamma_of_std(std: float) -> float:
    """Exponent gamma of the profile whose relative standard deviation is ``std``.

    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
    (arXiv 2312.02696), equation 123: the largest real root of
    ``g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2)``.

    >>> round(gamma_of_std(0.10), 2)
    6.94
    """
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def std_of_gamma(gamma: float) -> float:
    """Relative standard deviation of the profile ``tau ** gamma``: the inverse of `gamma_of_std`.

    >>> round(std_of_gamma(0), 4)
    0.2887
    """
    return float(((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5)


@register
@dataclass(frozen=True)
class power:
    """``(t0 / t1) ** (gamma + 1)``, with gamma computed from ``std`` or given.

    The weight of progress tau in the average at t is proportional to ``tau ** gamma``; its
    standard deviation is ``std * t`` (arXiv 2312.02696, equations 1 and 2). The first update
    copies the weights, since nothing is retained from t = 0. ``gamma=0`` is the equal average of
    all updates.

    Args:
        std: relative standard deviation, in (0, 0.2887).
        unit: unit of the clock.
        gamma: the exponent itself, in place of ``std``, 0 or more.

    >>> power(0.10).retention(0, 1)
    0.0
    >>> power(gamma=0).retention(3, 4)
    0.75
    """

    std: float | None = None
    unit: str = "step"
    gamma: float = field(default=-1.0, kw_only=True, repr=False, compare=False)
    _given: str = field(default="std", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.std is None and self.gamma != -1:
            check_progress(self.gamma, "schedules.power, gamma")
            object.__setattr__(self, "std", std_of_gamma(self.gamma))
            object.__setattr__(self, "_given", "gamma")
            return
        if self.gamma != -1:
            raise ValueError(
                f"schedules.power: got std={self.std!r} and gamma={self.gamma!r}, expected one of "
                "the two"
            )
        if not isinstance(self.std, int | float) or not 0 < self.std < _MAX_STD:
            raise ValueError(
                f"schedules.power: got std={self.std!r}, expected a number in (0, {_MAX_STD:.4f}), "
                "such as 0.05 or 0.10"
            )
        object.__setattr__(self, "gamma", gamma_of_std(self.std))

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        return float((t0 / t1) ** (self.gamma + 1))

    def store(self) -> dict[str, float | str]:
        return {self._given: getattr(self, self._given), "unit": self.unit}


@register
@dataclass(frozen=True)
class edm:
    """``0.5 ** (integral of dt / h(t) from t0 to t1)`` with ``h(t) = min(length, ratio * t)``.

    That is ``(t0 / t1) ** (log(2) / ratio)`` while ``ratio * t`` is below ``length``, and a
    half-life of ``length`` after it; the first update copies. The code of Karras et al. 2022
    (arXiv 2206.00364) evaluates the half-life at one end of each update; the integral is the limit
    of that for small batches, and does not depend on the batch size.

    Args:
        length: half-life after the ramp, in ``unit``, above 0.
        ratio: half-life during the ramp, as a share of the progress so far, above 0; EDM uses 0.05,
            EDM2's traditional average 0.09.
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
