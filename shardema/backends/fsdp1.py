"""FullyShardedDataParallel (FSDP1): every rank holds a contiguous range of each flat parameter.

::

    flat parameter of a module      [ weight | bias | padding ]
    this rank's range                    [----------]
    its shards                           weight[start:], bias[:stop]    as flat boxes

All strategies and both settings of ``use_orig_params`` are read from the metadata of the flat
parameter, since with ``use_orig_params=False`` the modules have no parameters.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened, _no_dispatch_record_stream
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.utils import _free_storage

from shardema.backends.passes import refuse_inside
from shardema.backends.tree import (
    FLAT,
    named_tensors,
    refuse_part,
    tie_shared_storage,
    walk,
    whole_shard,
)
from shardema.errors import ArgumentError, CallError
from shardema.shards.boxes import Box, Dims, flat_boxes
from shardema.shards.shard import REPLACED, Shard
from shardema.shards.strides import memory_order


def matches(models: Sequence[nn.Module]) -> bool:
    """Some module is wrapped in FullyShardedDataParallel."""
    return any(isinstance(module, FSDP) for model in models for module in model.modules())


def _handles(models: Sequence[nn.Module]) -> Iterator[tuple[FSDP, Any]]:
    for model in models:
        for module in FSDP.fsdp_modules(model):
            if module._handle is not None:
                yield module, module._handle


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """Flat boxes of every flat parameter, and whole shards of parameters that FSDP ignores.

    Raises:
        ValueError: a parameter of a flat parameter is a DTensor (FSDP1 with tensor parallel).
    """
    prefixes: dict[int, list[str]] = {}
    for model in models:
        for prefix, module in walk(model):
            prefixes.setdefault(id(module), []).append(prefix)
    skip: set[tuple[int, str]] = set()
    shards: list[Shard] = []
    for owner, handle in _handles(models):
        skip.add((id(handle._fully_sharded_module), FLAT))
        skip.add((id(owner), FLAT))
        skip.add((id(owner.module), FLAT))  # inside a checkpoint wrapper
        same = _replicas(owner, handle)
        flat_shards = _flat_shards(handle, prefixes, skip)
        shards += [replace(shard, replicas=same) for shard in flat_shards]
    rest = [whole_shard(named) for named in named_tensors(models, skip)]
    shards += tie_shared_storage(rest)
    return _in_state_dict_order(shards, models)


def _replicas(owner: FSDP, handle: Any) -> tuple[dist.ProcessGroup, ...]:
    """The groups whose ranks hold the same range: with a hybrid strategy, or with NO_SHARD."""
    if not handle.uses_sharded_strategy:
        return (handle.process_group,)
    between = getattr(owner, "_inter_node_pg", None)
    return () if between is None else (between,)


def _flat_shards(
    handle: Any, prefixes: dict[int, list[str]], skip: set[tuple[int, str]]
) -> list[Shard]:
    flat = handle.flat_param
    local = _local(flat)
    aliases: dict[tuple[int, str], list[str]] = {}
    for shared in flat._shared_param_infos:
        names = [f"{prefix}{shared.param_name}" for prefix in prefixes.get(id(shared.module), ())]
        aliases.setdefault((id(shared.prim_module), shared.prim_param_name), []).extend(names)
        skip.add((id(shared.module), shared.param_name))
    shards = []
    extensions = flat._param_extensions
    for index, (info, part) in enumerate(
        zip(flat._param_infos, flat._shard_param_infos, strict=True)
    ):
        named = [f"{prefix}{info.param_name}" for prefix in prefixes.get(id(info.module), ())]
        named += aliases.get((id(info.module), info.param_name), [])
        if not named:
            continue  # the model no longer has this module; its replacement is read instead
        first, *more = named
        skip.add((id(info.module), info.param_name))
        if extensions[index] is not None:
            raise ArgumentError(
                f"{first}: FSDP1 holds a DTensor here (tensor parallel under FSDP1), which is "
                "not supported; use fully_shard (FSDP2) with tensor parallel"
            )
        shape = tuple(flat._shapes[index])
        order = memory_order(shape, flat._strides[index])
        start, numel = part.intra_param_start_idx or 0, part.numel_in_shard or 0
        begin = part.offset_in_shard or 0
        shards.append(
            Shard(
                first,
                local.narrow(0, begin, numel),
                shape,
                _ordered_boxes(shape, order, start, numel),
                "parameter" if flat.requires_grad and _trains(flat, index) else "frozen",
                tuple(more),
                order,
                _address(handle, flat, begin * local.element_size() if numel else None),
            )
        )
    return shards


def _trains(flat: Any, index: int) -> bool:
    params = flat._params  # None without use_orig_params: the flat parameter trains as a whole
    return True if params is None else bool(params[index].requires_grad)


def _local(flat: Any) -> torch.Tensor:
    """This rank's range of the flat parameter, also while ``flat.data`` is gathered."""
    local: torch.Tensor = getattr(flat, "_local_shard", flat)  # set by the first forward
    return local.detach()


