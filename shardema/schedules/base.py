"""The protocol of a schedule, and its form in a checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

from shardema.errors import ArgumentError

_REGISTRY: dict[str, type[Any]] = {}
_RULES: dict[str, type[Any]] = {}  # they choose a schedule per tensor and are none themselves
_S = TypeVar("_S", bound=type[Any])


@runtime_checkable
class Schedule(Protocol):
    """Anything with a unit and a multiplicative ``retention(t0, t1)``, ``0 <= t0 <= t1``."""

    @property
    def unit(self) -> str:
        """Unit of ``t``: ``"step"``, ``"sample"``, ``"token"``, ``"epoch"`` or the caller's own."""

    def retention(self, t0: float, t1: float) -> float:
        """Share of the average at ``t0`` that is left at ``t1``, in [0, 1]."""


def register(cls: _S) -> _S:
    """Class decorator: the schedule may be stored in a checkpoint by its name and parameters."""
    _REGISTRY[cls.__name__] = cls
    return cls


def register_rule(cls: _S) -> _S:
    """Class decorator: as `register`, for a rule that chooses a schedule per tensor."""
    _RULES[cls.__name__] = cls
    return cls


def registered() -> dict[str, type[Any]]:
    """Every schedule that can be restored from a checkpoint: ``{name: class}``."""
    return dict(_REGISTRY)


def describe(schedule: Any) -> dict[str, Any]:
    """The schedule as a checkpoint stores it: ``{"name": ..., "params": {...}}``.

    A schedule that is not registered is stored by its class name and sampled retentions, so that a
    load can check that it is given the same one again.
    """
    cls = type(schedule)
    if cls in (_REGISTRY.get(cls.__name__), _RULES.get(cls.__name__)):
        store = getattr(schedule, "store", None)
        params = store() if store is not None else _fields(schedule)
        return {"name": cls.__name__, "params": {k: _plain(v) for k, v in params.items()}}
    samples = [schedule.retention(float(t), float(t + 1)) for t in (0, 1, 9, 99, 999, 99999)]
    params = {"unit": schedule.unit, "samples": samples}
    return {"name": f"{cls.__module__}.{cls.__qualname__}", "params": params}


def restore(description: dict[str, Any]) -> Any:
    """The schedule that `describe` stored; None if it, or a part of it, was stored as samples."""
    name = str(description.get("name"))
    cls = _REGISTRY.get(name) or _RULES.get(name)
    params = description.get("params")
    if cls is None or not isinstance(params, dict) or "samples" in params:
        return None
    try:
        return cls(**{key: _restored(value) for key, value in params.items()})
    except _NeedsCode:
        return None


class _NeedsCode(Exception):
    """A part of a schedule was stored as samples, so its code is needed."""


def _fields(schedule: Any) -> dict[str, Any]:
    fields = dataclasses.fields(schedule)
    return {f.name: getattr(schedule, f.name) for f in fields if f.init}


def _plain(value: Any) -> Any:
    """A parameter as JSON can hold it: nested schedules are described, tuples become lists."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return describe(value) if isinstance(value, Schedule) else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(one) for one in value)
    if not isinstance(value, dict):
        return value
    part = restore(value)
    if part is None:
        raise _NeedsCode
    return part


def check_decay(decay: float, what: str) -> None:
    """Raises ValueError unless ``decay`` is a number in [0, 1]."""
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay <= 1:
        raise ArgumentError(
            f"{what}: got decay={decay!r}, expected a number in [0, 1], such as 0.9999"
        )


def check_positive(value: float, what: str) -> None:
    """Raises ValueError unless ``value`` is a finite number above zero."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < float("inf"):
        raise ArgumentError(f"{what}: got {value!r}, expected a finite number above 0")


def check_progress(value: float, what: str) -> None:
    """Raises ValueError unless ``value`` is a finite number of 0 or more."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 <= value < float("inf"):
        raise ArgumentError(f"{what}: got {value!r}, expected a finite number of 0 or more")


def check_count(value: int, what: str) -> None:
    """Raises ValueError unless ``value`` is a whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{what}: got {value!r}, expected a whole number of 1 or more")


def whole_steps(t0: float, t1: float, name: str) -> tuple[int, int]:
    """``(t0, t1)`` as integers.

    Raises:
        ValueError: one of them is not a whole number; ``name`` is the schedule in the message.
    """
    if t0 != int(t0) or t1 != int(t1):
        raise ArgumentError(
            f"{name}: got progress {t0} to {t1}, expected whole steps, since it is defined per "
            "step; call update(dt=...) with whole numbers or use schedules.half_life"
        )
    return int(t0), int(t1)
