"""DTensor parameters: ``fully_shard`` (FSDP2, HSDP), tensor parallel, and both together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shardema.backends.tree import Named, named_tensors, tie_shared_storage, whole_shard
from shardema.shard import REPLACED, Box, Shard


def matches(models: Sequence[nn.Module]) -> bool:
    """Some module was given to ``fully_shard``, or some parameter is a DTensor."""
    return any(
        isinstance(module, FSDPModule) or any(isinstance(p, DTensor) for p in _own(module))
        for model in models
        for module in model.modules()
    )


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """One box for each DTensor; what is no DTensor (``ignored_params``) is whole on every rank.

    Raises:
        ValueError: a DTensor is a partial sum.
    """
    return tie_shared_storage(
        [
            _dtensor_shard(named) if isinstance(named.tensor, DTensor) else whole_shard(named)
            for named in named_tensors(models, set())
        ]
    )


def _dtensor_shard(named: Named) -> Shard:
    param = named.tensor
    assert isinstance(param, DTensor)
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{named.fqn}: placements {param.placements} hold partial sums, which have no place in "
            "the full tensor; redistribute it to Shard or Replicate first"
        )
    shape = tuple(param.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        shape, param.device_mesh, param.placements
    )
    local: Tensor = param.to_local().detach()
    box = Box(tuple(offsets), tuple(sizes))
    assert tuple(local.shape) == box.sizes, (named.fqn, local.shape, box)
    boxes = (box,) if local.numel() else ()
    mesh = param.device_mesh
    same = [axis for axis, how in enumerate(param.placements) if how.is_replicate()]
    return Shard(
        named.fqn,
        local,
        shape,
        boxes,
        named.role,
        named.aliases,
        address=_address(named, param),
        replicas=tuple(mesh.get_group(axis) for axis in same),
    )


def _address(named: Named, param: DTensor) -> Callable[[], int]:
    table, key = named.table, named.key

    def address() -> int:
        if table.get(key) is not param:
            return REPLACED
        return param.to_local().data_ptr()

    return address


def ensure_sharded(models: Sequence[nn.Module]) -> None:
    """Frees gathered parameters: the root group stays gathered after an eval forward."""
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the version of the gathered parameters, which a pending backward compares.

    A graph from before the write holds those tensors, and FSDP would fill them with the new
    weights: autograd now raises instead.
    """
    for model in models:
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # torch < 2.13 has one group for each module
                groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
            for group in groups:
                for fsdp_param in group.fsdp_params:
                    gathered = getattr(fsdp_param, "_unsharded_param", None)
                    if gathered is not None:
                        torch.autograd.graph.increment_version(gathered)


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of the meshes that the parameters' own meshes were sliced from.

    A pipeline stage's mesh is a slice of the mesh of all stages: all of them share the model.
    """
    found: set[int] = set()
    for named in named_tensors(models, set()):
        if isinstance(named.tensor, DTensor):
            mesh = named.tensor.device_mesh
            root = getattr(mesh, "_get_root_mesh", lambda mesh=mesh: mesh)()
            found.update(root.mesh.flatten().tolist())
    return tuple(sorted(found)) or None


def engine(models: Sequence[nn.Module]) -> None:
    """None: the training loop steps the weights, and the wrapper gathers them in each forward."""
