"""The weight of each past step in an average, and the record of updates that it follows from."""

from __future__ import annotations

from shardema.profiles.history import History, Run, Segment
from shardema.profiles.ledger import Ledger
from shardema.profiles.profile import Profile

__all__ = ["History", "Ledger", "Profile", "Run", "Segment"]
