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

import numpy as np
import torch
import xxhash
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
    stored = KEPT[settings["kept"]]
    seed = SEED if stored.get("dtype") == torch.bfloat16 else 0
    return replace(base, update_every=settings["update_every"], seed=seed, **stored)


KEPT: dict[str, dict[str, Any]] = {
    "auto": {},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "compensated": {"compensated": True},
}
SEED = 11  # of the averages that are rounded at random
_UNIT = {"float64": 2.0**-52, "bfloat16": 2.0**-7, "compensated": 2.0**-39}  # of the stored value


def rounded_at_random(value: Tensor, fqn: str, number: int) -> Tensor:
    """A full float64 tensor as its bfloat16 average stores it after update ``number``.

    To the bit, in the words of docs/precision.md and in numpy's integers modulo 2^64.
    """
    golden = 0x9E3779B97F4A7C15

    def mix(x: Any) -> Any:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    seed = xxhash.xxh3_64_intdigest(fqn.encode(), seed=SEED)
    update = mix(np.array([(seed + number * golden) % 2**64], np.uint64))
    places = np.arange(value.numel(), dtype=np.uint64) * np.uint64(golden)
    x = update + places
    noise = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(19)
    whole = value.cpu().contiguous().numpy().reshape(-1).view(np.uint64) + noise
    cut = (whole >> np.uint64(45) << np.uint64(45)).view(np.float64)
    return nearest(torch.from_numpy(cut).view(value.shape))


def nearest(value: Tensor) -> Tensor:
    """A float64 tensor that bfloat16 can hold."""
    return value.to(torch.bfloat16).double()


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
        loss: relative error of the values that it was last set to.
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
    loss: float = 0.0

    def __post_init__(self) -> None:
        self.full = {fqn: self._stored(value) for fqn, value in self.full.items()}
        self.first = dict(self.full)
        self._note()

    def _note(self) -> None:
        for fqn, value in self.full.items():
            peak = float(value.abs().max()) if value.numel() else 0.0
            self.largest[fqn] = max(self.largest.get(fqn, 0.0), peak)

    def _stored(self, value: Tensor) -> Tensor:
        """What it is set to: a bfloat16 average to the nearest."""
        return nearest(value.double()) if self.exact else value.double().clone()

    @property
    def exact(self) -> bool:
        """Whether its bits are known: rounding at random is a function of what is known."""
        return bool(self.settings["kept"] == "bfloat16")

    @property
    def dtype(self) -> torch.dtype:
        """In which it is read."""
        narrow = {"float64": torch.float64, "bfloat16": torch.bfloat16}
        return narrow.get(self.settings["kept"], torch.float32)

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
            if share:
                moved = now.clone() if share == 1 else value + share * (now - value)
                number = self.num_updates
                self.full[fqn] = rounded_at_random(moved, fqn, number) if self.exact else moved
            peak = float(now.abs().max()) if now.numel() else 0.0
            self.largest[fqn] = max(self.largest[fqn], peak)
        self.history += (Move(self.moved_at, self.t, taken),)
        self.moved_at = self.t
        self.moves += 1

    def set(self, full: Mapping[str, Tensor], t: float = 0, num_updates: int = 0) -> None:
        """The average is these values now; the clock is told."""
        self.full = {fqn: self._stored(full[fqn]) for fqn in self.full}
        self.t, self.num_updates, self.moved_at = t, num_updates, t
        self.moves, self.largest, self.loss = 0, {}, 0.0
        self._note()
        self.begins(imported=False)

    def take(self, other: Truth) -> None:
        """The values of another one were loaded, as full tensors; the clock stays."""
        self.full, self.moves, self.largest = dict(other.full), other.moves, dict(other.largest)
        self.loss = 2.0**-24 if self.settings["kept"] == "compensated" else 0.0  # float32's
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
        """How far what is stored may be from it: a rounding of the largest value at each move."""
        if self.exact:
            return 0.0
        eps = _UNIT.get(self.settings["kept"], torch.finfo(torch.float32).eps)
        # the library computes the weight of an update in the dtype of the average
        return (4 * (self.moves + 1) * eps + self.loss) * max(1.0, self.largest[fqn])

    def noise(self, fqn: str) -> float:
        """How far rounding at random may have led it from the sum of its weights."""
        unit = _UNIT["bfloat16"] if self.exact else 0.0
        return (self.moves + 1) * unit * self.largest[fqn]

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
        told = sum(abs(c) * part.bound(fqn) for c, part in self.parts if part is not None)
        eps = torch.finfo(self.dtype).eps
        # of a compensated average float32 is read, which need not be as near
        read = eps * sum(abs(c) * part.largest[fqn] for c, part in self.parts if part is not None)
        return told + read + eps * self.largest[fqn] + self.slack.get(fqn, 0.0)

    @property
    def exact(self) -> bool:
        return False

    def noise(self, fqn: str) -> float:
        return sum(abs(c) * part.noise(fqn) for c, part in self.parts if part is not None)


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
