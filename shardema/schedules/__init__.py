"""How fast an average forgets: a schedule is a frozen value with ``retention(t0, t1)``.

``retention(t0, t1)`` in [0, 1] is the share of the average at progress ``t0`` that is left at
``t1``, and it is multiplicative: ``r(a, c) == r(a, b) * r(b, c)``. So an update every k steps, a
changed batch size, or samples as the clock are exact. The decay of an update that brings the
clock to ``t`` is ``retention(t - dt, t)``. A schedule carries the ``unit`` of its clock.
"""

from __future__ import annotations

from shardema.schedules.base import Schedule, describe, registered, restore
from shardema.schedules.by_pattern import by_pattern
from shardema.schedules.clip import clip
from shardema.schedules.constant import constant
from shardema.schedules.custom import as_schedule, custom
from shardema.schedules.debiased import debiased
from shardema.schedules.edm import edm
from shardema.schedules.every import every
from shardema.schedules.exponential import exponential
from shardema.schedules.half_life import half_life
from shardema.schedules.half_life_ramp import half_life_ramp
from shardema.schedules.join import join
from shardema.schedules.linear import linear
from shardema.schedules.power import power
from shardema.schedules.ramp import ramp
from shardema.schedules.scaled import scaled
from shardema.schedules.start import shift, start
from shardema.schedules.warmup import warmup

__all__ = [
    "Schedule",
    "as_schedule",
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
    "shift",
    "start",
    "warmup",
]
