"""Decay schedules: frozen dataclasses with ``retention(t0, t1)``.

``retention(t0, t1)`` in [0, 1] is the share of the average at progress ``t0`` that is left at
``t1``, and it is multiplicative: ``r(a, c) == r(a, b) * r(b, c)``. So an update every k steps, a
changed batch size, or samples as the clock are exact. The decay of an update that advances the
clock to ``t`` is ``retention(t - dt, t)``. The attribute ``unit`` is the unit of the clock.
"""

from __future__ import annotations

from shardema.schedules.base import Schedule, describe, registered, restore
from shardema.schedules.by_pattern import by_pattern
from shardema.schedules.closed import block_mean, constant, half_life, half_life_ramp, ramp
from shardema.schedules.composed import clip, debiased, every, join, scaled, shift, start
from shardema.schedules.custom import as_schedule, custom
from shardema.schedules.power import edm, power, share
from shardema.schedules.stepwise import bema, exponential, linear, warmup

__all__ = [
    "Schedule",
    "as_schedule",
    "bema",
    "block_mean",
    "by_pattern",
    "clip",
    "constant",
    "custom",
    "debiased",
    "describe",
    "edm",
    "every",
    "exponential",
    "half_life",
    "half_life_ramp",
    "join",
    "linear",
    "power",
    "ramp",
    "registered",
    "restore",
    "scaled",
    "share",
    "shift",
    "start",
    "warmup",
]
