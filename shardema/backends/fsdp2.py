"""DTensor parameters: ``fully_shard`` (FSDP2, HSDP), tensor parallel, and both together."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from shardema.backends.passes import refuse_inside
from shardema.backends.subclasses import kind_of, mark_wrapped, pointer, values_of
from shardema.backends.tree import (
    Named,
    named_tensors,
    refuse_part,
    tie_shared_storage,
    whole_shard,
)
from shardema.errors import ArgumentError
from shardema.shards.boxes import Box, Dims
from shardema.shards.shard import REPLACED, Shard


def matches(models: Sequence[nn.Module]) -> bool:
    """Some module was passed to ``fully_shard``, or some parameter is a DTensor."""
    return any(
        isinstance(module, FSDPModule) or any(isinstance(p, DTensor) for p in _own(module))
        for model in models
        for module in model.modules()
    )


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module._parameters.values() if p is not None)


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """The boxes of each DTensor, and whole shards of other tensors (``ignored_params``).

    Raises:
        ValueError: a DTensor holds partial sums, or its local part does not match its placements.
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
    part = param.to_local()
    local = values_of(part)
    corners, boxes = _boxes_of(named.fqn, param, tuple(part.shape))
    one = len(boxes) <= 1
    mesh = param.device_mesh
    same = [axis for axis, how in enumerate(param.placements) if how.is_replicate()]
    return Shard(
        named.fqn,
        part.detach() if local is None else local,
        tuple(param.shape),
        boxes,
        named.role,
        named.aliases,
        address=_address(named, param),
        replicas=tuple(mesh.get_group(axis) for axis in same),
        corners=() if one else corners,
        opaque=kind_of(part) if local is None else "",
    )


def _boxes_of(fqn: str, param: DTensor, sizes: Dims) -> tuple[tuple[Dims, ...], tuple[Box, ...]]:
    """The offset of each box in the local part ``[*sizes]``, and the boxes.

    Raises:
        ValueError: partial sums, unknown placements, or a part whose shape does not match them.
    """
    odd = [how for how in param.placements if not isinstance(how, _KNOWN)]
    if any(placement.is_partial() for placement in param.placements):
        raise ArgumentError(
            f"{fqn}: placements {param.placements} hold partial sums, which have no place in "
            "the full tensor; redistribute it to Shard or Replicate first"
        )
    if param.numel() == 0:  # FSDP2 keeps [0, 0] of [4, 0]
        return (), ()
    chunks = _declared(param)
    if chunks is not None:  # by its maker; torch.distributed.checkpoint uses them, too
        held = [chunk for chunk in chunks if chunk.numel]
        if not held and 0 in sizes:
            return (), ()
        if len(held) == 1 and held[0].sizes == sizes:
            return ((0,) * len(sizes),), tuple(held)
    stretches = None if odd or chunks is not None else _stretches(param)
    if stretches is None or tuple(sum(s for *_, s in dim) for dim in stretches) != sizes:
        expected = [] if stretches is None else [sum(s for *_, s in dim) for dim in stretches]
        raise ArgumentError(
            f"rank {dist.get_rank()}: {fqn}: got a local part of shape {list(sizes)}, expected "
            f"{expected or 'Shard and Replicate placements'} by the placements {param.placements} "
            f"of shape {list(param.shape)}; shard it by distribute_tensor or fully_shard, or let "
            "its local tensor declare the chunks (__create_chunk_list__)"
        )
    parts = [p for p in itertools.product(*stretches) if all(size for *_, size in p)]
    return (
        tuple(tuple(at for at, _, _ in part) for part in parts),
        tuple(
            Box(tuple(start for _, start, _ in part), tuple(size for *_, size in part))
            for part in parts
        ),
    )


_KNOWN = (ShardPlacement, _StridedShard, Replicate)
_Stretch = tuple[int, int, int]  # offset in the local dim, offset in the full dim, length


def _declared(param: DTensor) -> list[Box] | None:
    """The chunks that the local tensor declares (``__create_chunk_list__``), or None."""
    chunk_list = getattr(param._local_tensor, "__create_chunk_list__", None)
    if chunk_list is None:
        return None
    listed = chunk_list()
    return [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in listed]


def _stretches(param: DTensor) -> list[list[_Stretch]]:
    """For each dim, the contiguous ranges of the full dim that the local part holds, in order."""
    shape, mesh = tuple(param.shape), param.device_mesh
    placements: tuple[Any, ...] = param.placements
    strided = {how.dim for how in placements if isinstance(how, _StridedShard)}
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, param.placements)
    if not strided:
        return [[(0, start, size)] for start, size in zip(offsets, sizes, strict=True)]
    at = mesh.get_coordinate()
    assert at is not None, mesh
    cuts = [
        (how.dim, (getattr(how, "split_factor", 0), mesh.size(axis), at[axis]))
        for axis, how in enumerate(placements)
        if not how.is_replicate()
    ]
    return [
        list(_cut(shape[dim], tuple(cut for of, cut in cuts if of == dim)))
        if dim in strided
        else [(0, offsets[dim], sizes[dim])]
        for dim in range(len(shape))
    ]


