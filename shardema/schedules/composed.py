"""Schedules built from other schedules: delayed, shifted, scaled, clipped, joined."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardema.errors import ArgumentError
from shardema.schedules.base import (
    check_count,
    check_decay,
    check_positive,
    check_progress,
    register,
)
from shardema.schedules.custom import as_schedule
from shardema.schedules.stepwise import Stepwise


@dataclass(frozen=True)
class Nested:
    """A schedule built from another one (or a decay, or a callable), with the same unit."""

    schedule: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", as_schedule(self.schedule))

    @property
    def unit(self) -> str:
        """Unit of the clock."""
        return str(self.schedule.unit)


@register
@dataclass(frozen=True)
class scaled(Nested):
    """``schedule.retention(t0, t1) ** kappa``: for a batch that is ``kappa`` times larger.

    The EMA scaling rule of Busbridge et al. 2023, "How to Scale Your EMA" (arXiv 2307.13813): where
    the batch is scaled by kappa and the learning rate with it, decay becomes ``decay ** kappa``.
    For a schedule in steps; one in samples or tokens needs no scaling, nor does ``power``, whose
    width is relative.

    Args:
        schedule: the schedule of the original batch size; or a decay, or a callable.
        kappa: new batch size divided by the original one, above 0.

    >>> scaled(0.9, kappa=2).retention(0, 1) == 0.9**2
    True
    """

    kappa: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.kappa, "schedules.scaled, kappa")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.schedule.retention(t0, t1) ** self.kappa)


@register
@dataclass(frozen=True)
class start(Nested):
    """Copies the weights up to and including progress ``at``, where ``schedule`` starts at 0.

    ``0`` for ``t0 < at``, else ``schedule.retention(t0 - at, t1 - at)``.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        at: the last progress at which an update copies, in the schedule's unit, 0 or more.

    >>> rule = start(0.5, at=2)
    >>> [rule.retention(t, t + 1) for t in range(4)]
    [0.0, 0.0, 0.5, 0.5]
    """

    at: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_progress(self.at, "schedules.start, at")

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        if t0 < self.at:
            return 0.0
        return float(self.schedule.retention(t0 - self.at, t1 - self.at))


@register
@dataclass(frozen=True)
class shift(Nested):
    """``schedule.retention(t0 + by, t1 + by)``: as if training had begun ``by`` earlier.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        by: progress added to the clock, in the schedule's unit, 0 or more.

    >>> from shardema.schedules import power
    >>> shift(power(gamma=0), by=2).retention(0, 1) == 2 / 3
    True
    """

    by: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_progress(self.by, "schedules.shift, by")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.schedule.retention(t0 + self.by, t1 + self.by))


@register
@dataclass(frozen=True)
class debiased(Nested):
    """``r(t0, t1) * (1 - r(0, t0)) / (1 - r(0, t1))`` for the retention r of ``schedule``.

    An average that starts at zero and is divided by ``1 - r(0, t)`` (Kingma and Ba 2015, arXiv
    1412.6980, section 3) has exactly these decays, which need no state:
    ``1 - (1 - r(t0, t1)) / (1 - r(0, t1))``, so the first update copies. For a constant decay d
    that is ``1 - (1 - d) / (1 - d ** n)`` at step n.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``; a callable must be
            multiplicative, since ``r(0, t)`` is evaluated.

    >>> [round(debiased(0.5).retention(n - 1, n), 4) for n in (1, 2, 3)]
    [0.0, 0.3333, 0.4286]
    """

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        present = 1 - self.schedule.retention(0, t1)
        if present == 0:  # the initial value has kept its whole weight: there is no bias
            return 1.0
        before = 1 - self.schedule.retention(0, t0)
        return float(min(1.0, self.schedule.retention(t0, t1) * before / present))


@register
@dataclass(frozen=True)
class every(Nested, Stepwise):
    """Changes the average at the steps ``first``, ``first + k``, ``first + 2 k``, ... only.

    The decay at such a step is that of one step, ``schedule.retention(n - 1, n)``, as in most
    libraries, so a larger ``k`` makes a longer average. With ``compensated=True`` it is that of
    ``k`` steps, ``schedule.retention(n - k, n)``: the average is as long as for ``k=1``.
    Whole steps only.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        k: steps from one change of the average to the next, 1 or more.
        first: the first step that changes the average, 1 or more.
        compensated: whether a change has the decay of all steps since the last one.

    >>> rule = every(0.5, 3)
    >>> [rule.retention(n - 1, n) for n in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """

    k: int
    first: int = 1
    compensated: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.k, "schedules.every, k")
        check_count(self.first, "schedules.every, first")

    def decay_at(self, step: int) -> float:
        if step < self.first or (step - self.first) % self.k:
            return 1.0
        since = step - 1
        if self.compensated:
            since = 0 if step == self.first else step - self.k
        return float(self.schedule.retention(since, step))


@register
@dataclass(frozen=True)
class clip(Nested, Stepwise):
    """Step n decays by ``max(min_decay, min(max_decay, schedule.retention(n - 1, n)))``.

    A step is one unit of the clock; the retention of an interval is the product over its steps.
    Whole steps only.

    Args:
        schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
        min_decay: in [0, 1].
        max_decay: in [0, 1], not below ``min_decay``.

    >>> from shardema.schedules import ramp
    >>> clip(ramp(0.9999), min_decay=0.5).retention(0, 1)
    0.5
    """

    min_decay: float = 0.0
    max_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay(self.min_decay, "schedules.clip, min_decay")
        check_decay(self.max_decay, "schedules.clip, max_decay")
        if self.min_decay > self.max_decay:
            raise ArgumentError(
                f"schedules.clip: got min_decay={self.min_decay} above max_decay={self.max_decay}"
            )

    def decay_at(self, step: int) -> float:
        decay = float(self.schedule.retention(step - 1, step))
        return float(max(self.min_decay, min(self.max_decay, decay)))


@register
@dataclass(frozen=True)
class join:
    """The first schedule up to ``at[0]``, the second up to ``at[1]``, ..., the last from there on.

    An interval over several of them has the product of their retentions. Each schedule starts at 0
    where it begins, so one whose first update copies the weights, such as ``power``, copies there.

    Args:
        schedules: two or more schedules, decays or callables with the same unit.
        at: progress at which the next one begins, increasing, one fewer than schedules.

    >>> join([0.5, 0.25], at=[2]).retention(1, 3)
    0.125
    """

    schedules: Sequence[Any]
    at: Sequence[float]

    def __post_init__(self) -> None:
        schedules, at = tuple(map(as_schedule, self.schedules)), tuple(self.at)
        for bound in at:
            check_progress(bound, "schedules.join, at")
        rising = all(a < b for a, b in itertools.pairwise((0.0, *at)))
        if len(at) != len(schedules) - 1 or not at or not rising:
            raise ArgumentError(
                f"schedules.join: got {len(schedules)} schedules and at={list(at)}, expected "
                "increasing progress above 0, one fewer than schedules"
            )
        units = sorted({schedule.unit for schedule in schedules})
        if len(units) > 1:
            raise ArgumentError(f"schedules.join: got schedules in {units}, expected one unit")
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "at", at)

    @property
    def unit(self) -> str:
        """Unit of the clock."""
        return str(self.schedules[0].unit)

    def retention(self, t0: float, t1: float) -> float:
        kept = 1.0
        begins, ends = (0.0, *self.at), (*self.at, float("inf"))
        for schedule, begin, end in zip(self.schedules, begins, ends, strict=True):
            a, b = max(t0, begin), min(t1, end)
            if a < b:
                kept *= schedule.retention(a - begin, b - begin)
        return float(kept)
