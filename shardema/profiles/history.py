"""What happened to an average so far: a few numbers for any number of updates.

::

    history    begin |--- segment: one schedule ---|--- another one ---| ...
    segment          |- run: every 10 -|- every 5 -|     evenly spaced update points
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardema.schedules import restore

_ROUNDING = 1e-6  # of the distance of two update points


@dataclass(frozen=True, slots=True)
class Run:
    """Evenly spaced update points.

    Attributes:
        end: the last of them; the first is one distance after the end of the run before.
        count: how many, 1 or more.
        even: False if the distances differ; the points are then treated as evenly spaced.
        kept: retention of the whole run as it was, one for each schedule of the average, where
            they contain a callable; None if the schedules say it.
    """

    end: float
    count: int
    even: bool = True
    kept: tuple[float, ...] | None = None

    def point(self, begin: float, time: float) -> tuple[int, float]:
        """Number of the last point at or before ``time``, and this point; number 0 is ``begin``."""
        distance = (self.end - begin) / self.count
        number = min(self.count, int((time - begin) / distance + _ROUNDING))
        return number, self.at(begin, number)

    def at(self, begin: float, number: int) -> float:
        """Point ``number``; of uneven whole points a whole one."""
        point = begin + number * ((self.end - begin) / self.count)
        if number == self.count:
            return self.end
        return point if self.even else float(int(point + _ROUNDING))


@dataclass(frozen=True)
class Segment:
    """Updates by one schedule.

    Attributes:
        description: of the schedule, as `schedules.describe` returns it.
        begin: the update point before its first one.
        runs: its update points; not empty.
    """

    description: dict[str, Any]
    begin: float
    runs: tuple[Run, ...]

    @property
    def end(self) -> float:
        """Its last update point."""
        return self.runs[-1].end

    @property
    def updates(self) -> int:
        """Its number of update points."""
        return sum(run.count for run in self.runs)

    @property
    def schedule(self) -> Any:
        """The schedule; None if it contains a callable or a class of yours."""
        return restore(self.description)


@dataclass(frozen=True)
class History:
    """All updates of an average.

    Attributes:
        begin: time at which it began.
        imported: it began with values whose own history is not known; else with the weights.
        segments: in the order of time; each begins where the one before ends.
    """

    begin: float
    imported: bool
    segments: tuple[Segment, ...] = ()

    @property
    def end(self) -> float:
        """Its last update point."""
        return self.segments[-1].end if self.segments else self.begin
