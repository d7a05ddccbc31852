"""The masses of snapshots in cells of time, as a matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shardema.errors import ArgumentError
from shardema.posthoc.fitting import Fit, Vector, cells, fit
from shardema.posthoc.targets import Wanted, window
from shardema.profiles import Profile

_SAME = 1e-9


def update_points(profile: Profile) -> Vector:
    """The times at which the average changed, and before them that at which it began."""
    found = [np.array([profile.start], np.float64)]
    for segment in profile.segments:
        begin = segment.begin
        for run in segment.runs:
            found.append(np.linspace(begin, run.end, run.count + 1)[1:])
            begin = run.end
    return np.concatenate(found)


def matrix(
    snapshots: Sequence[tuple[str, Profile]], edges: Vector, also: tuple[str, float] | None = None
) -> tuple[Vector, list[tuple[str, float]]]:
    """Masses of the snapshots in cells, [r + n, m].

    Args:
        snapshots: name of the average and profile of each, by time.
        edges: of the cells, [n + 1].
        also: a source that has a row even if no snapshot has mass of it.

    Returns:
        The matrix, and what its first r rows are: ``("initial", time)`` for the weights that an
        average began with, ``("loaded", time)`` for what was loaded without its history.
    """
    columns: dict[int, Vector] = {}
    by_name: dict[str, list[int]] = {}
    for number, (name, _) in enumerate(snapshots):
        by_name.setdefault(name, []).append(number)
    for group in by_name.values():
        kept = _retained([snapshots[number][1] for number in group], edges)
        columns |= zip(group, map(np.diff, kept), strict=True)
    oldest = [_oldest(profile) for _, profile in snapshots]
    sources = sorted({source for source, mass in oldest if mass > 0} | ({also} if also else set()))
    first = np.zeros((len(sources), len(snapshots)))
    for number, (source, mass) in enumerate(oldest):
        if mass > 0:
            first[sources.index(source), number] = mass
    cells = np.stack([columns[number] for number in range(len(snapshots))], axis=1)
    return np.vstack([first, cells]), sources


def _oldest(profile: Profile) -> tuple[tuple[str, float], float]:
    unknown = profile.unknown
    if unknown > 0:
        return ("loaded", profile.start), unknown
    return ("initial", profile.start), profile.initial


def _retained(profiles: Sequence[Profile], edges: Vector) -> Iterator[Vector]:
    """What is left in each of what its average was at each edge, [n + 1].

    Of one history, each edge is asked of the first snapshot after it: what is left in a later one
    is that times what is left there of the first, since retentions are multiplicative.
    """
    before: tuple[Profile, Vector] | None = None
    for profile in profiles:
        times = np.maximum(edges, profile.start)
        kept = np.ones_like(edges)
        first = 0
        if before is not None and _continues(before[0], profile):
            first = int(np.searchsorted(edges, before[0].t, side="right"))
            kept[:first] = before[1][:first] * float(profile.retained([before[0].t])[0])
        last = int(np.searchsorted(edges, profile.t, side="right"))
        if last > first:
            kept[first:last] = profile.retained(times[first:last])
        before = profile, kept
        yield kept


def _continues(before: Profile, profile: Profile) -> bool:
    """Whether the updates of ``before`` are those that ``profile`` began with."""
    old, new = before.history, profile.history
    if (old.begin, old.imported) != (new.begin, new.imported):
        return False
    for one, other in zip(old.segments, new.segments, strict=False):
        if one.description != other.description or one.begin != other.begin:
            return False
    left = float(profile.retained([before.t])[0])
    some = np.linspace(before.start, before.t, 7)
    return bool(np.allclose(before.retained(some) * left, profile.retained(some), rtol=_SAME))


def solve(snapshots: Sequence[tuple[str, Profile]], wanted: Wanted, *, limited: bool) -> Fit:
    """The best coefficients of snapshots for a target.

    Args:
        snapshots: as for `matrix`; none later than the target.
        limited: as for `fit`.

    Raises:
        ValueError: a window that begins before what the snapshots hold.
    """
    latest = dict(snapshots)
    points = min(map(update_points, latest.values()), key=len)  # of the one that changes least
    begin = min(wanted.begin, *(profile.start for _, profile in snapshots))
    cuts = [wanted.begin, *(time for _, p in snapshots for time in (p.start, p.t))]
    points = np.unique(np.concatenate([[begin], points]))
    edges = cells(points, cuts, wanted.at, len(snapshots))
    start = ("initial", float(wanted.begin))
    masses, sources = matrix(snapshots, edges, start if wanted.initial > 0 else None)
    target = np.concatenate([np.zeros(len(sources)), wanted.masses(edges)])
    if wanted.initial > 0:
        target[sources.index(start)] = wanted.initial
    if isinstance(wanted.target, window):
        _check_covered(wanted, masses[len(sources) :], edges)
    return fit(masses, target, edges, limited=limited)


def _check_covered(wanted: Wanted, masses: Vector, edges: Vector) -> None:
    """Raises ValueError if a window begins before the first step that a snapshot has."""
    covered = np.flatnonzero(masses.any(axis=1))
    first = edges[covered[0]] if len(covered) else wanted.at
    if wanted.begin < first:
        raise ArgumentError(
            f"{wanted.target} at t={wanted.at:g}: the window begins at t={wanted.begin:g}, before "
            f"the first snapshot: what the snapshots hold is from t={first:g} on; give a shorter "
            "window or a later time"
        )
