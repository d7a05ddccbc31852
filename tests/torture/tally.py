"""The rows of the tally: how often something was injured, and how often that was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What one injury did to one operation.

    Attributes:
        points: places in the operation at which it was injured.
        trials: how often it was injured.
        bad: trials after which a property did not hold.
        first: what the first of these found.
        note: figures that say how thorough it was.
    """

    injury: str
    operation: str
    points: int
    trials: int
    bad: int
    first: str = ""
    note: str = ""

    def cells(self) -> list[str]:
        """What a table shows."""
        numbers = [f"{n:,}" for n in (self.points, self.trials, self.bad)]
        return [self.injury, self.operation, *numbers, self.note]


HEAD = ("injury", "operation", "points", "trials", "bad", "")


@dataclass
class Trials:
    """The trials of a row, as they come."""

    injury: str
    operation: str
    count: int = 0
    bad: list[str] = field(default_factory=list)

    def add(self, wrong: Sequence[str], what: str) -> None:
        """One trial: what is wrong after it."""
        self.count += 1
        if wrong:
            self.bad.append(f"{what}: " + "; ".join(wrong))

    def row(self, points: int, note: str = "") -> Row:
        first = self.bad[0] if self.bad else ""
        return Row(self.injury, self.operation, points, self.count, len(self.bad), first, note)
