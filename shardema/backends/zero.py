"""DeepSpeed engines, ZeRO-0 to ZeRO-3: fp32 masters in flat partitions, 16-bit weights beside them.

::

    a group's parameters, flat    [ weight | bias | padding ]      16-bit, on every rank (1, 2)
    this rank's partition              [----------]                16-bit weights, fp32 master
    ZeRO-3: each parameter apart  [--- rank 0 ---|--- rank 1 --+]  the last one padded
    its shards                    weight[start:], bias[:stop]      as flat boxes

The optimizer steps the masters. The weights are copies of them, so they can always be restored
from the masters. A parameter's place in its partition is computed from addresses:
``_hp_mapping`` is wrong under ``round_robin_gradients``, and frozen parameters have none.

deepspeed is not imported before the model is an engine. Its private attributes are used in this
file only; they are those of deepspeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema.backends.tree import Named, named_tensors, tie_shared_storage, whole_shard
from shardema.errors import ArgumentError, CallError
from shardema.shards.boxes import Dims, flat_boxes
from shardema.shards.shard import REPLACED, OffloadedStorage, Shard

# ---- which models ---------------------------------------------------------------------------


def engines(models: Sequence[nn.Module]) -> list[Any]:
    """The engines among the models."""
    home = sys.modules.get("deepspeed.runtime.engine")
    return [] if home is None else [m for m in models if isinstance(m, home.DeepSpeedEngine)]


def matches(models: Sequence[nn.Module]) -> bool:
    """An engine, or a module whose parameters an engine has taken over."""
    if engines(models):
        return True
    if not any(name.startswith("deepspeed") for name in sys.modules):
        return False
    parameters = [p for model in models for p in model.parameters()]
    taken = any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters)
    return taken or _stepped_elsewhere(models, parameters)


def _stepped_elsewhere(models: Sequence[nn.Module], parameters: Sequence[Tensor]) -> bool:
    """Whether the modules belong to an engine that steps them, without a mark on any parameter.

    An engine hooks the forward of its module. For a child module it records the names of the
    parameters only; 16-bit ones are copies of masters that the engine holds.
    """
    hooks = [
        hook for model in models for m in model.modules() for hook in m._forward_pre_hooks.values()
    ]
    owners = [
        cell.cell_contents
        for hook in hooks
        if getattr(hook, "__module__", None) == "deepspeed.runtime.engine"
        for cell in getattr(hook, "__closure__", None) or ()
    ]
    if owners:
        return any(getattr(owner, "basic_optimizer", None) is not None for owner in owners)
    known = getattr(sys.modules.get("deepspeed.utils.debug"), "param_names", ())
    return any(p in known for p in parameters if p.requires_grad and p.dtype.itemsize == 2)


def _engine(models: Sequence[nn.Module]) -> Any:
    """The one engine. Raises ValueError for anything else, and for unsupported features."""
    found = engines(models)
    if not found:
        raise ArgumentError(
            "model: got a module whose parameters DeepSpeed has partitioned, or steps in its "
            "engine, expected the engine that deepspeed.initialize returned: "
            "ShardedEMA(engine, ...), after initialize; select= chooses a part of it"
        )
    if len(models) > 1:
        raise ArgumentError(
            f"model: got a list of {len(models)} modules with a DeepSpeed engine in it; keep one "
            "ShardedEMA for each engine"
        )
    _check_supported(found[0])
    return found[0]


def refuse_unsupported(engine: Any) -> None:
    """Raises ValueError for features that are not supported (untested), by name."""
    found = [what for what, is_on in _UNSUPPORTED.items() if is_on(engine)]
    if type(engine).__name__ != "DeepSpeedEngine":
        found.insert(0, type(engine).__name__)
    if found:
        raise ArgumentError(
            f"model: a DeepSpeed engine with {', '.join(found)}: not supported (untested); turn it "
            "off in the DeepSpeed config, or average without an engine (FSDP2)"
        )


def _check_supported(engine: Any) -> None:
    """Raises ValueError for unsupported features, and for an engine that steps no masters."""
    refuse_unsupported(engine)
    if engine.basic_optimizer is None:
        raise ArgumentError(
            "model: a DeepSpeed engine without an optimizer steps nothing; give "
            "deepspeed.initialize an optimizer, or a config with one; where an optimizer of your "
            "own steps the module of a ZeRO-0 engine, ShardedEMA(engine.module, ...)"
        )
    if _map_for(engine.optimizer) is None:
        cls = type(engine.optimizer)
        raise ArgumentError(
            f"model: a DeepSpeed engine with the optimizer class {cls.__module__}.{cls.__name__}, "
            f"expected a torch optimizer or one of {[kind.rsplit('.', 1)[1] for kind in _MAPS]}"
        )


def _device(offload: Any) -> str:
    device = getattr(offload, "device", "none")
    return str(getattr(device, "value", device))


def _auto_ep(engine: Any) -> bool:
    """Whether the engine has replaced layers by expert-parallel ones of its own."""
    home = sys.modules.get("deepspeed.module_inject.auto_ep_layer")
    return home is not None and any(
        isinstance(module, home.AutoEPMoELayer) for module in engine.module.modules()
    )


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "AutoEP": lambda e: _auto_ep(e),
    "hpZ (zero_hpz_partition_size)": lambda e: e.zero_hpz_partition_size() > 1,
    "qwZ (zero_quantized_weights)": lambda e: bool(e.zero_quantized_weights()),
    "zero_quantized_nontrainable_weights": lambda e: bool(e.zero_quantized_nontrainable_weights()),
    "qgZ (zero_quantized_gradients)": lambda e: bool(e.zero_quantized_gradients()),
    # AutoTP's is of DeepSpeed itself
    "model parallelism (mpu)": lambda e: e.mpu is not None and e.autotp_size() <= 1,
    "sequence parallelism": lambda e: e.sequence_parallel_size > 1,
    "DeepCompile": lambda e: bool(e.is_deepcompile_enabled()),
    "ZenFlow": lambda e: bool(e.zenflow),
    "SuperOffload": lambda e: bool(e.super_offload()),
    "partial optimizer offload (ratio)": lambda e: e.zero_partial_offload() != 1.0,
    "parameter offload to NVMe": lambda e: _device(e.zero_offload_param()) == "nvme",
    "float16 under torch_autocast": lambda e: (
        bool(e.torch_autocast_enabled()) and e.torch_autocast_dtype() == torch.float16
    ),
    "16-bit masters (..._master_weights_and_grads)": lambda e: bool(
        getattr(e.optimizer, "low_precision_master_weights_and_grads", False)
    ),
}


# ---- where masters and weights are stored ---------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """Where this rank holds a part of a parameter.

    Attributes:
        group: index of the flat partition.
        offset: first element of the part within the partition.
        start: first element of the part within the flat parameter.
        numel: number of elements of the part.
    """

    group: int
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class _PartitionMap:
    """Where an optimizer class stores masters and weights; functions, as DeepSpeed moves storage.

    Attributes:
        master: a group's flat fp32 partition on this rank.
        weights: a group's flat partition that the forward computes with; the same memory as the
            master where the engine trains in fp32 (ZeRO-3).
        slots: by id of the parameter.
        publish: gathers the written ``weights`` to all ranks. Collective.
        release: frees gathered copies of ``weights``, before they are written.
        offloaded: by group, masters that are stored on disk.
    """

    master: Callable[[int], Tensor]
    weights: Callable[[int], Tensor]
    slots: Callable[[], dict[int, _Slot]]
    publish: Callable[[], None] = lambda: None
    release: Callable[[], None] = lambda: None
    offloaded: dict[int, OffloadedStorage] = field(default_factory=dict)


def _inside(
    params: Sequence[Any], flat: Tensor, group: int, first: int, size: int
) -> dict[int, _Slot]:
    """Slots of parameters that are views of ``flat``, of which this rank holds a range.

    Raises:
        RuntimeError: a parameter is stored elsewhere.
    """
    slots = {}
    for param in params:
        at = (param.data.data_ptr() - flat.data_ptr()) // flat.element_size()
        if not 0 <= at <= flat.numel() - param.numel():
            raise CallError(
                "the engine's weights are not where its optimizer keeps them; after "
                "engine.offload_states() call engine.reload_states() first"
            )
        begin = max(at, first)
        numel = max(0, min(at + param.numel(), first + size) - begin)
        slots[id(param)] = _Slot(group, begin - first if numel else 0, begin - at, numel)
    return slots


def _partitioned(opt: Any, masters: str, partitions: str, flats: str, params: str) -> _PartitionMap:
    """ZeRO-1, ZeRO-2 and BF16_Optimizer: the same layout under different attribute names."""

    def rank(group: int) -> int:
        return dist.get_rank(opt.real_dp_process_group[group])

    def weights(group: int) -> Tensor:
        part: Tensor = getattr(opt, partitions)[group][rank(group)]
        return part

    def slots() -> dict[int, _Slot]:
        found = {}
        for g, flat in enumerate(getattr(opt, flats)):
            size = flat.numel() // dist.get_world_size(opt.real_dp_process_group[g])
            found.update(_inside(getattr(opt, params)[g], flat, g, rank(g) * size, size))
        return found

    def publish() -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=getattr(opt, flats),
            partitioned_param_groups=getattr(opt, partitions),
            dp_process_group=opt.real_dp_process_group,
            start_alignment_factor=opt.nccl_start_alignment_factor,
            allgather_bucket_size=opt.allgather_bucket_size,
        )

    return _PartitionMap(lambda group: getattr(opt, masters)[group], weights, slots, publish)


def _stage_1_and_2(opt: Any) -> _PartitionMap:
    return _partitioned(
        opt,
        "single_partition_of_fp32_groups",
        "parallel_partitioned_bit16_groups",
        "bit16_groups_flat",
        "bit16_groups",
    )


def _bf16(opt: Any) -> _PartitionMap:
    return _partitioned(
        opt,
        "fp32_groups_flat_partition",
        "bf16_partitioned_groups",
        "bf16_groups_flat",
        "bf16_groups",
    )


def _fused(opt: Any) -> _PartitionMap:
    """ZeRO-0 with a fused optimizer: flat groups, whole on every rank."""

    def slots() -> dict[int, _Slot]:
        found = {}
        for g, flat in enumerate(opt.fp16_groups_flat):
            found.update(_inside(opt.fp16_groups[g], flat, g, 0, flat.numel()))
        return found

    return _PartitionMap(opt.fp32_groups_flat.__getitem__, opt.fp16_groups_flat.__getitem__, slots)


def _unfused(opt: Any) -> _PartitionMap:
    """ZeRO-0 with any other optimizer: a master for each parameter, whole on every rank."""

    places = [(i, j) for i, group in enumerate(opt.fp16_groups) for j in range(len(group))]

    def slots() -> dict[int, _Slot]:
        params = [opt.fp16_groups[i][j] for i, j in places]
        return {id(p): _Slot(g, 0, 0, p.numel()) for g, p in enumerate(params)}

    def at(groups: list[list[Tensor]], group: int) -> Tensor:
        i, j = places[group]
        return groups[i][j].data

    return _PartitionMap(
        lambda group: at(opt.fp32_groups, group), lambda group: at(opt.fp16_groups, group), slots
    )


def _stage_3(opt: Any) -> _PartitionMap:
    def slots() -> dict[int, _Slot]:
        found = {}
        for g, params in enumerate(opt.fp16_groups):
            offset = 0
            for param in params:
                start, numel = _part(param)
                found[id(param)] = _Slot(g, offset, start, numel)
                offset += param.ds_tensor.ds_numel
        return found

    def publish() -> None:
        if opt.persistent_parameters:  # always gathered: a forward does not read their shards
            opt.persistent_parameters[0].all_gather(opt.persistent_parameters)

    swapped = [g for g in range(len(opt.fp16_groups)) if opt._swappable_optimizer_subgroup(g)]
    return _PartitionMap(
        lambda group: opt.fp32_partitioned_groups_flat[group],
        lambda group: opt.fp16_partitioned_groups_flat[group],
        slots,
        publish,
        opt.empty_partition_cache,
        {g: OffloadedStorage(functools.partial(_swapped_in, opt, g)) for g in swapped},
    )


def _part(param: Any) -> tuple[int, int]:
    """First element and number of elements that this rank holds of a ZeRO-3 parameter."""
    size = param.ds_tensor.ds_numel  # the last ranks' are padded to it
    start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)


@contextlib.contextmanager
def _swapped_in(opt: Any, group: int, write: bool) -> Iterator[Tensor]:
    """Loads the master of a group from NVMe; writes it back if ``write``."""
    opt._optimizer_states_and_gradient_swap_in(group)
    try:
        yield opt.fp32_partitioned_groups_flat[group].detach()
    finally:
        if write:
            opt._writeback_swap_state(group, write_opt_state=True, write_gradients=False)
        else:
            opt._release_swap_buffers(group)


_MAPS: dict[str, Callable[[Any], _PartitionMap]] = {
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": _unfused,
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": _fused,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": _bf16,
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": _stage_1_and_2,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


def _no_masters(opt: Any) -> _PartitionMap:
    """ZeRO-0 in fp32: a torch optimizer steps the parameters themselves."""

    def none(group: int) -> Tensor:
        raise IndexError(group)

    return _PartitionMap(none, none, dict)


def _map_for(opt: Any) -> Callable[[Any], _PartitionMap] | None:
    cls = type(opt)
    made = _MAPS.get(f"{cls.__module__}.{cls.__qualname__}")
    return _no_masters if made is None and isinstance(opt, torch.optim.Optimizer) else made


def _partition_map(engine: Any) -> _PartitionMap:
    opt = engine.optimizer
    if getattr(opt, "offloaded_states", None):
        raise CallError(
            "the engine's states are offloaded; call engine.reload_states() before the average "
            "is read or written"
        )
    make = _map_for(opt)
    assert make is not None, type(opt)
    return make(opt)


# ---- the backend ----------------------------------------------------------------------------


def read(models: Sequence[nn.Module]) -> list[Shard]:
    """Flat boxes of the masters; whole tensors, or ZeRO-3 shards, of what no optimizer steps.

    Raises:
        ValueError: not one engine, one without an optimizer, or with an unsupported feature.
        RuntimeError: its states are offloaded (``engine.offload_states``).
    """
    engine = _engine(models)
    partitions = _partition_map(engine)
    slots = partitions.slots()
    stepped = {id(p) for group in engine.basic_optimizer.param_groups for p in group["params"]}
    # ZeRO-0 keeps everything on every rank
    whole = engine.zero_optimization_stage() == 0
    shards: list[Shard] = []
    rest: list[Shard] = []
    order: dict[str, int] = {}
    same: dict[str, tuple[Any, ...]] = {}
    for named in named_tensors(models, set()):
        order[named.fqn] = len(order)
        same[named.fqn] = (_data_group(engine, named.tensor),) if whole else ()
        slot = slots.get(id(named.tensor))
        block = _block_of(named, engine)
        if slot is not None:
            shards.append(_placed(_shard(named, slot, partitions), block))
        elif hasattr(named.tensor, "ds_id"):
            shards.append(_placed(frozen_part(named), block))
        else:
            owned = named.role != "parameter" or id(named.tensor) in stepped
            role = named.role if owned else "frozen"
            rest.append(_placed(whole_shard(replace(named, role=role)), block))
    found = [*shards, *tie_shared_storage(rest)]
    found = [replace(shard, replicas=same[shard.fqn]) for shard in found]
    return sorted(found, key=lambda shard: order[shard.fqn])


_Block = tuple[Dims, Dims]  # the full shape, and the offset in it of what this rank's layer holds


def _block_of(named: Named, engine: Any) -> _Block | None:
    """The block of a parameter that AutoTP has cut; None for one that is whole.

    Raises:
        ValueError: one that is not cut into one block for each rank (fused weights).
    """
    param: Any = named.tensor
    cut = getattr(param, "ds_autotp_universal_checkpoint_meta", None)
    whole = not getattr(param, "tensor_model_parallel", False) if cut is None else cut["replicated"]
    if whole:
        return None
    local = tuple(getattr(param, "ds_shape", param.shape))
    rank = engine.mpu.get_tensor_model_parallel_rank()
    # the sizes of the ranks' parts; None for what is cut in another way
    dim, sizes = (None, None) if cut is None else (cut["partition_dim"], cut["partition_sizes"])
    if dim is None or not sizes or sizes[rank] != local[dim]:
        raise ArgumentError(
            f"rank {dist.get_rank()}: {named.fqn}: AutoTP has cut it into parts of shape "
            f"{list(local)} that are not one block each (fused weights), which is not supported; "
            "leave it whole (partition_type 'skip'), or split it into several layers"
        )
    offset = sum(sizes[:rank])
    full = tuple(sum(sizes) if d == dim else size for d, size in enumerate(local))
    return full, tuple(offset if d == dim else 0 for d in range(len(local)))


def _placed(shard: Shard, block: _Block | None) -> Shard:
    """A shard of a part of a tensor, as a shard of the tensor."""
    if block is None:
        return shard
    shape, origin = block
    return replace(shard, shape=shape, boxes=tuple(box.shifted(origin) for box in shard.boxes))


def _data_group(engine: Any, tensor: Tensor) -> Any:
    """The ranks among which the engine averages the gradient: of an expert, those that hold it."""
    if getattr(tensor, "allreduce", True):
        return engine.seq_data_parallel_group
    return engine.expert_data_parallel_group[tensor.group_name]  # type: ignore[attr-defined]


def _shard(named: Named, slot: _Slot, partitions: _PartitionMap) -> Shard:
    shape = tuple(getattr(named.tensor, "ds_shape", named.tensor.shape))
    master = partitions.master(slot.group).detach()
    weights = partitions.weights(slot.group).detach()
    whole = master.shape == shape and master.numel() == slot.numel

    def part(flat: Tensor) -> Tensor:
        return flat if whole else flat.narrow(0, slot.offset, slot.numel)

    storage = partitions.offloaded.get(slot.group)
    aliased = master.data_ptr() == weights.data_ptr() and storage is None
    return Shard(
        named.fqn,
        # a master on disk is represented by its size only
        part(master) if storage is None else master.new_zeros(1).expand(slot.numel),
        shape,
        flat_boxes(shape, slot.start, slot.numel),
        aliases=named.aliases,
        address=_address(named, partitions, slot.group),
        weights=None if aliased else part(weights),
        on_disk=None if storage is None else (storage, slot.offset),
    )


def _address(named: Named, partitions: _PartitionMap, group: int) -> Callable[[], int]:
    def address() -> int:
        if not named.here():
            return REPLACED
        try:
            return hash((partitions.master(group).data_ptr(), partitions.weights(group).data_ptr()))
        except IndexError:  # offload_states() empties the lists; reading the model again raises
            return REPLACED

    return address


def frozen_part(named: Named) -> Shard:
    """This rank's part of a ZeRO-3 parameter that no optimizer steps; the padding is left out."""
    param: Any = named.tensor
    start, numel = _part(param)
    shape = tuple(param.ds_shape)
    return Shard(
        named.fqn,
        param.ds_tensor.detach().narrow(0, 0, numel),
        shape,
        flat_boxes(shape, start, numel),
        "frozen",
        named.aliases,
        address=lambda: param.ds_tensor.data_ptr() if named.here() else REPLACED,
    )


