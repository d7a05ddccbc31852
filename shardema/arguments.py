"""Validates the arguments of `ShardedEMA` and normalizes each to one form."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardema.errors import ArgumentError, ArgumentTypeError
from shardema.policy import ShadowPolicy
from shardema.schedules import Schedule, as_schedule, by_pattern, constant, custom, half_life
from shardema.shards.patterns import Rename

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of an average, and of its folder
_DEFAULT = "ema"  # the name of an average that was not given one


def as_models(model: Any, argument: str = "model") -> tuple[nn.Module, ...]:
    """``model`` as modules. Raises TypeError, or ValueError for an empty list."""
    models = tuple(model) if isinstance(model, list | tuple) else (model,)
    for one in models:
        if type(one).__module__.startswith("deepspeed.inference"):
            raise ArgumentTypeError(
                f"{argument}: got DeepSpeed's {type(one).__name__}, which does not train, expected "
                "the engine that deepspeed.initialize returned"
            )
        if not isinstance(one, nn.Module):
            raise ArgumentTypeError(
                f"{argument}: got {type(one).__name__}, expected a torch.nn.Module, wrapped as the "
                "training loop holds it, or a list of them"
            )
    if not models:
        raise ArgumentError(f"{argument}: got an empty list, expected one module or more")
    return models


Rule = Schedule | by_pattern


def one_of(schedule: Any, **numbers_by_name: Any) -> Any:
    """``schedule``, or a decay that was given under another name. Raises TypeError."""
    named = {word: value for word, value in numbers_by_name.items() if value is not None}
    given = [*(["schedule"] if schedule is not None else []), *named]
    if not given:
        raise ArgumentTypeError(
            "schedule: got None, expected a decay or another schedule, such as "
            "ShardedEMA(model, 0.999)"
        )
    if len(given) > 1:
        raise ArgumentTypeError(f"ShardedEMA: got {' and '.join(given)}, expected one of them")
    for word, value in named.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ArgumentTypeError(
                f"{word}: got {value!r}, expected a number; give others as schedule="
            )
        return value
    return schedule


@dataclass(frozen=True)
class Preset:
    """A preset of `shardema.presets` without its model; see `with_preset`.

    Attributes:
        schedule, options: arguments of `ShardedEMA`.
    """

    schedule: Any
    options: Mapping[str, Any]


def with_preset(schedule: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``schedule`` and ``options`` of `ShardedEMA`, where the schedule may be a preset.

    ``decay`` and ``beta`` among the options are the schedule, as for `ShardedEMA`.
    """
    left = dict(options)
    rule = one_of(schedule, **{word: left.pop(word, None) for word in ("decay", "beta")})
    if isinstance(rule, Preset):
        return rule.schedule, {**rule.options, **left}
    return rule, left


def as_schedules(schedule: Any) -> dict[str, Rule]:
    """``schedule`` as schedules by name. Raises ValueError or TypeError."""
    if isinstance(schedule, Preset):
        raise ArgumentTypeError(
            "schedule: got a preset without a model, expected a schedule; "
            "presets.NAME(model, ...) builds the ShardedEMA"
        )
    given = schedule if isinstance(schedule, Mapping) else {_DEFAULT: schedule}
    if not given:
        raise ArgumentError("schedule: got an empty dict, expected {name: schedule}")
    for name in given:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ArgumentError(
                f"schedule: got the name {name!r}; names are letters, digits, '.', '_' and '-'"
            )
    schedules: dict[str, Rule] = {
        name: rule if isinstance(rule, by_pattern) else as_schedule(rule)
        for name, rule in given.items()
    }
    units = {rule.unit for rule in schedules.values()}
    if len(units) > 1:
        raise ArgumentError(
            f"schedule: the averages count {sorted(units)}, expected one unit for all"
        )
    return schedules


def as_policies(shadow: Any, schedules: Mapping[str, Rule]) -> dict[str, ShadowPolicy]:
    """``shadow`` as policies by name. Raises ValueError or TypeError."""
    if isinstance(shadow, Mapping):
        if set(shadow) != set(schedules):
            raise ArgumentError(
                f"shadow: got policies for {sorted(shadow)}, expected {sorted(schedules)}"
            )
        return {name: shadow[name] for name in schedules}
    if not isinstance(shadow, ShadowPolicy):
        raise ArgumentTypeError(
            f"shadow: got {shadow!r}, expected a ShadowPolicy or {{name: policy}}"
        )
    return dict.fromkeys(schedules, shadow)


def as_teachers(into: Any, schedules: Mapping[str, Rule]) -> dict[str, tuple[nn.Module, ...]]:
    """``into`` as teachers by name of the average. Raises ValueError or TypeError."""
    if into is None:
        return {}
    if not isinstance(into, Mapping):
        if len(schedules) > 1:
            raise ArgumentError(
                f"into: got one teacher for the averages {sorted(schedules)}, expected one for "
                "each that is kept in a teacher: {name: teacher}"
            )
        into = dict.fromkeys(schedules, into)
    odd = sorted(set(into) - set(schedules))
    if odd or not into:
        raise ArgumentError(f"into: got teachers for {odd}, expected some of {sorted(schedules)}")
    return {name: as_models(models, "into") for name, models in into.items()}


