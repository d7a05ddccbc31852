"""`Profile`: how much the weights of each past step contribute to an average.

::

    time         begin    s1   s2   s3   ...   T     update points: changes of the average
    mass       r(begin,T)  p1   p2   p3  ...   pT    all of them sum to 1

    retained(s)  r(s, T): what is left at T of the average as it was at s
    mass         P(a, b) = r(b, T) - r(a, T): of the weights at the update points in (a, b]
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardema.errors import ArgumentError
from shardema.profiles.history import History, Run, Segment
from shardema.profiles.ledger import Ledger
from shardema.schedules import Schedule, as_schedule, restore
from shardema.schedules.by_pattern import stored_parts
from shardema.shards.patterns import fits

Times = Sequence[float] | NDArray[Any]


@dataclass(frozen=True)
class Profile:
    """The mass of each past step in an average at time ``t``.

    An average is the sum of the weights at its update points, each times its mass, plus what it
    began with times `initial`; all of these masses sum to 1. Local: no communication.

    Args:
        history: the updates so far.
        t: time of the average, in the unit of its schedule, at least ``history.end``.
        names: of the tensor in question, where `schedules.by_pattern` gives tensors different
            schedules; the default schedule counts if empty.

    >>> Profile.of(0.5, [1, 2, 3]).mass([0, 1, 2, 3]).tolist()
    [0.125, 0.25, 0.5]
    """

    history: History
    t: float
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, schedule: Any, times: Iterable[float], *, begin: float = 0) -> Profile:
        """The profile of an average that began with the weights and was updated at ``times``.

        Args:
            schedule: a schedule, a decay, or a callable ``(t, dt) -> decay``.
            times: increasing, above ``begin``, in the unit of the schedule: ``range(1, 1001)``.
            begin: time at which it began.

        Raises:
            ValueError: times that do not increase, or that the schedule refuses.
        """
        rule = as_schedule(schedule)
        ledger, t = Ledger(rule, History(begin, imported=False)), begin
        for time in times:
            if not time > t:
                raise ArgumentError(f"profile: got the time {time} after {t}, expected a later one")
            ledger.record(time, (rule.retention(t, time),))
            t = time
        return cls(ledger.history(), t)

    @property
    def start(self) -> float:
        """Time at which the known history begins."""
        return self.history.begin

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The schedules so far, with their update points."""
        return self.history.segments

    @property
    def unknown(self) -> float:
        """Mass of what was imported, whose own history is not known."""
        return self._oldest if self.history.imported else 0.0

    @property
    def initial(self) -> float:
        """Mass of the weights that the average began with.

        Raises:
            ValueError: `unknown` is above 0, which may contain such weights.
        """
        self._check_known("the mass of the initial weights")
        return 0.0 if self.history.imported else self._oldest

    def mass(self, edges: Times) -> NDArray[np.float64]:
        """Mass of the cells ``(edges[i], edges[i + 1]]`` of time, [n - 1].

        The mass of an update is at its update point, so a cell without one has none. `initial` and
        `unknown` are in no cell.

        Args:
            edges: increasing [n]; no mass is later than `t`.

        Raises:
            ValueError: edges that decrease; one before `start` while `unknown` is above 0.
        """
        if any(a > b for a, b in itertools.pairwise(edges)):
            raise ArgumentError("profile: got edges that decrease, expected increasing times")
        return np.diff(self.retained(edges))

    def retained(self, times: Times) -> NDArray[np.float64]:
        """What is left at `t` of the average as it was at each of ``times``, [n].

        Raises:
            ValueError: a time before `start` while `unknown` is above 0.
        """
        if any(time < self.start for time in times):
            self._check_known(f"the time before {self.start}")
        return np.array([self._retained(float(time)) for time in times], dtype=np.float64)

    # ---- its shape ----------------------------------------------------------------------------

    def points(self, most: int = 2000) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """`start` and update points [n], and the number of updates up to each of them [n].

        All of them if there are at most ``most``; else about so many, finer towards the end.
        """
        total = int(self._counts[-1])
        numbers = np.arange(total + 1)
        if total > most:
            even, fine = np.linspace(0, total, most // 2), np.geomspace(1, total, most // 2)
            numbers = np.unique(np.rint(np.concatenate([even, total - fine])).astype(np.int64))
        return np.array([self._point(n) for n in numbers.tolist()], dtype=np.float64), numbers

    def since(self, share: float = 0.5) -> float | None:
        """The latest update point after which at least ``share`` of the mass is.

        None if less than that is known.
        """
        low, high = 0, int(self._counts[-1]) + 1  # numbers of points: enough after low, not high
        if not 0 < share <= 1 - self._oldest:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            enough = 1 - self._retained(self._point(middle)) >= share
            low, high = (middle, high) if enough else (low, middle)
        return self._point(low)

    @property
    def effective_updates(self) -> float:
        """Number of updates that an equal mean has whose masses have the same sum of squares.

        Of the known updates, up to 2000 exactly; 0 if there are none. A mean of so many independent
        weights has the same variance. For a constant decay d it is ``(1 + d) / (1 - d)``.
        """
        edges, numbers = self.points()
        mass = self.mass(edges)
        squares = float((mass**2 / np.diff(numbers)).sum())
        return float(mass.sum()) ** 2 / squares if squares else 0.0

    # ---- from the runs ------------------------------------------------------------------------

    def _check_known(self, what: str) -> None:
        if self.unknown > 0:
            raise ArgumentError(
                f"profile: {what} is not known: {self.unknown:.3g} of the average is what was "
                f"loaded at t={self.start} without its history; ask for times from there on"
            )

    @property
    def _oldest(self) -> float:
        return self._retained(self.start)

    def _retained(self, time: float) -> float:
        stretches = self._stretches
        number = bisect.bisect_right(stretches, time, key=lambda stretch: stretch.run.end)
        if number == len(stretches):
            return 1.0
        return stretches[number].retained(max(time, self.start))

    @functools.cached_property
    def _counts(self) -> NDArray[np.int64]:
        """Number of updates up to the end of each run, from 0 on."""
        return np.cumsum([0, *(stretch.run.count for stretch in self._stretches)])

    def _point(self, number: int) -> float:
        """Update point number 1, 2, ... of all runs; number 0 is `start`."""
        if number == 0:
            return self.start
        index = int(np.searchsorted(self._counts, number)) - 1
        stretch = self._stretches[index]
        return stretch.run.at(stretch.begin, number - int(self._counts[index]))

    @functools.cached_property
    def _stretches(self) -> list[_Stretch]:
        """The runs of all segments, each with what is left of its end; the last one first."""
        found: list[_Stretch] = []
        left = 1.0  # at `t`, of the average as it was at the end of the segment or run
        for segment in reversed(self.segments):
            index, rule = self._decides(segment)
            begins = [segment.begin, *(run.end for run in segment.runs[:-1])]
            for begin, run in zip(reversed(begins), reversed(segment.runs), strict=True):
                if rule is not None:
                    found.append(_Stretch(begin, run, left, rule, segment.end))
                    continue
                if run.kept is None or index >= len(run.kept):
                    raise ArgumentError(
                        f"profile: got no retentions of {segment.description!s:.300}"
                    )
                kept = run.kept[index]
                found.append(_Stretch(begin, run, left, kept))
                left *= kept
            if rule is not None:
                left *= rule.retention(segment.begin, segment.end)
        return found[::-1]

    def _decides(self, segment: Segment) -> tuple[int, Schedule | None]:
        """The schedule of a segment for the tensor: its index, itself if it needs no code."""
        patterns, descriptions = stored_parts(segment.description)
        matching = (n for n, pattern in enumerate(patterns, 1) if fits(pattern, self.names))
        index = next(matching, 0)
        return index, restore(descriptions[index])


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A run, and what is left at the end of the profile of the average as it was at ``end``.

    Attributes:
        rule: the schedule up to ``end``, the end of the segment; or the share that the whole run
            has kept.
    """

    begin: float
    run: Run
    left: float
    rule: Schedule | float
    end: float = 0

    def retained(self, time: float) -> float:
        """What is left of the average as it was at ``time``, in the run."""
        number, point = self.run.point(self.begin, time)
        if isinstance(self.rule, float):
            kept = self.rule ** ((self.run.count - number) / self.run.count)
        else:
            kept = self.rule.retention(point, self.end)
        return float(kept * self.left)
