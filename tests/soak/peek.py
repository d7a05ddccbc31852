"""What the checks look at without calling anything that could change it.

A public read would flush, free or close what is open, and hide the fault that it is there to find.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

from shardema import ShardedEMA
from shardema.shards.boxes import Box


def local_parts(model: nn.Module) -> list[Tensor]:
    """What the optimizer steps on this rank, whatever a forward has left gathered."""
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


def reshard(model: nn.Module) -> None:
    """Frees what a forward has left gathered, so that what is written to the parts is seen."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()  # an all-gather that is under way would be used by the next forward
            module.reshard()
        handle = module._handle if isinstance(module, FSDP) else None
        if handle is not None and hasattr(handle.flat_param, "_local_shard"):
            _reshard(module, handle, handle.uses_sharded_strategy)


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Full parameters by clean name, by torch's own means. Collective; frees what is gathered."""
    if isinstance(model, FSDP):
        return _full_of_fsdp1(model)
    reshard(model)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in inner.named_parameters()
    }


def shadows(ema: ShardedEMA, name: str) -> Iterator[tuple[str, Box, Tensor]]:
    """This rank's part of an average: tensor, place, values."""
    average = ema.internal.averages[name]
    for shard in ema.internal.averages.held(average):
        for box, values in shard.pieces(average.shadows.views[shard.fqn]):
            yield shard.fqn, box, values


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


def own_tensors(ema: ShardedEMA) -> list[Tensor]:
    """The model's own tensors of what is averaged, as far as this rank holds them."""
    return [
        s.own for s in ema.internal.averages.weights.mine if s.own.numel() and s.role != "buffer"
    ]


def wait(ema: ShardedEMA) -> None:
    """Returns when averages in host memory are up to date; ends no round, as `flush` does."""
    ema.internal.updates.flush("check")


def clock(ema: ShardedEMA, name: str) -> tuple[float, int]:
    """``t`` and the number of updates, without an update that is still to be made."""
    average = ema.internal.averages[name]
    return average.t, average.num_updates


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
