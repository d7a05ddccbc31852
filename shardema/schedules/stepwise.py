"""Rules that are given step by step: the decay of an interval is a product, kept by blocks.

::

    steps   1 ... 64 | 65 ... 128 | ...         a block is the product of 64 smaller ones
            |  64 ^ 1             | 64 ^ 1
            |  64 ^ 2 ...                       so an interval takes few factors, however long
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

from shardema.schedules.base import whole_steps

_SPAN = 64


class stepwise(ABC):
    """A schedule of whole steps n = 1, 2, ..., each with its own decay. Subclasses are hashable."""

    @abstractmethod
    def decay_at(self, step: int) -> float:
        """The decay of the update that brings the clock to ``step``, in [0, 1]."""

    def settled(self) -> float:
        """A step after which every decay is the same; infinite if there is none."""
        return math.inf

    def retention(self, t0: float, t1: float) -> float:
        a, b = whole_steps(t0, t1, f"schedules.{type(self).__name__}")
        if b == a + 1:
            return float(self.decay_at(b))
        end = self.settled()
        if end >= b:
            return _product(self, a, b)
        last = max(a, int(end))
        return _product(self, a, last) * float(self.decay_at(last + 1)) ** (b - last)


def _product(rule: stepwise, a: int, b: int) -> float:
    """The product of the decays of the steps in (a, b]."""
    kept = 1.0
    while a < b and kept:
        size = 1
        while a % (size * _SPAN) == 0 and a + size * _SPAN <= b:
            size *= _SPAN
        kept *= _block(rule, a, size) if size > 1 else rule.decay_at(a + 1)
        a += size
    return kept


@functools.lru_cache(maxsize=1 << 14)
def _block(rule: stepwise, a: int, size: int) -> float:
    """The product over (a, a + size], of which ``size``, a power of 64, is a divisor of ``a``."""
    part = size // _SPAN
    if part == 1:
        return math.prod(rule.decay_at(step) for step in range(a + 1, a + size + 1))
    return math.prod(_block(rule, start, part) for start in range(a, a + size, part))
