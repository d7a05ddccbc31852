"""Callables ``(t, dt) -> decay`` as schedules, and `as_schedule` for whatever a user passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardema.errors import ArgumentTypeError
from shardema.schedules.base import Schedule, check_decay, register, registered
from shardema.schedules.closed import constant

_SAMPLED = (1, 2, 10, 100, 1000, 100000)


@register
@dataclass(frozen=True)
class custom:
    """The decay of the update that advances the clock to ``t`` is ``fn(t, dt)``.

    A checkpoint stores the function's name and sampled values, never its code: pass the same
    function again at load.

    Args:
        fn: ``(t, dt) -> decay`` in [0, 1]; any other value raises ValueError at the update.
        unit: unit of the clock.

    Raises:
        TypeError: ``fn`` does not take two positional arguments.

    >>> custom(lambda t, dt: 0.9).retention(3, 4)
    0.9
    """

    fn: Callable[[float, float], float]
    unit: str = "step"

    def __post_init__(self) -> None:
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):  # of a builtin; of what is no callable the update says it
            return
        try:
            signature.bind(1, 1)
        except TypeError:
            raise ArgumentTypeError(
                f"schedule {self._name()}: got a callable of {signature}, expected (t, dt): the "
                "progress after the update, and that since the last one"
            ) from None

    def retention(self, t0: float, t1: float) -> float:
        decay = self.fn(t1, t1 - t0)
        check_decay(decay, f"schedule {self._name()} at t={t1}, dt={t1 - t0}")
        return float(decay)

    def store(self) -> dict[str, Any]:
        samples = [float(self.fn(t, 1)) for t in _SAMPLED]
        return {"fn": self._name(), "unit": self.unit, "samples": samples}

    def _name(self) -> str:
        return str(getattr(self.fn, "__qualname__", type(self.fn).__qualname__))


def as_schedule(value: Any) -> Schedule:
    """``value`` as a schedule: a float in [0, 1], a schedule, or a callable ``(t, dt) -> decay``.

    Raises:
        ValueError: a decay outside [0, 1].
        TypeError: anything else.
    """
    if isinstance(value, bool):
        raise ArgumentTypeError(
            f"schedule: got {value!r}, expected a decay, a schedule or a callable"
        )
    if isinstance(value, int | float):
        return constant(float(value))
    if isinstance(value, Schedule) and not isinstance(value, type):
        return value
    if callable(value) and not isinstance(value, type):
        return custom(value)
    raise ArgumentTypeError(
        f"schedule: got {value!r}, expected a decay in [0, 1], a schedule such as "
        "schedules.half_life(1000), or a callable (t, dt) -> decay"
    )


def needs_code(schedule: Any) -> bool:
    """Whether a part of the schedule is a callable, or of a class that is not registered."""
    kind = type(schedule)
    parts = (getattr(schedule, "schedule", None), *getattr(schedule, "schedules", ()))
    return (
        isinstance(schedule, custom)
        or registered().get(kind.__name__) is not kind
        or any(needs_code(part) for part in parts if part is not None)
    )
