"""Exponential moving averages of model weights for sharded training; see `ShardedEMA`."""

from __future__ import annotations

from shardema import importers, mixtures, posthoc, presets, publishing, schedules
from shardema.batchnorm import update_bn
from shardema.config import EMAConfig
from shardema.ema import ShardedEMA
from shardema.errors import CheckpointError, RankError, SwapError
from shardema.files.background import PendingSave
from shardema.files.profiles import read_profile
from shardema.manager import CheckpointManager
from shardema.policy import ShadowPolicy
from shardema.profiles import Profile
from shardema.snapshots import Snapshots
from shardema.update.mixture import Mixture

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "EMAConfig",
    "Mixture",
    "PendingSave",
    "Profile",
    "RankError",
    "ShadowPolicy",
    "ShardedEMA",
    "Snapshots",
    "SwapError",
    "importers",
    "mixtures",
    "posthoc",
    "presets",
    "publishing",
    "read_profile",
    "schedules",
    "update_bn",
]
__version__ = "0.1.0"
