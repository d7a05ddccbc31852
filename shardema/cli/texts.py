"""Profiles in words."""

from __future__ import annotations

from shardema.profiles import Profile

_SEEN = 5e-5  # mass from which it is said


def unit_of(profile: Profile) -> str:
    """The unit of the average's clock; "unit" if it is not known."""
    if not profile.segments:
        return "unit"
    last = profile.segments[-1]
    unit = getattr(last.schedule, "unit", last.description["params"].get("unit"))
    return unit if isinstance(unit, str) else "unit"


def describe(profile: Profile) -> str:
    """Where the mass of an average is, in a line."""
    unit, half = unit_of(profile), profile.since(0.5)
    parts = []
    if half is not None:
        parts.append(f"half of the mass in the last {_counted(profile.t - half, unit)}")
    parts.append(f"as wide as a mean of {_counted(profile.effective_updates, 'update')}")
    if profile.unknown >= _SEEN:
        parts.append(f"{100 * profile.unknown:.3g} % imported at {_number(profile.start)}")
    elif profile.unknown == 0 and profile.initial >= _SEEN:
        parts.append(f"{100 * profile.initial:.3g} % initial weights")
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 or value == int(value) else 1}f}"


def _counted(value: float, noun: str) -> str:
    return f"{_number(value)} {noun}{'' if _number(value) == '1' else 's'}"
