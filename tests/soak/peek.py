"""What the checks look at without calling anything that could change it.

A public read would flush, free or close what is open, and hide the fault that it is there to find.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

from shardema import ShardedEMA
from shardema.kernels import rounding
from shardema.shards.boxes import Box
from tests import engines


def is_engine(model: Any) -> bool:
    """Whether DeepSpeed steps the model."""
    return hasattr(model, "micro_steps")


def local_parts(model: nn.Module) -> list[Tensor]:
    """What the optimizer steps on this rank, whatever a forward has left gathered."""
    if is_engine(model):
        return engines.held(model)
    parts: list[Tensor] = []
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, FSDP):
            handle = module._handle
            if handle is not None and id(handle) not in seen:
                seen.add(id(handle))
                flat = handle.flat_param
                parts.append(getattr(flat, "_local_shard", flat).detach())
        elif isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                parts += [p.sharded_param.to_local().detach() for p in group.fsdp_params]
    if parts:
        return parts
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]


def gathered_for_good(model: nn.Module) -> dict[str, Tensor]:
    """Copies of an engine's weights that a forward does not gather again."""
    return engines.persistent(model) if is_engine(model) else {}


def gather(model: nn.Module) -> None:
    """What was written to an engine's parts is what it computes with. Collective."""
    if is_engine(model):
        engines.gather_persistent(model)


def reshard(model: nn.Module) -> None:
    """Frees what a forward has left gathered, so that what is written to the parts is seen."""
    if is_engine(model):
        model.empty_partition_cache()
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()  # an all-gather that is under way would be used by the next forward
            module.reshard()
        handle = module._handle if isinstance(module, FSDP) else None
        if handle is not None and hasattr(handle.flat_param, "_local_shard"):
            _reshard(module, handle, handle.uses_sharded_strategy)


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters by clean name, by torch's own means. Collective; frees what is gathered."""
    if is_engine(model):
        reshard(model)  # what a forward that ended early has left in flight cannot be parted
        full = engines.weights(model)
        engines.gather_persistent(model)
        return full
    if isinstance(model, FSDP):
        return _full_of_fsdp1(model)
    reshard(model)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in inner.named_parameters()
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters as the optimizer steps them: an engine's masters. Collective."""
    full = full_parameters(model)
    return full | engines.masters(model) if is_engine(model) else full


def shadows(ema: ShardedEMA, name: str) -> Iterator[tuple[str, Box, Tensor]]:
    """This rank's part of an average, with its lost bits if it has any: tensor, place, values."""
    average = ema.internal.averages[name]
    for shard in ema.internal.averages.held(average):
        kept = average.shadows.views[shard.fqn]
        if shard.fqn in average.shadows.companions:
            kept = rounding.compensated_value(kept, average.shadows.companions[shard.fqn])
        for box, values in shard.local_boxes(kept):
            yield shard.fqn, box, values


def computed_with(model: nn.Module) -> Iterator[tuple[str, Box | None, Tensor]]:
    """What a forward gathers, or has gathered: tensor, this rank's place in it, values."""
    for fqn, param in model.named_parameters():
        if not isinstance(param, DTensor):
            yield fqn, None, param.detach()
            continue
        mesh, local = param.device_mesh, param.to_local().detach()
        rows = torch.arange(param.shape[0]).chunk(mesh.size())[: mesh.get_local_rank()]
        offsets = (sum(map(len, rows)), *(0,) * (local.dim() - 1))
        yield fqn, Box(offsets, tuple(local.shape)), local


def _full_of_fsdp1(model: FSDP) -> dict[str, Tensor]:
    """By the flat parameters' own lists: a frozen one may be no parameter after a forward."""
    prefixes = {
        id(module): "".join(f"{part}." for part in name.split(".") if part not in ("", _WRAPPED))
        for name, module in model.named_modules()
    }
    full = {}
    with FSDP.summon_full_params(model, writeback=False):
        for module in FSDP.fsdp_modules(model):
            for info in module._handle.flat_param._param_infos if module._handle else ():
                tensor = getattr(info.module, info.param_name)
                full[f"{prefixes[id(info.module)]}{info.param_name}"] = tensor.detach().clone()
    return full


_WRAPPED = "_fsdp_wrapped_module"


def own_tensors(ema: ShardedEMA, model: nn.Module) -> list[Tensor]:
    """The model's own tensors of what is averaged, as far as this rank holds them.

    Of an engine those that are not parted: the parts of others are no user's to write.
    """
    if is_engine(model):
        return [p for p in model.parameters() if p.requires_grad and not hasattr(p, "ds_id")]
    return [
        s.own
        for s in ema.internal.averages.weights.averaged_shards
        if s.own.numel() and s.role != "buffer"
    ]


def flats(ema: ShardedEMA) -> set[int]:
    """Addresses of the memory that the averages lie in."""
    found = (flat for average in ema.internal.averages.values() for flat in average.shadows.flats)
    return {flat.untyped_storage().data_ptr() for flat in found}


def parts(ema: ShardedEMA) -> Iterator[tuple[str, Box, Tensor]]:
    """What this rank's model computes with of what is averaged: tensor, place, values."""
    for shard in ema.internal.averages.weights.averaged_shards:
        for box, values in shard.local_boxes(shard.own):
            yield shard.fqn, box, values


def awaited(model: FSDPModule) -> torch.Event | None:
    """What the next all-gather waits for in place of the present stream."""
    event: torch.Event | None = model._get_fsdp_state()._state_ctx.post_optim_event
    return event


def left_in_store() -> list[str]:
    """Keys of shardema's in the store of the process group."""
    keys: list[str] = dist.distributed_c10d._get_default_store().list_keys()
    return [key for key in keys if "shardema" in key]


def held_now() -> tuple[int, int, int]:
    """Bytes of all tensors, threads, and open files of this process."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return size, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def wait(ema: ShardedEMA) -> None:
    """Returns when averages in host memory are up to date; ends no round, as `flush` does."""
    ema.internal.updates.flush("check")


def clock(ema: ShardedEMA, name: str) -> tuple[float, int, float]:
    """``t``, number of updates and ``t`` of the last move, without an update still to be made."""
    average = ema.internal.averages[name]
    return average.t, average.num_updates, average.moved_at


def began(ema: ShardedEMA, name: str) -> tuple[float, bool]:
    """When its history begins, and whether that is with values whose own is not known."""
    history = ema.internal.averages[name].ledger.history()
    return history.begin, history.imported


def loaded(ema: ShardedEMA, name: str) -> bool:
    """Whether the values of an average have come from a file or a state."""
    return ema.internal.averages[name].loaded


def inside(ema: ShardedEMA) -> str | None:
    """The average that the model holds."""
    return ema.internal.calls.swap.inside


def averaged(ema: ShardedEMA) -> frozenset[str]:
    return frozenset(ema.internal.averages.weights.averaged)


def equal(a: Tensor, b: Tensor) -> bool:
    """To the bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat if flat.dtype == torch.bool else flat.view(torch.uint8)
