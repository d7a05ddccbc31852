"""The averages of a case: as the library is given them, and in float64 on full tensors.

The oracle follows what the documentation says, in its own words: an update adds ``dt`` to the
clock; at every k-th one the average forgets what all updates since the last move would have, and
takes the weights in. A tensor follows the first pattern that takes its name.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shardema import ShadowPolicy, schedules


def rule(settings: Mapping[str, Any]) -> Any:
    """The schedule of a drawn average."""
    decay = settings["decay"]
    return {
        "constant": lambda: decay,
        "half_life": lambda: schedules.half_life(3),
        "power": lambda: schedules.power(0.10),
        "ramp": lambda: schedules.ramp(decay),
        "warmup": lambda: schedules.warmup(decay),
        "debiased": lambda: schedules.debiased(decay),
        "by_pattern": lambda: schedules.by_pattern({settings["pattern"]: 0.25}, default=decay),
    }[settings["rule"]]()


def policy(settings: Mapping[str, Any], base: ShadowPolicy) -> ShadowPolicy:
    dtype: Any = torch.float64 if settings["float64"] else "auto"
    return replace(base, dtype=dtype, update_every=settings["update_every"])


@dataclass
class Truth:
    """One average in float64.

    Attributes:
        full: by name of the tensor.
        moves: roundings since it was last set: what its bound grows with.
    """

    settings: Mapping[str, Any]
    full: dict[str, Tensor]
    t: float = 0
    num_updates: int = 0
    moved_at: float = 0
    moves: int = 0
    largest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.full = {fqn: value.double() for fqn, value in self.full.items()}
        self._note()

    def _note(self) -> None:
        for fqn, value in self.full.items():
            peak = float(value.abs().max()) if value.numel() else 0.0
            self.largest[fqn] = max(self.largest.get(fqn, 0.0), peak)

    @property
    def clock(self) -> tuple[float, int, float]:
        """``t``, number of updates, ``t`` of the last move."""
        return self.t, self.num_updates, self.moved_at

    def retention(self, fqn: str, t0: float, t1: float) -> float:
        given = rule(self.settings)
        if isinstance(given, float):
            return given ** (t1 - t0)
        if isinstance(given, schedules.by_pattern):
            chosen = fnmatch.fnmatchcase(fqn, self.settings["pattern"])
            return (0.25 if chosen else self.settings["decay"]) ** (t1 - t0)
        return float(given.retention(t0, t1))

    def update(self, weights: Mapping[str, Tensor], dt: float) -> None:
        """One update."""
        self.t += dt
        self.num_updates += 1
        if self.num_updates % self.settings["update_every"]:
            return
        for fqn, value in self.full.items():
            now = weights[fqn].double()
            share = 1 - self.retention(fqn, self.moved_at, self.t)
            self.full[fqn] = now.clone() if share == 1 else value + share * (now - value)
            peak = float(now.abs().max()) if now.numel() else 0.0
            self.largest[fqn] = max(self.largest[fqn], peak)
        self.moved_at = self.t
        self.moves += 1

    def set(self, full: Mapping[str, Tensor], t: float = 0, num_updates: int = 0) -> None:
        """The average is these values now; the clock is told."""
        self.full = {fqn: full[fqn].double() for fqn in self.full}
        self.t, self.num_updates, self.moved_at = t, num_updates, t
        self.moves, self.largest = 0, {}
        self._note()

    def begins_with_a_copy(self) -> bool:
        """Whether nothing is left of it at the next move, if each update is one step."""
        every = self.settings["update_every"]
        now = self.t + every - self.num_updates % every
        return any(self.retention(fqn, self.moved_at, now) == 0 for fqn in self.full)

    def bound(self, fqn: str) -> float:
        """How far float32 may be from it: a rounding of the largest value at each move."""
        wide = self.settings["float64"]
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
        # the library computes the weight of an update in the dtype of the average
        return 4 * (self.moves + 1) * eps * max(1.0, self.largest[fqn])

    def copy(self) -> Truth:
        return copy.deepcopy(self)