def ensure_sharded(models: Sequence[nn.Module], *, force: bool = False) -> None:
    """Does nothing: what the optimizer steps is never gathered; see `Engine.release`."""


def mark_written(models: Sequence[nn.Module]) -> None:
    """Bumps the versions of the parameters, whose storage a pending backward holds."""
    for model in models:
        for param in model.parameters():
            torch.autograd.graph.increment_version(param)


def ranks(models: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """The ranks of the data-parallel group; with AutoTP all, which hold the other parts."""
    engine = _engine(models)
    if engine.autotp_size() > 1:
        return tuple(range(dist.get_world_size()))
    group = getattr(engine, "seq_data_parallel_group", None)
    return None if group is None else tuple(sorted(dist.get_process_group_ranks(group)))


class Engine:
    """A DeepSpeed engine, which steps the weights and gathers them itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._before: dict[object, Callable[[], None]] = {}
        self._after: dict[object, Callable[[], None]] = {}
        self._hooked = False

    def applied(self) -> int | None:
        """A number that is new after each step that changed the weights; None after other steps.

        ``global_steps`` goes back in ``load_checkpoint``; ``micro_steps`` counts calls of ``step``
        and never does.
        """
        return int(self._engine.micro_steps) if self._engine.was_step_applied() else None

    def parameters(self) -> dict[str, Tensor]:
        """What a forward computes with, gathered or not."""
        return dict(self._engine.module.named_parameters())

    def release(self) -> None:
        """Frees gathered weights, before this rank's shards are written."""
        _partition_map(self._engine).release()

    def publish(self) -> None:
        """Gathers what was written into this rank's shards to all ranks. Collective."""
        _partition_map(self._engine).publish()

    def hook(
        self, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> Hook:
        """Calls ``before`` and ``after`` every step of the engine, which has no step hooks."""
        if not self._hooked:
            self._hooked = True
            self._engine.step = self._around(self._engine.step)
        hook = Hook(self._before, self._after)
        if before is not None:
            self._before[hook] = before
        if after is not None:
            self._after[hook] = after
        return hook

    def _around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def stepping(*args: Any, **kwargs: Any) -> Any:
            for call in list(self._before.values()):
                call()
            result = step(*args, **kwargs)
            for call in list(self._after.values()):
                call()
            return result

        return stepping


class Hook:
    """Handle of `Engine.hook`."""

    def __init__(self, *tables: dict[object, Callable[[], None]]) -> None:
        self._tables = tables

    def remove(self) -> None:
        """Removes the callbacks."""
        for table in self._tables:
            table.pop(self, None)


def engine(models: Sequence[nn.Module]) -> Engine:
    """The engine that steps the models."""
    return Engine(_engine(models))
