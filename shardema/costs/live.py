"""The cost of averages that exist: what this rank has allocated, and what follows from it."""

from __future__ import annotations

import math
import os

import torch

from shardema.costs.cost import Cost, finished, told_bytes
from shardema.costs.speeds import Speeds, disk_speed, link_speed, memory_speed
from shardema.policy import ShadowPolicy
from shardema.update.averages import Averages


def cost_of(averages: Averages, folder: str | os.PathLike[str] | None) -> Cost:
    """What the averages cost on this rank, measured with the speed of its device. Local.

    Args:
        folder: where the speed of the disk is measured; None leaves the seconds of files out.
    """
    weights, chosen = averages.weights, averages.weights.averaged_shards
    several = list(averages.values())
    shadows = [(average.policy, average.shadows.nbytes) for average in several]
    read = max(sum(shard.source.nbytes for shard in averages.held(average)) for average in several)
    numel = [math.prod(shard.shape) for shard in chosen]
    rest = [shard for shard in weights.shards if shard.fqn not in weights.averaged]
    sizes = {shard.fqn: math.prod(shard.shape) * shard.own.dtype.itemsize for shard in rest}
    buffers = sum(sizes[shard.fqn] for shard in rest if shard.role == "buffer")

    def full(itemsizes: list[int]) -> int:
        return sum(n * itemsize for n, itemsize in zip(numel, itemsizes, strict=True))

    stored = (
        full([average.policy.stored_dtype_for(s.source.dtype).itemsize for s in chosen])
        for average in several
    )
    own = [several[0].policy.dtype_for(s.source.dtype).itemsize for s in chosen]
    total = sum(nbytes for _, nbytes in shadows)
    return finished(
        shadows,
        parameters=sum(numel),
        tensors=len(chosen),
        world_size=averages.ranks.size,
        least_bytes=total,
        mean_bytes=total,
        read_bytes=read,
        save_bytes=sum(stored) + buffers,
        export_bytes=full(own) + sum(sizes.values()),
        model_dtype_bytes=full([s.own.dtype.itemsize for s in chosen]) + sum(sizes.values()),
        sent_bytes=_sent(averages),
        speeds=_speeds(averages, chosen[0].source.device, folder),
    )


def _sent(averages: Averages) -> int:
    """The messages of this rank in the first collective call; see `cost.told_bytes`."""
    policies = {average.policy.shard_replicas: average.policy for average in averages.values()}
    policies.setdefault(False, ShadowPolicy())  # the weights themselves are always told
    return sum(
        told_bytes([shard.boxes for shard in averages.weights.all_shards(policy)])
        for policy in policies.values()
    )


def _speeds(
    averages: Averages, device: torch.device, folder: str | os.PathLike[str] | None
) -> Speeds:
    """Of the devices that the averages are updated on."""
    policies = [average.policy for average in averages.values()]
    offloaded = [policy for policy in policies if policy.device == "cpu"]
    on_host = any(policy.compute == "host" for policy in offloaded)
    return Speeds(
        memory=memory_speed(torch.device("cpu") if on_host else device),
        link=link_speed(device) if offloaded else None,
        disk=None if folder is None else disk_speed(folder)[0],
    )
