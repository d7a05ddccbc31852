"""Averages chosen afterwards: any profile at any snapshot of a run, and merges of checkpoints.

::

    Snapshots(ema, dir)  -train->  dir   -open(dir).target(power(0.1), at=t)->  Reconstruction
"""

from __future__ import annotations

from shardema.posthoc.fitting import Fit
from shardema.posthoc.merging import merge
from shardema.posthoc.reconstruction import Reconstruction, StoredRun
from shardema.posthoc.reconstruction import open_run as open
from shardema.posthoc.targets import merge_weights, window

__all__ = ["Fit", "Reconstruction", "StoredRun", "merge", "merge_weights", "open", "window"]
