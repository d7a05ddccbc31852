"""Every rank holds whole tensors: a plain module, or one inside DDP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from shardema.backends.tree import named_tensors, tie_shared_storage, whole_shard
from shardema.shard import Shard


def matches(models: Sequence[nn.Module]) -> bool:
    """Always: this is what is left when no other backend matches."""
    return True


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """One whole shard for each parameter and persistent buffer."""
    return tie_shared_storage([whole_shard(named) for named in named_tensors(models, set())])


def ensure_sharded(models: Sequence[nn.Module]) -> None:
    """Nothing to do: whole tensors are always what the model computes with."""


def mark_written(models: Sequence[nn.Module]) -> None:
    """Nothing to do: autograd saw the in-place writes."""


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of DDP's process group; all of them for a plain module."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    groups = [
        module.process_group
        for model in models
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    ]
    if not groups:
        return None
    return tuple(sorted({r for group in groups for r in dist.get_process_group_ranks(group)}))


def engine(models: Sequence[nn.Module]) -> None:
    """None: the training loop steps the weights."""
