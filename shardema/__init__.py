"""EMA of model weights for sharded training; the face is `ShardedEMA`."""

from __future__ import annotations

from shardema import schedules
from shardema.ema import ShardedEMA
from shardema.errors import CheckpointError, RankError
from shardema.shadows import ShadowPolicy

__all__ = ["CheckpointError", "RankError", "ShadowPolicy", "ShardedEMA", "schedules"]
__version__ = "0.1.0"
