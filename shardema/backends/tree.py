"""Clean names: the names of the tensors in the unwrapped model.

A wrapper (DDP, FSDP, torch.compile, activation checkpointing) holds the wrapped module as a child
with a known name. Only that child of that wrapper type is removed from names, so a user's own child
called ``module`` keeps its name. DeepSpeed's experts have the numbers that they have among those of
all ranks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from shardema.backends.subclasses import kind_of, pointer, values_of
from shardema.errors import ArgumentError, abbreviate
from shardema.shards.boxes import whole
from shardema.shards.shard import REPLACED, Role, Shard
from shardema.shards.strides import overlaps, share_memory

FLAT = "_flat_param"  # the name of FSDP1's flat parameter with use_orig_params=False

# (module of the type, its name, the child that it wraps); looked up in sys.modules, since a model
# can only be wrapped by a type that was imported, and importing them all takes seconds.
_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_forward_module"),
    ("lightning_fabric.wrappers", "_FabricModule", "_forward_module"),
)
# Children of wrappers that are a second reference to the wrapped module.
_AGAIN = {"_forward_module": "_original_module"}

# Packages of wrappers that rename, shard or flatten weights in ways that no backend reads.
_FOREIGN = (
    "apex.parallel.distributed",
    "colossalai",
    "deepspeed.runtime.pipe",
    "fairscale.experimental",
    "fairscale.nn.data_parallel",
    "fairscale.nn.misc",
    "fairscale.nn.pipe",
    "megatron",
    "megatron_fsdp",
    "smdistributed",
    "torch_xla.distributed",
    "torch_xla.experimental",
)
# Type names of unknown wrappers: used for modules that have one child and no parameters.
_SOUNDS_FOREIGN = re.compile(r"DataParallel$|FullySharded|FSDP$|DDP$|^FSDP")


@dataclass(frozen=True, slots=True)
class Named:
    """One tensor of the model: its clean name and where it is registered."""

    fqn: str
    aliases: tuple[str, ...]
    tensor: Tensor
    table: Mapping[str, Tensor | None]  # the module's _parameters or _buffers
    key: str
    role: Role

    def now(self) -> Tensor | None:
        """The tensor that the module has under this name now."""
        # TorchScript's table has no `get`
        return self.table[self.key] if self.key in self.table else None  # noqa: SIM401

    def here(self) -> bool:
        """Whether the module still has this tensor; `Form` checks the module itself."""
        return self.now() is self.tensor

    def address(self) -> Callable[[], int]:
        """For `Shard.address`: checks that the table still holds this tensor."""

        def address() -> int:
            tensor = self.tensor
            if self.now() is not tensor:
                return REPLACED
            return pointer(tensor)

        return address


def wrapped_child(module: nn.Module) -> str | None:
    """Name of the child that ``module`` wraps, None if it is not a wrapper."""
    for where, name, child in _WRAPPERS:
        home = sys.modules.get(where)
        if home is not None and isinstance(module, getattr(home, name)):
            return child
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while (child := wrapped_child(module)) is not None:
        inner = module._modules[child]
        assert inner is not None, child
        module = inner
    return module


def refuse_unknown_wrappers(models: Sequence[nn.Module]) -> None:
    """Raises ValueError for wrappers that store weights in a way that no backend reads."""
    for model in models:
        for prefix, module in walk(model):
            if wrapped_child(module) is not None:  # known; `zero` checks engines
                continue
            homes = [f"{t.__module__}." for t in type(module).__mro__]
            foreign = any(home.startswith(f"{name}.") for home in homes for name in _FOREIGN)
            if not (foreign or _wraps_by_name(module)):
                continue
            kind = type(module)
            where = f" at {prefix[:-1]!r}" if prefix else ""
            raise ArgumentError(
                f"model: got a {kind.__module__}.{kind.__qualname__}{where}, which names and "
                "shards weights in a way that is not supported; if every rank holds whole tensors, "
                "build the EMA from the module inside it, else shard the model with "
                "fully_shard, FullyShardedDataParallel or DeepSpeed ZeRO"
            )


def _wraps_by_name(module: nn.Module) -> bool:
    """Whether a module only holds another one and is named like a sharding wrapper."""
    if len(module._modules) != 1 or len(module._parameters):
        return False
    names = [t.__name__ for t in original_class(module).__mro__]
    return any(_SOUNDS_FOREIGN.search(name) for name in names)


def original_class(module: nn.Module) -> type:
    """The class before ``fully_shard`` replaced it: Linear for FSDPLinear."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it was never imported, no class is its
    if fsdp is None:
        return type(module)
    return next(c for c in type(module).__mro__ if not issubclass(c, fsdp.FSDPModule))