def as_rename(rename: Any, into: Any) -> Rename | None:
    """``rename``, checked. Raises ValueError or TypeError."""
    if rename is None or callable(rename):
        found: Rename | None = rename
    elif isinstance(rename, Mapping) and rename:
        for part, other in rename.items():
            texts = isinstance(part, str) and isinstance(other, str)
            if not texts or not part or "." in part:
                raise ArgumentError(
                    f"rename: got {part!r}: {other!r}, expected parts of names between dots, such "
                    'as {"default": "old"}; for other changes a callable fqn -> fqn'
                )
        found = dict(rename)
    else:
        raise ArgumentTypeError(f"rename: got {rename!r}, expected {{part: part}} or a callable")
    if found is not None and into is None:
        raise ArgumentError("rename: got it without into=, expected both: into=model, rename=...")
    return found


def check_choices(source: Any, on_nonfinite: Any) -> None:
    """Raises ValueError for values that `ShardedEMA` does not know."""
    if source not in ("master", "model"):
        raise ArgumentError(f"source: got {source!r}, expected 'master' or 'model'")
    if on_nonfinite not in ("ignore", "skip", "raise"):
        raise ArgumentError(
            f"on_nonfinite: got {on_nonfinite!r}, expected 'ignore', 'skip' or 'raise'"
        )


def refuse_positional(op: str, given: tuple[Any, ...]) -> None:
    """Raises TypeError for positional arguments, which other libraries' updates accept."""
    if given:
        kinds = ", ".join(type(one).__name__ for one in given)
        raise ArgumentTypeError(
            f"{op}: got {kinds} without a keyword, expected {op}() or {op}(dt=<progress since the "
            "last update>): the EMA has its model and counts its steps, so omit the model and "
            "step of timm's update, and the parameters of diffusers' step"
        )


def increment(dt: Any, unit: str) -> float:
    """``dt`` as a Python number; a missing one is one step. Raises ValueError."""
    if dt is None:
        if unit != "step":
            raise ArgumentError(
                f"update: the schedule counts {unit}s, so say how many passed since the "
                f"last update: update(dt=<{unit}s>)"
            )
        return 1
    real = isinstance(dt, numbers.Real) and not isinstance(dt, bool)
    if not 0 <= (float(dt) if real else math.nan) < math.inf:
        raise ArgumentError(
            f"update: got dt={dt!r}, expected {unit}s since the last update, a number of "
            "0 or more (of a tensor its .item(), which waits for the device)"
        )
    return int(dt) if isinstance(dt, numbers.Integral) else float(dt)


def progress(t: Any, num_updates: Any, unit: str) -> tuple[float | None, int | None] | None:
    """Progress and number of updates of a loaded average; None if neither is given.

    If the unit is ``"step"``, each is derived from the other. Raises ValueError.
    """
    if t is None and num_updates is None:
        return None
    if t is not None:
        real = isinstance(t, numbers.Real) and not isinstance(t, bool)
        if not 0 <= (float(t) if real else math.nan) < math.inf:
            raise ArgumentError(f"load_full: got t={t!r}, expected {unit}s, a number of 0 or more")
        t = int(t) if isinstance(t, numbers.Integral) else float(t)
    if num_updates is not None:
        whole = isinstance(num_updates, numbers.Integral) and not isinstance(num_updates, bool)
        if not whole or num_updates < 0:
            raise ArgumentError(
                f"load_full: got num_updates={num_updates!r}, expected a whole number of 0 or more"
            )
        num_updates = int(num_updates)
    if unit == "step":
        t = num_updates if t is None else t
        if num_updates is None and t == int(t):
            num_updates = int(t)
    elif t is None:
        raise ArgumentError(
            f"load_full: got num_updates={num_updates} and no t; the schedule counts {unit}s, so "
            f"give the progress too: load_full(source, t=<{unit}s>, num_updates={num_updates})"
        )
    return t, num_updates


def suspicious_decay(schedule: Rule, decay: float | None, num_updates: int) -> float | None:
    """A decay of 1 or below 0.5, a likely mistake (1 - decay); None if it may be intended.

    Only constant decays are checked: schedules often start with 0, or wait with 1. A callable is
    checked at its 100th update, after such a start. Decays of `by_pattern` are taken as intended.

    Args:
        schedule: the average's schedule.
        decay: the decay of its last update.
        num_updates: its number of updates.
    """
    if isinstance(schedule, constant | half_life):
        if schedule.unit == "step":
            decay = schedule.retention(0, 1)
        elif num_updates != 1:
            return None
    elif not isinstance(schedule, custom) or num_updates != 100:
        return None
    return decay if decay is not None and (decay == 1 or decay < 0.5) else None


def check_dtype(op: str, dtype: Any) -> None:
    """Raises ValueError unless ``dtype`` is one that weights can be gathered in."""
    good = dtype is None or dtype == "model"
    if not good and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(
            f"{op}: got dtype={dtype!r}, expected None, 'model' or a floating-point torch.dtype"
        )
