"""Every rank holds whole tensors: a plain module, or one inside DDP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardema.backends.subclasses import mark_wrapped
from shardema.backends.tree import named_tensors, tie_shared_storage, whole_shard
from shardema.shards.shard import Shard


def matches(models: Sequence[nn.Module]) -> bool:
    """Always True: used when no other backend matches."""
    return True


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """One whole shard for each parameter and persistent buffer."""
    groups = {
        id(param): wrapper.process_group
        for wrapper in _wrappers(models)
        for name, param in wrapper.module.named_parameters(remove_duplicate=False)
        if name not in wrapper.parameters_to_ignore
    }
    shards = []
    for named in named_tensors(models, set()):
        group = groups.get(id(named.tensor))
        shards.append(replace(whole_shard(named), replicas=() if group is None else (group,)))
    return tie_shared_storage(shards)


def _wrappers(models: Sequence[nn.Module]) -> Iterator[DistributedDataParallel]:
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                yield module


def ensure_sharded(models: Sequence[nn.Module], *, force: bool = False) -> None:
    """Does nothing: no weights are gathered."""


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the versions of wrapper subclasses; autograd has seen the writes to other tensors."""
    mark_wrapped(param for model in models for param in model.parameters())


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of DDP's process group; all of them for a plain module."""
    groups = [wrapper.process_group for wrapper in _wrappers(models)]
    if not groups:
        return None
    return tuple(sorted({r for group in groups for r in dist.get_process_group_ranks(group)}))


def engine(models: Sequence[nn.Module]) -> None:
    """None: the training loop steps the weights."""