@functools.lru_cache(maxsize=1024)
def _cut(size: int, cuts: tuple[tuple[int, int, int], ...]) -> tuple[_Stretch, ...]:
    """The rows of a dim of ``size`` that this rank holds, from torch's own splits, axis by axis.

    Args:
        cuts: for each mesh axis, the split factor (0 for a plain shard), the number of parts and
            the index of this rank's part.
    """
    rows = torch.arange(size, device="cpu")
    for factor, count, index in cuts:
        how = _StridedShard(0, split_factor=factor) if factor else ShardPlacement(0)
        rows = how._split_tensor(rows, count, with_padding=False)[0][index]
    if not len(rows):
        return ((0, 0, 0),)
    starts = [0, *(rows.diff() != 1).nonzero().flatten().add(1).tolist()]
    stops = [*starts[1:], len(rows)]
    return tuple((a, int(rows[a]), b - a) for a, b in zip(starts, stops, strict=True))


def _address(named: Named, param: DTensor) -> Callable[[], int]:
    def address() -> int:
        if named.now() is not param:
            return REPLACED
        return pointer(param.to_local())

    return address


def _groups(models: Iterable[nn.Module]) -> Iterator[Any]:
    """The parameter groups of ``fully_shard`` in the models, each once."""
    seen: set[int] = set()
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in _groups_of(module._get_fsdp_state()):
                    if id(group) not in seen:
                        seen.add(id(group))
                        yield group


def _groups_of(state: Any) -> Sequence[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    # torch < 2.13 has one group for each module
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def ensure_sharded(models: Sequence[nn.Module], *, force: bool = False) -> None:
    """Frees gathered parameters: the root group stays gathered after an eval forward.

    A pending all-gather (a prefetch of a layer that was then skipped, ``unshard(async_op=True)``)
    is awaited and discarded: else the next forward would use its result, without later writes.

    Raises:
        RuntimeError: a forward or backward that needs them is running; not with ``force``.
    """
    groups = list(_groups(models))
    busy = [group for group in groups if group._training_state.name != "IDLE"]
    if busy and not force:
        refuse_inside(models)
    for group in groups:
        _forget_pending(group)
        # `reshard` leaves some gathered after a forward that raised
        group._to_sharded()


def _forget_pending(group: Any) -> None:
    pending = getattr(group, "_all_gather_result", None)
    if pending is None:
        return
    if pending.all_gather_event is not None:
        group.device_handle.current_stream(group.device).wait_event(pending.all_gather_event)
    if hasattr(pending.all_gather_work, "wait"):
        pending.all_gather_work.wait()
    group._all_gather_result = None


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the versions of the gathered parameters, which a pending backward checks.

    A graph from before the write holds these tensors, and FSDP would gather the new weights into
    them: with the new version autograd raises instead. An event of ``set_post_optim_event`` was
    recorded before the write; it is cleared, so that the next all-gather waits for the current
    stream.
    """
    for group in _groups(models):
        for fsdp_param in group.fsdp_params:
            gathered = getattr(fsdp_param, "_unsharded_param", None)
            if gathered is not None:
                torch.autograd.graph.increment_version(gathered)
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module._get_fsdp_state()._state_ctx.post_optim_event = None
        with torch.no_grad():
            mark_wrapped(
                param.to_local() if isinstance(param, DTensor) else param
                for param in model.parameters()
            )


def refuse_parts(models: Sequence[nn.Module]) -> None:
    """Raises ValueError if a module outside of the models holds their ``fully_shard`` group.

    That module gathers and frees the group, so the models' parameters may be gathered at any time.
    """
    inside = {id(module) for model in models for module in model.modules()}
    for module in list(_module_state_mapping):
        if id(module) in inside or not isinstance(module, FSDPModule):
            continue
        for group in _groups_of(module._get_fsdp_state()):
            infos = [param._module_info for param in group.fsdp_params]
            holders = [m for info in infos for m in (info.module, *info.shared_modules)]
            if any(id(m) in inside for m in holders) and not any(
                id(m) in inside for m in group.modules
            ):
                refuse_part(models, module, "fully_shard")


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of the root meshes of the parameters' meshes.

    A pipeline stage's mesh is a slice of the mesh of all stages, and all of them share the model.
    """
    found: set[int] = set()
    for named in named_tensors(models, set()):
        if isinstance(named.tensor, DTensor):
            mesh = named.tensor.device_mesh
            root = getattr(mesh, "_get_root_mesh", lambda mesh=mesh: mesh)()
            found.update(root.mesh.flatten().tolist())
    return tuple(sorted(found)) or None


def engine(models: Sequence[nn.Module]) -> None:
    """None: the training loop steps the weights, and each forward gathers them."""
