"""Checks the weights for inf and NaN before an update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from shardema.devices import double
from shardema.errors import CallError, abbreviate, logger
from shardema.shards.shard import Shard, materialized
from shardema.update.averages import Averages

log = logger(__name__)

OnNonfinite = Literal["ignore", "skip", "raise"]


class NonFinite:
    """Checks the weights for inf and NaN before an update.

    Args:
        policy: as ``on_nonfinite`` of `ShardedEMA`.
    """

    def __init__(self, averages: Averages, policy: OnNonfinite) -> None:
        self.policy = policy
        self._averages = averages

    def found(self) -> bool:
        """Whether some rank has a weight that is not finite. Collective, unless "ignore".

        Raises:
            RuntimeError: there is one, and the policy is "raise".
        """
        if self.policy == "ignore":
            return False
        ranks, updates = self._averages.ranks, self._averages.num_updates
        names = [
            shard.fqn
            for group in materialized(self._averages.weights.averaged_shards)
            for shard in not_finite([s for s in group if s.source.numel()])
        ]
        found, most, least = ranks.max([float(bool(names)), updates, -updates])
        if most != -least:  # found without an exchange; this one reports the clocks
            ranks.agree("update", same=self._averages.clocks())
        if not found:
            return False

        def report(gathered: list[list[str]]) -> str:
            return abbreviate(sorted({name for names in gathered for name in names}))

        listed = ranks.agree("update (naming what is not finite)", lambda: names, report)
        text = f"rank {ranks.rank}: {listed}: not finite, so the average is not updated"
        if self.policy == "raise":
            raise CallError(f"{text}; resume from a checkpoint before the step that caused it")
        if ranks.leader:
            log.warning(text)
        return True


def not_finite(shards: Sequence[Shard]) -> list[Shard]:
    """The shards whose source has inf or NaN; none of ``shards`` is empty. One sync per device."""
    found = []
    for device in {shard.source.device for shard in shards}:
        here = [shard for shard in shards if shard.source.device == device]
        largest = torch._foreach_norm([shard.source for shard in here], math.inf)
        all_finite = torch.stack([double(norm) for norm in largest]).isfinite().tolist()
        found += [shard for shard, finite in zip(here, all_finite, strict=True) if not finite]
    return found
