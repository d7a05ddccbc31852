"""DeepSpeed engines without an optimizer: a ZeRO-3 teacher, whose forward gathers partitions.

::

    this rank's part of a parameter   ds_tensor [--------+pad]   in the model's dtype, often 16 bits
    a forward                         gathers all parts; small parameters stay gathered after it

Nothing steps such an engine, so it is no model to average, but an average may be written into its
parts. What a forward has left gathered is freed by `ensure_sharded`, also the small parameters that
DeepSpeed keeps for good: the next forward gathers them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import distributed as dist
from torch import nn

from shardema.backends import zero
from shardema.backends.passes import refuse_inside
from shardema.backends.tree import Named, named_tensors, tie_shared_storage, whole_shard
from shardema.shards.shard import Shard


def matches(models: Sequence[nn.Module]) -> bool:
    """One of the models is an engine without an optimizer."""
    return any(engine.basic_optimizer is None for engine in zero.engines(models))


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """This rank's part of each partitioned parameter, whole tensors of the rest.

    Raises:
        ValueError: an engine with an unsupported feature.
    """
    for engine in zero.engines(models):
        zero.refuse_unsupported(engine)
    return tie_shared_storage([_shard(named) for named in named_tensors(models, set())])


def _shard(named: Named) -> Shard:
    if not hasattr(named.tensor, "ds_id"):
        return whole_shard(named)
    return replace(zero.frozen_part(named), role=named.role)


def ensure_sharded(models: Sequence[nn.Module], *, force: bool = False) -> None:
    """Frees gathered parameters.

    Raises:
        RuntimeError: a forward or backward that needs them is running; not with ``force``.
    """
    if not force:
        refuse_inside(models)
    for engine in zero.engines(models):
        if engine.zero_optimization_stage() == 3:
            engine.optimizer.empty_partition_cache()


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the versions of the parameters, whose storage a pending backward holds."""
    zero.mark_written(models)


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of the engines' data-parallel groups."""
    groups = [engine.seq_data_parallel_group for engine in zero.engines(models)]
    return tuple(sorted({r for group in groups for r in dist.get_process_group_ranks(group)}))


def engine(models: Sequence[nn.Module]) -> None:
    """None: nothing steps the weights, and each forward gathers them."""
