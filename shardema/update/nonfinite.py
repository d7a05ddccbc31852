"""What an update does with weights that are infinite or not a number."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch

from shardema.errors import abbreviate
from shardema.shards.shard import Shard, materialized
from shardema.update.averages import Averages

log = logging.getLogger(__name__)

OnNonfinite = Literal["ignore", "skip", "raise"]


class NonFinite:
    """Looks at the weights before an update.

    Args:
        policy: as ``on_nonfinite`` of `ShardedEMA`.
    """

    def __init__(self, averages: Averages, policy: OnNonfinite) -> None:
        self.policy = policy
        self._averages = averages

    def found(self) -> bool:
        """Whether some rank has a weight that is not finite. Collective, unless they are ignored.

        Raises:
            RuntimeError: there is one, and it is to be raised.
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
        if most != -least:  # told without another exchange; this one says by how much
            ranks.agree("update", same=self._averages.clocks())
        if not found:
            return False

        def report(told: list[list[str]]) -> str:
            return abbreviate(sorted({name for names in told for name in names}))

        told = ranks.agree("update (naming what is not finite)", lambda: names, report)
        text = f"rank {ranks.rank}: {told}: not finite, so the average is not updated"
        if self.policy == "raise":
            raise RuntimeError(f"{text}; find the step that broke the weights, and go on before it")
        if ranks.leader:
            log.warning(text)
        return True


def not_finite(shards: Sequence[Shard]) -> list[Shard]:
    """Those of the shards, none of them empty, whose source is not all finite.

    Waits once for each device.
    """
    found = []
    for device in {shard.source.device for shard in shards}:
        here = [shard for shard in shards if shard.source.device == device]
        largest = torch._foreach_norm([shard.source for shard in here], math.inf)
        told = torch.stack([norm.double() for norm in largest]).isfinite().tolist()
        found += [shard for shard, finite in zip(here, told, strict=True) if not finite]
    return found
