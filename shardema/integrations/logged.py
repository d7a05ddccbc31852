"""The metrics of averages, named for a tracker."""

from __future__ import annotations

import math

from shardema.ema import ShardedEMA


def logged(ema: ShardedEMA) -> dict[str, float]:
    """``ema/distance``, ``ema/decay`` and the other metrics of every average. Collective.

    Of several averages the name comes between: ``ema/fast/distance``. The parts of the model and
    the kernels are left out, and so is what is infinite, which no JSON has.
    """
    found = {}
    for name in ema.names:
        prefix = "ema" if ema.names == (name,) else f"ema/{name}"
        for key, value in ema.metrics(name).items():
            if "/" not in key and math.isfinite(value):
                found[f"{prefix}/{key}"] = value
    return found