def _ordered_boxes(shape: Dims, order: Dims, start: int, numel: int) -> tuple[Box, ...]:
    """Flat boxes of a range of elements in memory order."""
    if not order:
        return flat_boxes(shape, start, numel)
    stored = flat_boxes(tuple(shape[dim] for dim in order), start, numel)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tuple(
        Box(tuple(box.offsets[i] for i in inverse), tuple(box.sizes[i] for i in inverse))
        for box in stored
    )


def _address(handle: Any, flat: Any, offset: int | None) -> Callable[[], int]:
    def address() -> int:
        if handle.flat_param is not flat:
            return REPLACED
        return 0 if offset is None else _local(flat).data_ptr() + offset

    return address


def _in_state_dict_order(shards: list[Shard], models: Sequence[nn.Module]) -> list[Shard]:
    """Sorted as in the unwrapped model's state dict: by module, then by registration."""
    place: dict[str, int] = {}
    for model in models:
        for prefix, _ in walk(model):
            place.setdefault(prefix, len(place))
    key = {id(shard): place[shard.fqn[: shard.fqn.rfind(".") + 1]] for shard in shards}
    return sorted(shards, key=lambda shard: key[id(shard)])


def ensure_sharded(models: Sequence[nn.Module], *, force: bool = False) -> None:
    """Frees flat parameters that are gathered.

    After an eval forward, SHARD_GRAD_OP keeps all of them gathered and FULL_SHARD those of the
    root; a prefetch may have gathered one of a layer that was then skipped. torch has no public
    function for it.

    Raises:
        RuntimeError: inside ``summon_full_params``, or while a forward or backward that needs them
            is running; not with ``force``.
    """
    handles = list(_handles(models))
    if not force:
        _refuse_busy(models, [handle for _, handle in handles])
    for module, handle in handles:
        if not hasattr(handle.flat_param, "_local_shard"):
            continue  # before the first forward everything is sharded
        if handle._prefetched:  # the all-gather may still read the shard
            module._device_handle.current_stream().wait_stream(module._unshard_stream)
        if _gathered(handle):
            _reshard(module, handle, handle.uses_sharded_strategy)
            for buffer in _allocated(handle):  # in the precision of the other mode (train or eval)
                _no_dispatch_record_stream(buffer, module._device_handle.current_stream())
                _free_storage(buffer)


def _refuse_busy(models: Sequence[nn.Module], handles: Sequence[Any]) -> None:
    states = {handle._training_state.name for handle in handles} - {"IDLE"}
    if "SUMMON_FULL_PARAMS" in states:
        raise CallError(
            f"rank {dist.get_rank()}: inside FSDP.summon_full_params, which holds the weights "
            "gathered and writes them back when it ends; leave the with block first"
        )
    if states:
        refuse_inside(models)


def _gathered(handle: Any) -> bool:
    flat = handle.flat_param
    moved = flat.data_ptr() != flat._local_shard.data_ptr()
    return moved or handle._prefetched or bool(_allocated(handle))


def _allocated(handle: Any) -> list[torch.Tensor]:
    """All-gather buffers that are allocated."""
    if not handle.uses_sharded_strategy:
        return []
    names = ("_full_param_padded", "_full_prec_full_param_padded")
    buffers = [getattr(handle.flat_param, name, None) for name in names]
    return [b for b in buffers if b is not None and b.untyped_storage().size()]


def refuse_parts(models: Sequence[nn.Module]) -> None:
    """Raises ValueError if a wrapper outside of the models holds their flat parameter.

    That wrapper gathers and frees it.
    """
    flats = [handle.flat_param for _, handle in _handles(models)]
    inside = {id(tensor) for flat in flats for tensor in _flattened_into(flat)}
    modules = [module for model in models for module in model.modules()]
    flattened = [
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *vars(module).values())
        if isinstance(tensor, torch.Tensor)
    ]
    # without use_orig_params the module's tensors are views of the flat parameter
    strange = [
        flat
        for flat in (t if t._base is None else t._base for t in flattened)
        if _is_fsdp_flattened(flat) and id(flat) not in inside
    ]
    if strange:
        refuse_part(models, _wrapper_of(strange[0]), "FullyShardedDataParallel")


def _wrapper_of(flattened: torch.Tensor) -> nn.Module | None:
    """The wrapper whose flat parameter contains a tensor, searched among all objects."""
    for thing in gc.get_objects():
        handle = getattr(thing, "_handle", None) if issubclass(type(thing), FSDP) else None
        if handle is not None and any(t is flattened for t in _flattened_into(handle.flat_param)):
            assert isinstance(thing, nn.Module)
            return thing
    return None


def _flattened_into(flat: Any) -> tuple[torch.Tensor, ...]:
    """The flat parameter, and the original parameters in it (with ``use_orig_params``)."""
    return (flat, *(flat._params or ()), *(flat._shared_params or ()))


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the versions of the flat parameters, which a pending backward checks."""
    for _, handle in _handles(models):
        torch.autograd.graph.increment_version(handle.flat_param)


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of the sharding groups; None (all ranks) with a hybrid strategy."""
    found: set[int] = set()
    for module, handle in _handles(models):
        if hasattr(module, "_inter_node_pg"):
            return None
        found.update(dist.get_process_group_ranks(handle.process_group))
    return tuple(sorted(found)) or None


def engine(models: Sequence[nn.Module]) -> None:
    """None: the training loop steps the weights, and each forward gathers them."""
