"""Schedules whose retention over any interval has a closed form."""

from __future__ import annotations

import math
import re
from dataclasses import InitVar, dataclass, field
from typing import Literal

from shardema.errors import ArgumentError
from shardema.schedules.base import check_decay, check_positive, register, whole_steps


@register
@dataclass(frozen=True)
class constant:
    """``decay ** (t1 - t0)``.

    Args:
        decay: share of the average that is left after one unit of progress, in [0, 1].
        unit: unit of the clock.

    >>> constant(0.5).retention(0, 3)
    0.125
    """

    decay: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.constant")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.decay ** (t1 - t0))


_CLOCKS = {"ba": "step", "sp": "sample", "tok": "token"}
_TEXT = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)(ba|sp|tok|ep|dur)")


def parse_length(
    text: str, unit: str, epoch: float | None, run: float | None, what: str
) -> tuple[float, str]:
    """Parses a length such as ``"1000ba"``: progress, and its unit.

    ============  ====================================================
    ``"1000ba"``  batches, that is optimizer steps
    ``"512sp"``   samples
    ``"1e6tok"``  tokens
    ``"1ep"``     epochs, each ``epoch`` units long
    ``"0.1dur"``  a share of the run, which is ``run`` units long
    ============  ====================================================

    Raises:
        ValueError: it cannot be parsed, ``epoch`` or ``run`` is missing, or ``unit`` is another.

    >>> parse_length("0.1dur", "step", None, 5000, "half_life")
    (500.0, 'step')
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ArgumentError(
            f"{what}: got {text!r}, expected a number and a unit: 1000ba (batches), 512sp "
            "(samples), 1e6tok (tokens), 1ep (epochs) or 0.1dur (a share of the run)"
        )
    value, suffix = float(match[1]), match[2]
    if suffix in _CLOCKS:
        clock = _CLOCKS[suffix]
        if unit not in ("step", clock):
            raise ArgumentError(f"{what}: got {text!r} and unit={unit!r}, expected unit={clock!r}")
        return value, clock
    if suffix == "ep" and unit == "epoch":
        return value, unit
    name, length = ("epoch", epoch) if suffix == "ep" else ("run", run)
    if length is None:
        raise ArgumentError(f"{what}: got {text!r}, so give the length too: {name}=<{unit}s>")
    check_positive(length, f"{what}, {name}")
    return value * length, unit


@register
@dataclass(frozen=True)
class half_life:
    """``0.5 ** ((t1 - t0) / length)``.

    Args:
        length: progress that halves the average's retention, in ``unit``, above 0; or a string as
            in MosaicML Composer: ``"1000ba"`` (steps), ``"512sp"`` (samples), ``"1e6tok"``
            (tokens), ``"1ep"`` (epochs) or ``"0.1dur"`` (a share of the run).
        unit: unit of the clock; set by a string in ``ba``, ``sp`` or ``tok``.
        epoch: length of an epoch in ``unit``, for a string in ``ep``.
        run: length of the run in ``unit``, for a string in ``dur``.

    >>> half_life(1000).retention(0, 2000)
    0.25
    >>> half_life("0.1dur", run=5000)
    half_life(length=500.0, unit='step')
    """

    length: float | str
    unit: str = "step"
    epoch: InitVar[float | None] = field(default=None, kw_only=True)
    run: InitVar[float | None] = field(default=None, kw_only=True)

    def __post_init__(self, epoch: float | None, run: float | None) -> None:
        if isinstance(self.length, str):
            what = "schedules.half_life"
            length, unit = parse_length(self.length, self.unit, epoch, run, what)
            object.__setattr__(self, "length", length)
            object.__setattr__(self, "unit", unit)
        check_positive(self.length, "schedules.half_life, length")  # type: ignore[arg-type]

    def retention(self, t0: float, t1: float) -> float:
        return float(0.5 ** ((t1 - t0) / float(self.length)))


@register
@dataclass(frozen=True)
class half_life_ramp:
    """``0.5 ** (integral of dt / h(t) from t0 to t1)`` for a half-life h(t) that changes.

    With x = t / over, up to ``over`` ``h = begin + (end - begin) * x`` (linear) or
    ``h = end + (begin - end) * (1 + cos(pi * x)) / 2`` (cosine), and ``end`` after it. Both
    integrals are in closed form, so any interval is exact.

    Args:
        begin: half-life at progress 0, in ``unit``, above 0.
        end: half-life from progress ``over`` on.
        over: length of the ramp, in ``unit``, above 0.
        shape: ``"linear"`` or ``"cosine"``.
        unit: unit of the clock.

    >>> round(half_life_ramp(10, 1000, over=100).retention(100, 1100), 12)
    0.5
    """

    begin: float
    end: float
    over: float
    shape: Literal["linear", "cosine"] = "linear"
    unit: str = "step"

    def __post_init__(self) -> None:
        for name in ("begin", "end", "over"):
            check_positive(getattr(self, name), f"schedules.half_life_ramp, {name}")
        if self.shape not in ("linear", "cosine"):
            raise ArgumentError(
                f"schedules.half_life_ramp: got shape={self.shape!r}, expected 'linear' or 'cosine'"
            )

    def retention(self, t0: float, t1: float) -> float:
        halvings = self._halvings(t1) - self._halvings(t0)
        return float(0.5 ** max(0.0, halvings))  # rounding may make it negative

    def _halvings(self, t: float) -> float:
        """Number of half-lives between 0 and t."""
        x = min(1.0, t / self.over)
        after = max(0.0, t - self.over) / self.end
        if self.shape == "cosine":
            half = math.pi * x / 2
            angle = math.atan2(
                math.sqrt(self.end) * math.sin(half), math.sqrt(self.begin) * math.cos(half)
            )
            ramped = 2 * self.over * angle / (math.pi * math.sqrt(self.begin * self.end))
        elif self.begin == self.end:
            ramped = x * self.over / self.end
        else:
            slope = (self.end - self.begin) / self.over
            ramped = math.log1p(slope * x * self.over / self.begin) / slope
        return ramped + after


@register
@dataclass(frozen=True)
class ramp:
    """Step n = 1, 2, ... decays by ``min(decay, (1 + n) / (10 + n))``.

    The rule of TensorFlow's ExponentialMovingAverage with ``num_updates``. The product of
    (1 + n) / (10 + n) over n in (a, b] telescopes to the product of ``(a + k) / (b + k)`` over
    k = 2 ... 10, so any interval of whole steps has a closed form. Whole steps only.

    Args:
        decay: the decay at the end of the ramp, in [0, 1].

    >>> ramp(0.9999).retention(0, 1) == 2 / 11
    True
    """

    decay: float
    unit: str = "step"

    def __post_init__(self) -> None:
        check_decay(self.decay, "schedules.ramp")

    def retention(self, t0: float, t1: float) -> float:
        a, b = whole_steps(t0, t1, "schedules.ramp")
        end = self._end()
        if b == a + 1:
            return float(min(self.decay, (1 + b) / (10 + b)))
        ramped = math.prod((min(a, end) + k) / (min(b, end) + k) for k in range(2, 11))
        return float(ramped * self.decay ** (max(b, end) - max(a, end)))

    def _end(self) -> float:
        """The last step at which the ramp is at most ``decay``."""
        if self.decay == 1:
            return math.inf
        end = max(0, math.floor((10 * self.decay - 1) / (1 - self.decay)) + 1)
        while end > 0 and (1 + end) / (10 + end) > self.decay:
            end -= 1
        return end


@register
@dataclass(frozen=True)
class block_mean:
    """The equal mean of the updates in each block of ``length``, begun anew in the next block.

    The first update in a block copies the weights, and update n in it decays by ``(n - 1) / n``.
    So at the end of a block the average is the mean of this block only: such means, saved at the
    ends of blocks, can be merged afterwards to the mean over any of the blocks, or to that of a
    learning-rate decay (WSM, arXiv 2507.17634; PMA, arXiv 2505.12082).

    Args:
        length: of a block, in ``unit``, 1 or more.
        unit: unit of the clock.
        last: average only the last part of each block, of this length, and keep the mean of the
            block before until then; None averages all of it.

    >>> [round(block_mean(3).retention(t, t + 1), 4) for t in range(5)]
    [0.0, 0.5, 0.6667, 0.0, 0.5]
    """

    length: float
    unit: str = "step"
    last: float | None = None

    def __post_init__(self) -> None:
        check_positive(self.length, "schedules.block_mean, length")
        if self.length < 1:
            raise ArgumentError(
                f"schedules.block_mean: got length={self.length!r}, expected 1 {self.unit} or more"
            )
        if self.last is not None:
            check_positive(self.last, "schedules.block_mean, last")
            if self.last > self.length:
                raise ArgumentError(
                    f"schedules.block_mean: got last={self.last!r}, expected at most the length, "
                    f"{self.length!r}"
                )

    def retention(self, t0: float, t1: float) -> float:
        if t0 == t1:
            return 1.0
        first, last = t0 // self.length, math.ceil(t1 / self.length) - 1
        begin, end = t0 - first * self.length, t1 - last * self.length
        if first == last:
            return self._inside(begin, end)
        whole = last - first > 1  # blocks, each of which leaves nothing
        return 0.0 if whole else self._inside(begin, self.length) * self._inside(0, end)

    def _inside(self, begin: float, end: float) -> float:
        """Retention between two places in one block."""
        skipped = self.length - (self.length if self.last is None else self.last)
        if end <= skipped:
            return 1.0
        return max(0.0, begin - skipped) / (end - skipped)
