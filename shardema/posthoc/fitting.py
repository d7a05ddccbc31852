"""Coefficients of snapshots: the least squares fit of their profiles to a target, in float64.

::

    time     |----|----|----|--|--|-|-|||      cells: cut at snapshots, finer before each of them
    profile i  m_i  mass of each cell          minimise  sum (sum_i x_i m_i - q)^2 / width
    target     q                               with      sum_i x_i = 1

The post-hoc EMA of Karras et al. 2024 (arXiv 2312.02696, appendix C) is the case of two power
averages, with integrals in place of cells. Masses of cells also exist where a density has none:
block means have edges, and that of ``1 - sqrt(x)`` is infinite at its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardema.errors import ArgumentError, abbreviate

Vector = NDArray[np.float64]

MAX_CELLS = 100_000
_EVEN = 8000  # cells of equal width
_TOWARDS = 200  # further ones before each snapshot, each narrower than the one before
_ENTRIES = 16_000_000  # of the matrix of masses
_NEGLIGIBLE = 1e-9  # of the largest coefficient
# Rounding errors of the snapshots are multiplied by up to the sum of |coefficients|; differences of
# long averages, which cancel, lose more than one digit.
MAX_AMPLIFICATION = 8.0
MAX_RESIDUAL = 0.1
_RANK = 1e-14  # of the largest singular value of the profiles
_RIDGES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Fit:
    """A linear combination of profiles, and how near it is to the target.

    Attributes:
        coefficients: one for each profile, summing to 1; exact zeros for those not used.
        edges: of the cells, [n + 1].
        target, reached: masses [r + n]: of r sources from before the first cell (the weights that
            an average began with, or that were loaded), and of the cells.
        residual: share of the mass that is in other cells than wanted: half the sum of the
            absolute differences, 0 to 1. The result differs from the target's average, in each
            element, by at most this times the difference of the largest and smallest value that
            the element had.
        root_residual: root of the objective over that of the target.
        amplification: the sum of the absolute coefficients.
        ridge: weight of the squared coefficients in the objective; 0 if it was not needed.
    """

    coefficients: Vector
    edges: Vector
    target: Vector
    reached: Vector
    residual: float
    root_residual: float
    amplification: float
    ridge: float


def cells(points: Vector, cuts: Sequence[float], at: float, profiles: int) -> Vector:
    """Edges of the cells up to ``at``: all update points, or so many that the matrix stays small.

    Args:
        points: the times of updates; the mass of a profile is there, and only there.
        cuts: times that are edges: of snapshots, starts of windows.
        profiles: how many there are; the more, the fewer cells.
    """
    fixed = [cut for cut in (*cuts, at) if points[0] <= cut <= at]
    points = points[points <= at]
    budget = max(100, min(MAX_CELLS, _ENTRIES // max(1, profiles)))
    if len(points) > budget:
        chosen = [np.linspace(0, len(points) - 1, min(_EVEN, budget // 2)).round().astype(int)]
        each = min(_TOWARDS, max(4, budget // 2 // len(fixed)))
        for place in np.searchsorted(points, fixed, side="right") - 1:
            before = np.geomspace(1, max(2, place), each).round().astype(int)
            chosen.append(np.clip(place - before, 0, None))
        points = points[np.unique(np.concatenate(chosen))]
    return np.unique(np.concatenate([points, fixed]))


def fit(masses: Vector, target: Vector, edges: Vector, *, limited: bool) -> Fit:
    """The coefficients.

    Args:
        masses: of each profile [r + n, m]; the first r rows are of what was there before the first
            cell, and count as cells of the smallest width.
        target: masses [r + n].
        edges: of the cells [n + 1].
        limited: use a ridge if the coefficients would amplify rounding errors.
    """
    steps = np.diff(edges)
    widths = np.concatenate([np.full(len(target) - len(steps), steps.min()), steps])
    root = np.sqrt(widths)[:, None]
    matrix, wanted = masses / root, target / root[:, 0]
    found, ridge = _solve(matrix, wanted, 0.0), 0.0
    if limited and np.abs(found).sum() > MAX_AMPLIFICATION:
        for weight in _RIDGES:
            other = _solve(matrix, wanted, weight)
            if np.abs(other).sum() <= MAX_AMPLIFICATION:
                found, ridge = other, weight
                break
    small = np.abs(found) <= _NEGLIGIBLE * np.abs(found).max()
    if small.any():
        kept = np.flatnonzero(~small)
        found = np.zeros_like(found)
        found[kept] = _solve(matrix[:, kept], wanted, ridge)
    reached = masses @ found
    return Fit(
        found,
        edges,
        target,
        reached,
        float(np.abs(reached - target).sum() / 2),
        float(np.linalg.norm(matrix @ found - wanted) / np.linalg.norm(wanted)),
        float(np.abs(found).sum()),
        ridge,
    )


def _solve(matrix: Vector, wanted: Vector, ridge: float) -> Vector:
    """Least squares with coefficients that sum to 1.

    ``x = mean + basis y``: the columns of the basis span the coefficients that sum to 0. QR first,
    so that the many cells are read once.
    """
    count = matrix.shape[1]
    mean = np.full(count, 1 / count)
    if count == 1:
        return mean
    basis = np.linalg.qr(np.ones((count, 1)), mode="complete")[0][:, 1:]
    reduced = np.array(np.linalg.qr(np.column_stack([matrix, wanted]), mode="r"))
    small, right = reduced[:, :-1], reduced[:, -1]
    weight = np.sqrt(ridge) * np.linalg.norm(wanted)
    system = np.vstack([small @ basis, weight * basis])
    aim = np.concatenate([right - small @ mean, -weight * mean])
    # differences of equal profiles are rounding errors: small beside the profiles, not each other
    negligible = _RANK * np.linalg.norm(small, 2)
    largest = np.linalg.norm(system, 2)
    if largest <= negligible:
        return mean
    found: Vector = mean + basis @ np.linalg.lstsq(system, aim, rcond=negligible / largest)[0]
    return found


def check(found: Fit, names: Sequence[str], what: str, allowed: float) -> None:
    """Raises ValueError unless the target is reached.

    Args:
        names: of the snapshots.
        what: the target, for the message.
        allowed: the largest residual.
    """
    if found.residual > allowed:
        raise ArgumentError(
            f"{what}: the snapshots reach it with a residual of {found.residual:.3g}: this share "
            f"of the weight would be on other steps than wanted, expected at most {allowed:g}; "
            "take snapshots more often, or at the window's start, of block means for a window; or "
            "allow it (allow_residual)"
        )
    if found.amplification > MAX_AMPLIFICATION:
        used = [n for n, c in zip(names, found.coefficients, strict=True) if c]
        raise ArgumentError(
            f"{what}: it is a difference of long averages: the coefficients of {abbreviate(used)} "
            f"sum to {found.amplification:.3g} in absolute value, so rounding errors grow by as "
            f"much, expected at most {MAX_AMPLIFICATION:g}; keep block means "
            "(schedules.block_mean) for windows, or allow it (allow_residual)"
        )
