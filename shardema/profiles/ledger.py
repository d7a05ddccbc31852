"""`Ledger`: writes down the updates of an average, in a bounded size."""

from __future__ import annotations

from shardema.profiles.history import History, Run, Segment
from shardema.schedules import Schedule, by_pattern, describe
from shardema.schedules.custom import needs_code

MAX_RUNS = 512  # of a segment; more are joined to runs of more updates
MAX_SEGMENTS = 100  # the older ones are forgotten: what they left is then unknown
_SAME = 1e-9  # relative difference of two distances that count as the same


class Ledger:
    """The updates of an average: those of ``history``, and those that `record` adds.

    A segment of the same schedule is continued.

    Args:
        rule: the schedule of the updates from now on.
        history: the updates so far.
    """

    __slots__ = (
        "_begin",
        "_closed",
        "_count",
        "_decays",
        "_distance",
        "_end",
        "_least",
        "_needs_code",
        "_past",
        "_rule",
    )

    def __init__(self, rule: Schedule | by_pattern, history: History) -> None:
        schedules = rule.schedules if isinstance(rule, by_pattern) else (rule,)
        self._rule = rule
        self._needs_code = any(needs_code(schedule) for schedule in schedules)
        self._past = history
        self._end = self._begin = history.end
        self._closed: list[Run] = []
        self._least = 1  # updates that a closed run has at least, but for the last
        if history.segments and history.segments[-1].description == describe(rule):
            *before, last = history.segments
            self._past = History(history.begin, history.imported, tuple(before))
            self._begin, self._closed = last.begin, list(last.runs)
        self._count, self._distance = 0, 0.0  # of the open run: updates and their distance
        self._decays: tuple[float, ...] = ()
        if self._closed and self._closed[-1].even and self._closed[-1].kept is None:
            last_run = self._closed.pop()  # open again, so that a resume leaves no trace
            start = self._closed[-1].end if self._closed else self._begin
            self._count = last_run.count
            self._distance = (last_run.end - start) / last_run.count

    def record(self, t: float, decays: tuple[float, ...]) -> None:
        """Writes down an update at time ``t``, with the decay of each schedule of the rule."""
        distance = t - self._end
        same = abs(distance - self._distance) <= _SAME * distance
        if same and self._count and (decays == self._decays or not self._needs_code):
            self._count += 1
        elif distance > 0 or self._needs_code:
            self._close()
            self._count, self._distance, self._decays = 1, distance, decays
        self._end = t

    def history(self) -> History:
        """All updates so far, as a value."""
        past, runs = self._past, [*self._closed, *self._open()]
        if not runs:
            return past
        segments = (*past.segments, Segment(describe(self._rule), self._begin, tuple(runs)))
        if len(segments) <= MAX_SEGMENTS:
            return History(past.begin, past.imported, segments)
        segments = segments[-MAX_SEGMENTS:]
        return History(segments[0].begin, True, segments)

    def _open(self) -> list[Run]:
        if not self._count:
            return []
        kept = tuple(decay**self._count for decay in self._decays) if self._needs_code else None
        return [Run(self._end, self._count, True, kept)]

    def _close(self) -> None:
        """Closes the open run; joins neighbours if there are too many runs."""
        for run in self._open():
            _append(self._closed, run, self._begin, self._least)
        while len(self._closed) > MAX_RUNS:
            self._least *= 2
            runs, self._closed = self._closed, []
            for run in runs:
                _append(self._closed, run, self._begin, self._least)


def _append(runs: list[Run], run: Run, begin: float, least: int) -> None:
    """Appends a run, or joins it with the last one if that has fewer than ``least`` updates."""
    if not runs or runs[-1].count >= least:
        runs.append(run)
        return
    runs[-1] = _join(runs[-2].end if len(runs) > 1 else begin, runs[-1], run)


def _join(begin: float, first: Run, second: Run) -> Run:
    distances = [(first.end - begin) / first.count, (second.end - first.end) / second.count]
    same = abs(distances[1] - distances[0]) <= _SAME * distances[0]
    kept = None
    if first.kept is not None and second.kept is not None:
        kept = tuple(a * b for a, b in zip(first.kept, second.kept, strict=True))
    even = first.even and second.even and same
    return Run(second.end, first.count + second.count, even, kept)