def refuse_part(models: Sequence[nn.Module], root: nn.Module | None, how: str) -> NoReturn:
    """Raises ValueError: ``root``, a module around ``models``, gathers and frees their weights."""
    kinds = sorted({type(model).__name__ for model in models})
    around = [] if root is None else list(walk(root))
    parts = [prefix for prefix, module in around if any(module is model for model in models)]
    select = " or ".join(f"select='{prefix}*'" for prefix in parts) or "select="
    name = "module" if root is None else type(root).__name__
    raise ArgumentError(
        f"model: got a part ({', '.join(kinds)}) of what {how} has put into one group of a "
        f"{name} around it, which gathers and frees all of it at once; give the EMA that one, "
        f"and choose the part: ShardedEMA(whole, ..., {select})"
    )


def walk(module: nn.Module, prefix: str = "", first: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its clean prefix (``"a.b."``); once for each registration.

    Args:
        first: the number of the first of the experts in the list below, among those of all ranks.
    """
    yield prefix, module
    inner = wrapped_child(module)
    again = _AGAIN.get(inner or "")
    for name, child in module._modules.items():
        if child is None or name == again:
            continue
        listed = name.isdigit()
        below = _first_expert(module, child) or (0 if listed else first)
        place = str(int(name) + first) if listed and first else name
        yield from walk(child, prefix if name == inner else f"{prefix}{place}.", below)


def _first_expert(parent: nn.Module, child: nn.Module) -> int:
    """The number of the first expert in ``child``, if it is this rank's list of experts.

    DeepSpeed numbers the experts of each rank from 0.
    """
    home = sys.modules.get("deepspeed.moe.sharded_moe")
    if home is None or not isinstance(parent, home.MOELayer) or child is not parent.experts:
        return 0
    group: Any = parent.ep_group  # None before deepspeed.initialize
    return 0 if group is None else dist.get_rank(group) * cast("int", parent.num_local_experts)


class Form:
    """A snapshot of the models' module tree, to detect modules that were replaced later.

    `Named.here` only looks into the module that held the tensor. If the model has replaced that
    module (by a deep copy, a new sharding), the old module still holds its tensors.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = dict.fromkeys(module for model in models for _, module in walk(model))
        tables = [module._modules for module in modules]
        # TorchScript's tables are not dicts, and their modules cannot be replaced
        self._tables = [table for table in tables if isinstance(table, dict)]
        self._then = [dict(table) for table in self._tables]

    def holds(self) -> bool:
        """Whether every module still has the same children; 20 us for a thousand modules."""
        # modules compare by identity
        return self._tables == self._then


def named_tensors(models: Sequence[nn.Module], skip: set[tuple[int, str]]) -> list[Named]:
    """Parameters and persistent buffers in the order of ``state_dict``, tied ones once.

    Args:
        models: wrapped modules; their clean names together name the model.
        skip: ``(id(module), name)`` of tensors to leave out, which the caller reads itself.

    Raises:
        ValueError: two different tensors have the same clean name; a lazy module has none yet; a
            nested tensor.
    """
    first: dict[int, Named] = {}
    aliases: dict[int, list[str]] = {}
    seen: dict[str, int] = {}
    for model in models:
        for prefix, module in walk(model):
            tables: tuple[tuple[Mapping[str, Tensor | None], str], ...] = (
                (module._parameters, "parameter"),
                (module._buffers, "buffer"),
            )
            for table, role in tables:
                for key, tensor in table.items():
                    if tensor is None or (id(module), key) in skip:
                        continue
                    if role == "buffer" and key in module._non_persistent_buffers_set:
                        continue
                    fqn = f"{prefix}{key}"
                    if seen.setdefault(fqn, id(tensor)) != id(tensor):
                        raise ArgumentError(
                            f"{fqn}: two tensors of the model have this name; give the modules "
                            "of the list distinct names, or build one ShardedEMA for each"
                        )
                    if id(tensor) not in first:
                        kind = _role(tensor, role)
                        first[id(tensor)] = Named(fqn, (), tensor, table, key, kind)
                    elif fqn != first[id(tensor)].fqn:
                        aliases.setdefault(id(tensor), []).append(fqn)
    lazy = [named.fqn for named in first.values() if is_lazy(named.tensor)]
    if lazy:
        raise ArgumentError(
            f"{abbreviate(lazy)}: not initialized, as in a torch.nn.Lazy* module before its first "
            "forward; run one with a dummy batch first"
        )
    nested = [named.fqn for named in first.values() if named.tensor.is_nested]
    if nested:
        raise ArgumentError(
            f"{abbreviate(nested)}: a nested tensor has no shape; keep its parts as tensors of "
            "their own, or in a buffer that is not persistent"
        )
    return [
        Named(n.fqn, tuple(dict.fromkeys(aliases.get(i, ()))), n.tensor, n.table, n.key, n.role)
        for i, n in first.items()
    ]


def _role(tensor: Tensor, table: str) -> Role:
    if table == "buffer":
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def whole_shard(named: Named) -> Shard:
    """The shard of a tensor of which this rank holds all elements.

    Raises:
        ValueError: the tensor's elements share memory.
    """
    local = values_of(named.tensor)
    opaque = kind_of(named.tensor) if local is None else ""
    if local is None:
        local = named.tensor.detach()
    elif overlaps(local) and named.role != "buffer":  # which is only read
        raise ArgumentError(
            f"{named.fqn}: shape {tuple(local.shape)} with strides {local.stride()} shares memory "
            "between elements; give it storage of its own (tensor.clone())"
        )
    shape = tuple(local.shape)
    return Shard(
        named.fqn,
        local,
        shape,
        whole(shape),
        named.role,
        named.aliases,
        address=named.address(),
        opaque=opaque,
    )


def tie_shared_storage(shards: list[Shard]) -> list[Shard]:
    """Merges shards of different tensor objects with the same memory, which are tied weights.

    Raises:
        ValueError: two tensors overlap in memory without being the same.
    """
    first: dict[tuple[Any, ...], Shard] = {}
    names: dict[str, list[str]] = {}
    alone: list[Shard] = []
    spans: list[tuple[int, int, int, Shard]] = []  # storage, first byte, last byte
    for shard in shards:
        local = shard.local
        if shard.opaque or local.numel() == 0 or local.device.type == "meta":
            alone.append(shard)
            continue
        storage, begin = local.untyped_storage().data_ptr(), local.data_ptr()
        twin = first.setdefault(
            (begin, local.shape, local.stride(), local.dtype, shard.shape), shard
        )
        if twin is not shard:
            names.setdefault(twin.fqn, []).extend(shard.names)
            continue
        alone.append(shard)
        reach = sum((n - 1) * s for n, s in zip(local.shape, local.stride(), strict=True)) + 1
        spans.append((storage, begin, begin + reach * local.element_size(), shard))
    _refuse_overlaps(spans)
    return [
        replace(shard, aliases=(*shard.aliases, *names[shard.fqn])) if shard.fqn in names else shard
        for shard in alone
    ]


def _refuse_overlaps(spans: list[tuple[int, int, int, Shard]]) -> None:
    """Raises ValueError if two tensors share elements; interleaved tensors do not."""
    spans.sort(key=lambda span: span[:2])
    near: list[tuple[int, int, int, Shard]] = []  # spans that end after the next one begins
    for span in spans:
        storage, begin, _, shard = span
        near = [other for other in near if other[0] == storage and other[2] > begin]
        for *_, other in near:
            if share_memory(other.local, shard.local):
                raise ArgumentError(
                    f"{shard.fqn} and {other.fqn} share a part of their memory; an average of "
                    "both would count it twice: give one of them storage of its own"
                )
        near.append(span)
