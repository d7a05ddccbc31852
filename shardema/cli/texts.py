"""Profiles in words."""

from __future__ import annotations

from shardema.profiles import Profile


def unit_of(profile: Profile) -> str:
    """The unit of the average's clock; "unit" if its schedule needs code."""
    schedule = profile.segments[-1].schedule if profile.segments else None
    return "unit" if schedule is None else str(schedule.unit)


def describe(profile: Profile) -> str:
    """Where the mass of an average is, in a line."""
    unit, half = unit_of(profile), profile.since(0.5)
    parts = []
    if half is not None:
        parts.append(f"half of the mass in the last {_number(profile.t - half)} {unit}s")
    parts.append(f"as wide as a mean of {_number(profile.effective_updates)} updates")
    if profile.unknown > 0:
        parts.append(f"{100 * profile.unknown:.3g} % imported at {_number(profile.start)}")
    elif profile.initial > 0:
        parts.append(f"{100 * profile.initial:.3g} % initial weights")
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 1000 or value == int(value) else 1}f}"
