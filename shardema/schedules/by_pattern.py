"""Different schedules for different tensors of one average, such as layer-wise decays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardema.errors import ArgumentError, ArgumentTypeError
from shardema.schedules.base import Schedule, register_rule
from shardema.schedules.custom import as_schedule
from shardema.shards.patterns import Pattern, fits

_REGEX = "re:"  # prefix of a regular expression in a checkpoint


@register_rule
@dataclass(frozen=True, init=False)
class by_pattern:
    """A tensor follows the schedule of the first pattern that matches its name, else ``default``.

    Pass it to `ShardedEMA` in place of a schedule. It is not a `Schedule` itself: wrap the
    schedules inside it (``clip``, ``start``), not the whole.

    Args:
        rules: ``{pattern: schedule}``. A pattern is a glob over fqns or a compiled regular
            expression; a schedule may be a decay or a callable. All have the same unit.
        default: for tensors that no pattern matches.

    Raises:
        ValueError: no rules, or schedules with different units.
        TypeError: a pattern or a schedule has another type.

    >>> rule = by_pattern({"*lora_*": 0.99}, default=0.9999)
    >>> rule.of(["layer.lora_A"]).retention(0, 1), rule.of(["layer.weight"]).retention(0, 1)
    (0.99, 0.9999)
    """

    rules: tuple[tuple[Pattern, Schedule], ...]
    default: Schedule

    def __init__(self, rules: Mapping[Pattern, Any] | Iterable[Any], default: Any) -> None:
        pairs: Iterable[Any] = rules.items() if isinstance(rules, Mapping) else rules
        made = tuple((_pattern(pattern), as_schedule(rule)) for pattern, rule in pairs)
        if not made:
            raise ArgumentError("schedules.by_pattern: got no rules, expected {pattern: schedule}")
        object.__setattr__(self, "rules", made)
        object.__setattr__(self, "default", as_schedule(default))
        units = sorted({schedule.unit for schedule in self.schedules})
        if len(units) > 1:
            raise ArgumentError(
                f"schedules.by_pattern: got schedules in {units}, expected one unit"
            )

    @property
    def unit(self) -> str:
        """Unit of the clock."""
        return self.default.unit

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The default, then the schedule of each pattern."""
        return (self.default, *(schedule for _, schedule in self.rules))

    def index(self, names: Iterable[str]) -> int:
        """Index into `schedules` of the schedule for a tensor with these names."""
        known = list(names)
        for place, (pattern, _) in enumerate(self.rules, 1):
            if fits(pattern, known):
                return place
        return 0

    def of(self, names: Iterable[str]) -> Schedule:
        """The schedule for a tensor with these names (a tied one has several)."""
        return self.schedules[self.index(names)]

    def store(self) -> dict[str, Any]:
        """The fields as a checkpoint stores them; `base.describe` describes the schedules."""
        named = tuple(
            (_REGEX + p.pattern if isinstance(p, re.Pattern) else p, rule) for p, rule in self.rules
        )
        return {"rules": named, "default": self.default}


def stored_parts(description: dict[str, Any]) -> tuple[list[Pattern], list[dict[str, Any]]]:
    """The patterns of a stored rule, and its schedules: the default, then one for each pattern.

    Args:
        description: as `base.describe` returns it; of a single schedule there are no patterns.
    """
    if description["name"] != by_pattern.__name__:
        return [], [description]
    rules, default = description["params"]["rules"], description["params"]["default"]
    return [_pattern(pattern) for pattern, _ in rules], [default, *(rule for _, rule in rules)]


def _pattern(value: Any) -> Pattern:
    if isinstance(value, str) and value.startswith(_REGEX):
        return re.compile(value.removeprefix(_REGEX))
    if isinstance(value, re.Pattern) and value.flags != re.compile("").flags:
        raise ArgumentError(
            f"schedules.by_pattern: got {value!r}; write its flags into the pattern, such as (?i), "
            "so that a checkpoint stores them"
        )
    if not isinstance(value, str | re.Pattern):
        raise ArgumentTypeError(
            f"schedules.by_pattern: got the pattern {value!r}, expected a glob or a compiled "
            "regular expression"
        )
    return value
