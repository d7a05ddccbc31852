"""What snapshots will cost and reach, before a run starts.

::

    schedules, steps -> profiles of the snapshots to come -> residual of each target
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardema.posthoc.masses import solve
from shardema.posthoc.targets import Wanted, window
from shardema.profiles import History, Profile, Run, Segment
from shardema.schedules import Schedule, describe, power, restore

_STDS = (0.05, 0.10, 0.15, 0.20, 0.25)
_SHARES = (0.1, 0.2, 0.4)  # of the run, for windows
_CURVES = ("linear", "minus-sqrt", "cosine")


@dataclass(frozen=True)
class Plan:
    """What the snapshots of a run will be.

    Attributes:
        steps: of the run.
        saves: how many are written, and how many of them are kept.
        nbytes: of all that are kept; of the largest one.
        residuals: by target, share of the weight on other steps than wanted, in the average at the
            end of the run; or why it cannot be had.
    """

    steps: int
    saves: int
    kept: int
    nbytes: int
    largest: int
    residuals: Mapping[str, float | str]

    def __str__(self) -> str:
        lines = [
            f"snapshots of {self.steps:,} steps: {self.saves} written, {self.kept} kept, "
            f"{self.nbytes / 1e9:.3g} GB in all, {self.largest / 1e9:.3g} GB the largest",
            "residual at the end (share of the weight on other steps than wanted):",
        ]
        for target, found in self.residuals.items():
            lines.append(f"  {target:<28} {found if isinstance(found, str) else f'{found:.2g}'}")
        return "\n".join(lines)


def planned_profile(schedule: Any, t: float, updates: int, update_every: int) -> Profile:
    """The profile at time ``t`` of an average that is updated evenly from 0 on."""
    every = max(1, updates // update_every)
    if restore(describe(schedule)) is None:  # a callable: asked at each update
        return Profile.of(schedule, [t * (n + 1) / every for n in range(every)])
    run = Run(t * every * update_every / updates, every)
    return Profile(History(0, False, (Segment(describe(schedule), 0, (run,)),)), t)


def default_targets(end: float, unit: str) -> dict[str, Any]:
    """Widths and windows by name, for a run that ends at time ``end``."""
    found: dict[str, Any] = {f"power({std:.2f})": power(std, unit) for std in _STDS}
    for share in _SHARES:
        for curve in _CURVES:
            made = window(share * end, curve)
            found[str(made)] = made
    return found


def residuals(
    snapshots: Sequence[tuple[str, Profile]], targets: Mapping[str, Schedule | window | Any]
) -> dict[str, float | str]:
    """The residual of each target at the time of the last snapshot, or why it has none."""
    at = snapshots[-1][1].t
    found: dict[str, float | str] = {}
    for name, target in targets.items():
        try:
            fitted = solve(snapshots, Wanted.of(target, at), limited=True)
        except ValueError as error:
            found[name] = f"not possible: {error}"
            continue
        found[name] = fitted.residual
    return found
