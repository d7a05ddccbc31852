"""Schedules whose width is proportional to progress: power functions, shares of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from shardema.errors import ArgumentError
from shardema.schedules.base import check_positive, register

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
@dataclass(frozen=True, repr=False)
class power:
    """``(t0 / t1) ** (gamma + 1)``, with gamma computed from ``std`` or given.

    The weight of progress tau in the average at t is proportional to ``tau ** gamma``; its
    standard deviation is ``std * t`` (arXiv 2312.02696, equations 1 and 2). The first update
    copies the weights, since nothing is retained from t = 0.

    ``gamma=0`` is the equal average of all updates. Merges of the last checkpoints with the weights
    ``c_i = s_i - s_(i + 1)`` of a learning-rate decay s (WSM, arXiv 2507.17634) are such averages,
    begun at the window: ``gamma=0`` for the linear decay, ``gamma=-0.5`` for ``1 - sqrt(x)``.

    Args:
        std: relative standard deviation, in (0, 0.2887).
        unit: unit of the clock.
        gamma: the exponent itself, in place of ``std``, above -1.

    >>> power(0.10).retention(0, 1)
    0.0
    >>> power(gamma=0).retention(3, 4)
    0.75
    >>> power(gamma=-0.5).retention(1, 4)
    0.5
    """

    std: float | None = field(default=None, compare=False)
    unit: str = "step"
    gamma: float = field(default=math.nan, kw_only=True)  # nan: not given
    _given: str = field(default="std", init=False, compare=False)

    def __post_init__(self) -> None:
        if self.std is not None and not _is_nan(self.gamma):
            raise ArgumentError(
                f"schedules.power: got std={self.std!r} and gamma={self.gamma!r}, expected one of "
                "the two"
            )
        if self.std is None and not _is_nan(self.gamma):
            if not isinstance(self.gamma, int | float) or not -1 < self.gamma < math.inf:
                raise ArgumentError(
                    f"schedules.power: got gamma={self.gamma!r}, expected a finite number above "
                    "-1, such as -0.5 or 6.94"
                )
            object.__setattr__(self, "std", std_of_gamma(self.gamma))
            object.__setattr__(self, "_given", "gamma")
            return
        if not isinstance(self.std, int | float) or not 0 < self.std < _MAX_STD:
            raise ArgumentError(
                f"schedules.power: got std={self.std!r}, expected a number in (0, {_MAX_STD:.4f}), "
                "such as 0.05 or 0.10"
            )
        object.__setattr__(self, "gamma", gamma_of_std(self.std))

    def __repr__(self) -> str:
        return f"power({self._given}={getattr(self, self._given)!r}, unit={self.unit!r})"

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        return float((t0 / t1) ** (self.gamma + 1))

    def store(self) -> dict[str, float | str]:
        return {self._given: getattr(self, self._given), "unit": self.unit}


def _is_nan(value: object) -> bool:
    return value != value


@register
@dataclass(frozen=True)
class share:
    """Step n = 1, 2, ... decays by ``2 ** (-1 / (fraction * n))``: half-life ``fraction * n``.

    Over an interval that is ``2 ** (-(H(t1) - H(t0)) / fraction)`` with the harmonic numbers H,
    which the digamma function continues to any progress; for long runs it tends to
    ``(t0 / t1) ** (log(2) / fraction)``. The average is a constant share of the run behind, however
    long the run turns out to be: "anytime" averages of Meterez et al. 2026 (arXiv 2602.03702),
    torchtitan's ``half_life_fractions``.

    Args:
        fraction: half-life as a share of the progress so far, above 0.
        unit: unit of the clock.

    >>> share(0.5).retention(1, 2)
    0.5
    """

    fraction: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_positive(self.fraction, "schedules.share, fraction")

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        # a step is the common case, and exact
        halvings = 1 / t1 if t1 == t0 + 1 else _harmonic(t1) - _harmonic(t0)
        return float(0.5 ** (max(0.0, halvings) / self.fraction))


def _harmonic(t: float) -> float:
    """The harmonic number of t, up to a constant: the digamma function of t + 1."""
    x, below = t + 1.0, 0.0
    while x < 16:  # the series below needs a large x
        below += 1 / x
        x += 1
    y = 1 / (x * x)
    series = y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))
    return math.log(x) - 0.5 / x - series - below


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
