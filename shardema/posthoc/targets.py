"""Targets: the profile that an average is wanted to have, given after the run.

::

    a schedule   power(0.10), half_life(1000)     as if it had been kept from the start
    window       window(20000, "minus-sqrt")      as if the learning rate had decayed at the end
    a callable   weight of the step at time t     any other

A decay of the learning rate by a curve s(x), 1 at the start of its window and 0 at the end, scales
each update by s; the same updates, averaged with the profile -s'(x), give the same weights (Abel
summation). So a window has that profile: of the cell (a, b] the mass s(a) - s(b).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardema.errors import ArgumentError, ArgumentTypeError
from shardema.schedules import Schedule
from shardema.schedules.base import check_positive

Curve = str | Callable[[float], float]

# decay of the learning rate over a window: from 1 at x = 0 to 0 at x = 1
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "mean": lambda x: 1 - x,
}


def curve_of(curve: Curve) -> Callable[[float], float]:
    """The decay curve of this name, or a callable that is one.

    Raises:
        ValueError: no curve of this name, or a callable that does not go from 1 at 0 to 0 at 1.
    """
    if isinstance(curve, str):
        if curve not in CURVES:
            raise ArgumentError(
                f"curve: got {curve!r}, expected one of {list(CURVES)} or a callable"
            )
        return CURVES[curve]
    ends = [float(curve(0.0)), float(curve(1.0))]
    if not (abs(ends[0] - 1) < 1e-9 and abs(ends[1]) < 1e-9):
        raise ArgumentError(
            f"curve: got {ends[0]:.6g} at the start and {ends[1]:.6g} at the end of the window, "
            "expected 1 and 0: the share of the learning rate that is left"
        )
    return curve


def merge_weights(count: int, curve: Curve) -> NDArray[np.float64]:
    """Weights of ``count`` checkpoints, evenly spaced over a window, that stand for a decay.

    ``c_i = s_i - s_(i + 1)`` with ``s_i = s(i / count)``: Tian et al. 2025 (WSM, arXiv 2507.17634).

    >>> merge_weights(4, "minus-sqrt").round(3).tolist()
    [0.5, 0.207, 0.159, 0.134]
    """
    if count < 1:
        raise ArgumentError(f"merge: got {count} checkpoints, expected one or more")
    decay = curve_of(curve)
    left = np.array([float(decay(i / count)) for i in range(count + 1)])
    return _falls(left)


def _falls(left: NDArray[np.float64]) -> NDArray[np.float64]:
    falls: NDArray[np.float64] = left[:-1] - left[1:]
    return falls


@dataclass(frozen=True)
class window:
    """The profile that stands for a decay of the learning rate in the last ``length`` of the run.

    Args:
        length: of the window, in the unit of the clock, above 0.
        curve: ``"linear"`` (also ``"mean"``), the equal mean of the window; ``"minus-sqrt"``,
            ``1 - sqrt(x)``; ``"cosine"``; or a callable from 1 at 0 to 0 at 1.
    """

    length: float
    curve: Curve = "linear"

    def __post_init__(self) -> None:
        check_positive(self.length, "posthoc.window, length")
        curve_of(self.curve)

    def __str__(self) -> str:
        name = self.curve if isinstance(self.curve, str) else "callable"
        return f"window({self.length:g}, {name})"


Target = Schedule | window | Callable[[float], float]


@dataclass(frozen=True)
class Wanted:
    """A target at a time: its masses by cells.

    Attributes:
        target: as it was given.
        at: time of the average.
        begin: where its mass begins.
    """

    target: Any
    at: float
    begin: float

    @classmethod
    def of(cls, target: Any, at: float) -> Wanted:
        """Checks a target.

        Raises:
            ValueError: a window longer than the run.
            TypeError: it is none.
        """
        if isinstance(target, window):
            if target.length > at:
                raise ArgumentError(
                    f"{target} at t={at:g}: the window is longer than the run so far; give a "
                    "shorter one, or a later time"
                )
            return cls(target, at, at - target.length)
        if not isinstance(target, Schedule) and not callable(target):
            raise ArgumentTypeError(
                f"target: got {target!r}, expected a schedule such as schedules.power(0.10), "
                "posthoc.window(length, curve), or a callable of the time"
            )
        return cls(target, at, 0)

    def masses(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mass of the cells ``(edges[i], edges[i + 1]]``, [n - 1]; with `initial` they sum to 1."""
        if isinstance(self.target, window):
            decay = curve_of(self.target.curve)
            places = np.clip((edges - self.begin) / self.target.length, 0, 1)
            left = np.array([float(decay(float(x))) for x in places])
            return _falls(left)
        if isinstance(self.target, Schedule):
            kept = [self.target.retention(float(edge), self.at) for edge in edges]
            return -_falls(np.array(kept))
        return _of_density(self.target, edges)

    @property
    def initial(self) -> float:
        """Mass of what was there before the first step."""
        if isinstance(self.target, Schedule):
            return float(self.target.retention(0, self.at))
        return 0.0


def _of_density(
    weight: Callable[[float], float], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The cells by the weight at their middle, scaled to sum to 1."""
    middles = (edges[:-1] + edges[1:]) / 2
    heights = np.array([float(weight(float(t))) for t in middles])
    found: NDArray[np.float64] = heights * np.diff(edges)
    total = float(found.sum())
    if not np.isfinite(found).all() or not total > 0:
        raise ArgumentError(
            f"target: got a callable whose weights sum to {total:.3g} from t={edges[0]:g} to "
            f"{edges[-1]:g}, expected finite weights with a sum above 0"
        )
    found /= total
    return found
