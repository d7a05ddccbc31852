"""Clean names: what the unwrapped model calls its tensors.

A wrapper (DDP, FSDP, torch.compile, activation checkpointing) holds the wrapped module as a child
of a known name. Only that child of that type is skipped, so a user's own child called ``module``
keeps its name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from shardema.shard import REPLACED, Role, Shard, overlaps, whole

# (where the type lives, its name, the child that it wraps); looked up in sys.modules, since a
# model can only be wrapped by a type that was imported, and importing them all takes seconds.
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
)


@dataclass(frozen=True, slots=True)
class Named:
    """One tensor of the model: where it is registered and what it is called."""

    fqn: str
    aliases: tuple[str, ...]
    tensor: Tensor
    table: Mapping[str, Tensor | None]  # the module's _parameters or _buffers
    key: str
    role: Role

    def here(self) -> bool:
        """Whether the module still has this very tensor; see `Form` for the module itself."""
        return self.table.get(self.key) is self.tensor

    def address(self) -> Callable[[], int]:
        """For `Shard.address`: checks that the table still holds this tensor."""
        table, key, tensor = self.table, self.key, self.tensor
        return lambda: tensor.data_ptr() if table.get(key) is tensor else REPLACED


def wrapped_child(module: nn.Module) -> str | None:
    """Name of the child that ``module`` wraps, None if it is no wrapper."""
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


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its clean prefix (``"a.b."``), one that is registered twice twice."""
    yield prefix, module
    inner = wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, prefix if name == inner else f"{prefix}{name}.")


class Form:
    """Which module is where in the models, as it was when this was made.

    A tensor's own table says nothing about whether the model still has that table's module: a block
    that is deep-copied, sharded anew or made anew leaves an orphan behind that looks as before.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        modules = dict.fromkeys(module for model in models for _, module in walk(model))
        self._tables = [module._modules for module in modules]
        self._then = [dict(table) for table in self._tables]

    def holds(self) -> bool:
        """Whether every module still has the children that it had: 20 us for a thousand of them."""
        # modules are equal where they are the same one
        return self._tables == self._then


def named_tensors(models: Sequence[nn.Module], skip: set[tuple[int, str]]) -> list[Named]:
    """Parameters and persistent buffers in the order of ``state_dict``, tied ones once.

    Args:
        models: wrapped modules; their clean names together name the model.
        skip: ``(id(module), name)`` of tensors that the caller reads in another way.

    Raises:
        ValueError: two different tensors have the same clean name.
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
                        raise ValueError(
                            f"{fqn}: two tensors of the model have this name; give the modules "
                            "of the list distinct names, or keep one ShardedEMA for each"
                        )
                    if id(tensor) not in first:
                        kind = _role(tensor, role)
                        first[id(tensor)] = Named(fqn, (), tensor, table, key, kind)
                    elif fqn != first[id(tensor)].fqn:
                        aliases.setdefault(id(tensor), []).append(fqn)
    return [
        Named(n.fqn, tuple(dict.fromkeys(aliases.get(i, ()))), n.tensor, n.table, n.key, n.role)
        for i, n in first.items()
    ]


def _role(tensor: Tensor, table: str) -> Role:
    if table == "buffer":
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def whole_shard(named: Named) -> Shard:
    """The shard of a tensor that this rank holds in full.

    Raises:
        ValueError: the tensor's elements share memory.
    """
    local = named.tensor.detach()
    if overlaps(local) and named.role != "buffer":  # which is only read
        raise ValueError(
            f"{named.fqn}: shape {tuple(local.shape)} with strides {local.stride()} shares memory "
            "between elements; give it storage of its own (tensor.clone())"
        )
    shape = tuple(local.shape)
    address = named.address()
    return Shard(named.fqn, local, shape, whole(shape), named.role, named.aliases, address=address)


def tie_shared_storage(shards: list[Shard]) -> list[Shard]:
    """Joins shards that are the same memory under different tensor objects, as tied weights.

    Raises:
        ValueError: two tensors share a part of their memory.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}
    merged: list[Shard | None] = list(shards)
    for index, shard in enumerate(shards):
        local = shard.local
        if local.numel() == 0 or local.device.type == "meta":
            continue
        begin = local.data_ptr()
        reach = sum((n - 1) * s for n, s in zip(local.shape, local.stride(), strict=True)) + 1
        stop = begin + reach * local.element_size()
        storage = local.untyped_storage().data_ptr()
        for other_begin, other_stop, other in spans.setdefault(storage, []):
            twin = merged[other]
            assert twin is not None
            same = (other_begin, other_stop) == (begin, stop)
            if same and twin.local.stride() == local.stride() and twin.shape == shard.shape:
                names = (*twin.aliases, shard.fqn, *shard.aliases)
                merged[other] = replace(twin, aliases=names)
                merged[index] = None
                break
            if begin < other_stop and other_begin < stop:
                raise ValueError(
                    f"{shard.fqn} and {twin.fqn} share a part of their memory; an average of "
                    "both would count it twice: give one of them storage of its own"
                )
        else:
            spans[storage].append((begin, stop, index))
    return [shard for shard in merged if shard is not None]
