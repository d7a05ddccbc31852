"""The weight profile: how much each step of a run contributes to the average at its end.

::

    step       0       1       2     ...    T       step s enters with weight 1 - r(s-1, s),
    weight   r(0,T)   w_1     w_2    ...   w_T      of which r(s, T) is left at T

    long runs:  |----|--|-|| ... ||-|--|----|       an interval (a, b] of steps weighs
                0                           T       (1 - r(a, b)) * r(b, T), which is exact
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardema.errors import ArgumentError
from shardema.schedules.base import Schedule, check_count, check_positive
from shardema.schedules.custom import as_schedule, needs_code

_SINGLE = 2000  # runs up to this length have an interval for every step
_EVEN, _FINE = 1000, 500  # longer ones: even intervals, and finer ones towards both ends
_Kept = Callable[[int, int], float]


@dataclass(frozen=True)
class StepWeights:
    """Weight profile of the average at step T, by intervals ``(edges[i], edges[i + 1]]`` of steps.

    Args:
        edges: steps from 0 to T, increasing, int64 [n + 1].
        kept: retention of each interval, in [0, 1], float64 [n].
    """

    edges: NDArray[np.int64]
    kept: NDArray[np.float64]

    @property
    def steps(self) -> int:
        """T, the length of the run."""
        return int(self.edges[-1])

    @property
    def mass(self) -> NDArray[np.float64]:
        """Weight of all steps of each interval, [n]; with `initial` it sums to 1."""
        after = np.cumprod(self.kept[::-1])[::-1]  # r(edges[i], T)
        mass: NDArray[np.float64] = (1 - self.kept) * np.append(after[1:], 1.0)
        return mass

    @property
    def initial(self) -> float:
        """Weight of the values before the first update."""
        return float(np.prod(self.kept))

    @property
    def began(self) -> int:
        """The last step that copied the weights; 0 if none did."""
        copies = np.flatnonzero(self.kept == 0)
        return int(self.edges[copies[-1] + 1]) if len(copies) else 0

    @property
    def beginning(self) -> float:
        """Weight of step `began`; `initial` if no step copied the weights."""
        copies = np.flatnonzero(self.kept == 0)
        return float(self.mass[copies[-1]]) if len(copies) else self.initial

    @property
    def mean_age(self) -> float:
        """T minus the weighted mean of the steps."""
        return self.steps - self._mean()

    @property
    def relative_std(self) -> float:
        """Standard deviation of the weighted steps, divided by T."""
        mean = self._mean()
        variance = self.mass @ (self._centers() - mean) ** 2 + self.initial * mean**2
        return math.sqrt(variance) / self.steps

    def _centers(self) -> NDArray[np.float64]:
        """Mean of the steps of each interval."""
        return (self.edges[:-1] + 1 + self.edges[1:]) / 2

    def _mean(self) -> float:
        return float(self.mass @ self._centers())


def weight_profile(schedule: Any, steps: int, *, dt: float = 1) -> StepWeights:
    """The weight profile of a run of ``steps`` updates.

    Runs up to 2000 updates have an interval for each; longer ones about 2000 intervals, whose
    weights are exact too, since a retention is multiplicative. Each interval ends with a step that
    changes the average. A schedule that contains a callable is evaluated at every step.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        steps: updates of the run.
        dt: progress of one update, in the schedule's unit.

    Raises:
        ValueError: ``steps`` or ``dt`` is not above 0, or the schedule refuses them.

    >>> found = weight_profile(0.5, 3)
    >>> found.mass.tolist(), found.initial
    ([0.125, 0.25, 0.5], 0.125)
    """
    kept, edges = _intervals(schedule, steps, dt)
    return StepWeights(edges, np.array([kept(a, b) for a, b in itertools.pairwise(edges.tolist())]))


def relative_std(schedule: Any, steps: int, *, dt: float = 1) -> float:
    """Standard deviation of the weight profile of a run, divided by the run's length.

    EDM2's measure of an average's width (Karras et al. 2024, arXiv 2312.02696, section 3.1).
    The values before the first update count as step 0. Exact up to 2000 updates; in longer runs
    the steps of an interval count at its middle, with an error below 0.1 %.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        steps: updates of the run.
        dt: progress of one update, in the schedule's unit.

    Raises:
        ValueError: ``steps`` or ``dt`` is not above 0, or the schedule refuses them.

    >>> from shardema import schedules
    >>> round(relative_std(schedules.power(std=0.10), 10_000), 4)
    0.1
    """
    return weight_profile(schedule, steps, dt=dt).relative_std


def decays(
    schedule: Any, steps: int, *, dt: float = 1
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [n] of a run, and the decay of the update at each of them [n].

    Runs up to 2000 updates: every update that changes the average (decay below 1). Longer ones:
    about 2000 of them, denser towards both ends.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        steps: updates of the run.
        dt: progress of one update, in the schedule's unit.

    Raises:
        ValueError: ``steps`` or ``dt`` is not above 0, or the schedule refuses them.

    >>> at, decay = decays(0.5, 3)
    >>> at.tolist(), decay.tolist()
    ([1, 2, 3], [0.5, 0.5, 0.5])
    """
    kept, edges = _intervals(schedule, steps, dt)
    decay = np.array([kept(step - 1, step) for step in edges[1:].tolist()])
    return edges[1:][decay < 1], decay[decay < 1]


def _intervals(schedule: Any, steps: int, dt: float) -> tuple[_Kept, NDArray[np.int64]]:
    """The retention over whole steps, and the intervals of a run."""
    check_count(steps, "profile, steps")
    check_positive(dt, "profile, dt")
    kept = _retention(as_schedule(schedule), steps, dt)
    if steps <= _SINGLE:
        return kept, np.arange(steps + 1)
    fine = np.geomspace(1, steps, _FINE)
    even = np.linspace(0, steps, _EVEN + 1)
    rough = np.unique(np.rint(np.concatenate([even, fine, steps - fine])).astype(np.int64))
    edges = [0]
    for b in rough[1:].tolist():  # an interval ends with a step that changes the average
        last = _first(kept, edges[-1], b, 1.0)
        if last > edges[-1]:
            alone = kept(edges[-1], last - 1) == 1  # only the last step changes it
            edges += [last - 1, last] if alone and last - 1 > edges[-1] else [last]
    copied = [(a, b) for a, b in itertools.pairwise(edges) if kept(a, b) == 0][-1:]
    for a, b in copied:  # the last copy replaces all before it: an interval of its own
        step = _first(kept, a, b, math.ulp(0.0))
        edges += [step - 1, step]
    return kept, np.unique([*edges, steps])


def _retention(rule: Schedule, steps: int, dt: float) -> _Kept:
    """``retention`` over whole steps, checked to be in [0, 1]."""

    def kept(a: int, b: int) -> float:
        share = 1.0 if a == b else rule.retention(a * dt, b * dt)
        if not 0 <= share <= 1:
            raise ArgumentError(
                f"schedule {rule}: got retention {share} from {a * dt} to {b * dt} {rule.unit}s, "
                "expected a number in [0, 1]"
            )
        return share

    if not needs_code(rule):
        return kept
    each = np.array([kept(step, step + 1) for step in range(steps)])
    return lambda a, b: float(np.prod(each[a:b]))


def _first(kept: _Kept, low: int, high: int, least: float) -> int:
    """The first step a of [low, high] with ``kept(a, high) >= least``."""
    end = high
    middle = high - 1  # the result is mostly high itself
    while low < high:
        low, high = (low, middle) if kept(middle, end) >= least else (middle + 1, high)
        middle = (low + high) // 2
    return low
