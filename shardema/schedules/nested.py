"""What schedules that are made of another schedule share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardema.schedules.custom import as_schedule


@dataclass(frozen=True)
class nested:
    """A schedule made of another one, in the other's unit. A decay or a callable will do too."""

    schedule: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", as_schedule(self.schedule))

    @property
    def unit(self) -> str:
        """Unit of the clock."""
        return str(self.schedule.unit)
