"""Mixtures with a name of their own; any other is `ShardedEMA.mix`."""

from __future__ import annotations

from shardema.ema import ShardedEMA
from shardema.update.mixture import Mixture


def bema(
    ema: ShardedEMA, *, bias_power: float = 0.2, lag: int = 10, multiplier: float = 1.0
) -> Mixture:
    """The bias-corrected average of `presets.trl_bema`: ``EMA_t + alpha_t (theta_t - theta_0)``.

    ``alpha_t = (lag + multiplier * t) ** -bias_power``; Block and Zhang 2025, arXiv 2508.00180.
    Make it anew for each evaluation, since ``alpha_t`` is that of the moment::

        ema = presets.trl_bema(model, update_freq=400)
        with ema.swap(mixtures.bema(ema)):
            evaluate(model)

    At the steps at which TRL updates, the values are TRL's; in between TRL keeps those of its last
    update.

    Args:
        ema: with the averages ``"ema"`` and ``"start"``, as `presets.trl_bema` has them.
        bias_power, lag, multiplier: as in TRL; lag and multiplier as given to `presets.trl_bema`.

    Raises:
        ValueError: ``ema`` has other averages.
    """
    alpha = float((lag + multiplier * ema.t) ** -bias_power)
    return ema.mix({"raw": alpha, "ema": 1.0, "start": -alpha})
