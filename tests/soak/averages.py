"""The averages of a case: as the library is given them, and in float64 on full tensors.

The oracle follows what the documentation says, in its own words: an update adds ``dt`` to the
clock; at every k-th one the average forgets what all updates since the last move would have, and
takes the weights in. A tensor follows the first pattern that takes its name.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Mapping
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
        "power_gamma": lambda: schedules.power(gamma=GAMMA),
        "share": lambda: schedules.share(SHARE),
        "block_mean": lambda: schedules.block_mean(BLOCK),
        "bema": lambda: schedules.bema(lag=LAG),
        "start": lambda: schedules.constant(1.0),
    }[settings["rule"]]()


GAMMA, SHARE, BLOCK, LAG = -0.5, 0.4, 4, 3
# what the schedules of merging keep at step n = 1, 2, ..., in the words of their documentation
STEPWISE: dict[str, Callable[[int], float]] = {
    "power_gamma": lambda n: ((n - 1) / n) ** (GAMMA + 1),
    "share": lambda n: 2 ** (-1 / (SHARE * n)),
    "block_mean": lambda n: (n - 1) % BLOCK / ((n - 1) % BLOCK + 1),
    "bema": lambda n: 1 - (LAG + n) ** -0.5,
}


def policy(settings: Mapping[str, Any], base: ShadowPolicy) -> ShadowPolicy:
    dtype: Any = torch.float64 if settings["float64"] else "auto"
    return replace(base, dtype=dtype, update_every=settings["update_every"])


@dataclass(frozen=True)
class Move:
    """A change of an average: from when to when it forgets, and the weights that it takes in."""

    since: float
    t: float
    weights: Mapping[str, Tensor]


@dataclass
class Truth:
    """One average in float64.

    Attributes:
        full: by name of the tensor.
        moves: roundings since it was last set: what its bound grows with.
        begin: when it was last set.
        imported: it was set to values of which nothing is known, not to the weights.
        first: these values.
        history: all changes since then.
        loaded: its values have come from a file or a state, also before it changed.
    """

    settings: Mapping[str, Any]
    full: dict[str, Tensor]
    t: float = 0
    num_updates: int = 0
    moved_at: float = 0
    moves: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    begin: float = 0
    imported: bool = False
    first: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[Move, ...] = ()
    loaded: bool = False

    def __post_init__(self) -> None:
        self.full = {fqn: value.double() for fqn, value in self.full.items()}
        self.first = dict(self.full)
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
        if self.settings["rule"] in STEPWISE:
            decay = STEPWISE[self.settings["rule"]]
            return math.prod(decay(n) for n in range(round(t0) + 1, round(t1) + 1))
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
        taken = {fqn: weights[fqn].double().clone() for fqn in self.full}
        for fqn, value in self.full.items():
            now = taken[fqn]
            share = 1 - self.retention(fqn, self.moved_at, self.t)
            self.full[fqn] = now.clone() if share == 1 else value + share * (now - value)
            peak = float(now.abs().max()) if now.numel() else 0.0
            self.largest[fqn] = max(self.largest[fqn], peak)
        self.history += (Move(self.moved_at, self.t, taken),)
        self.moved_at = self.t
        self.moves += 1

    def set(self, full: Mapping[str, Tensor], t: float = 0, num_updates: int = 0) -> None:
        """The average is these values now; the clock is told."""
        self.full = {fqn: full[fqn].double().clone() for fqn in self.full}
        self.t, self.num_updates, self.moved_at = t, num_updates, t
        self.moves, self.largest = 0, {}
        self._note()
        self.begins(imported=False)

    def take(self, other: Truth) -> None:
        """The values of another one were loaded, as full tensors; the clock stays."""
        self.full, self.moves, self.largest = dict(other.full), other.moves, dict(other.largest)
        self.begins(imported=True)

    def begins(self, *, imported: bool) -> None:
        """Nothing before now counts."""
        self.begin, self.imported, self.loaded = self.moved_at, imported, imported
        self.first, self.history = dict(self.full), ()

    def masses(self, fqn: str) -> tuple[float, list[float]]:
        """The shares of what it was set to, and of the weights of each change since then."""
        kept = [self.retention(fqn, move.since, move.t) for move in self.history]
        after = [math.prod(kept[number + 1 :]) for number in range(len(kept))]
        return math.prod(kept), [(1 - k) * left for k, left in zip(kept, after, strict=True)]

    def continues(self, other: Truth) -> bool:
        """Whether it is what the other one became by updates alone."""
        if self.first is not other.first or self.t < other.t:
            return False
        count = len(other.history)
        pairs = zip(self.history[:count], other.history, strict=False)
        return len(self.history) >= count and all(a is b for a, b in pairs)

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
        made = copy.copy(self)  # what the history holds never changes
        made.full = {fqn: value.clone() for fqn, value in self.full.items()}
        made.largest = dict(self.largest)
        return made


@dataclass
class Mixed(Truth):
    """A linear combination of averages and weights (None).

    Attributes:
        slack: how far the values may be that it is computed of, beside their own bounds.
    """

    parts: tuple[tuple[float, Truth | None], ...] = ()
    slack: Mapping[str, float] = field(default_factory=dict)

    def bound(self, fqn: str) -> float:
        eps = torch.finfo(torch.float64 if self.settings["float64"] else torch.float32).eps
        told = sum(abs(c) * part.bound(fqn) for c, part in self.parts if part is not None)
        return told + eps * self.largest[fqn] + self.slack.get(fqn, 0.0)


def mixed(
    coefficients: Mapping[str, float],
    truths: Mapping[str, Truth],
    weights: Mapping[str, Tensor],
) -> Mixed:
    """The truth of a mixture: of the dtype of its first average, at the time of the latest one."""
    parts = tuple((c, None if name == "raw" else truths[name]) for name, c in coefficients.items())
    first = next((part for _, part in parts if part is not None), next(iter(truths.values())))
    full = {
        fqn: sum(
            (c * (weights if part is None else part.full)[fqn].double() for c, part in parts),
            torch.zeros(()),
        )
        for fqn in first.full
    }
    t = max(truth.t for truth in truths.values())
    num_updates = max(truth.num_updates for truth in truths.values())
    return Mixed(first.settings, full, t, num_updates, t, parts=parts)
