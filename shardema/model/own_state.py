"""What the unwrapped model's own ``state_dict()`` would be, told without gathering anything.

::

    model     -skeleton->    the same modules without their wrappers; a tensor that is averaged, or
                             that is not whole on this rank, has a stand-in without values
    skeleton  -state_dict->  the model's own code decides about the keys: overrides, hooks, extra
                             state; a value tells which tensor it is, or is what a module added
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardema.backends.tree import walk, wrapped_child
from shardema.errors import abbreviate
from shardema.ranks.plan import Item, Plan
from shardema.shards.boxes import whole
from shardema.shards.shard import Role, Shard

# Whose hooks work on wrapped modules, and have nothing to say about a model without wrappers.
_WRAPPERS = ("torch.distributed.", "deepspeed.", "accelerate.")
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


@dataclass(frozen=True)
class OwnState:
    """What a model's own code makes of its state, on this rank.

    Attributes:
        keys: by fqn, the keys of a tensor where they are not its names; none where it is left out.
        tensors: by key, what a module adds: whole, and the same for every average.
        values: by key, what a module adds that is no tensor.
    """

    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> list[Any]:
        """What must be the same when it is gathered as when it was planned."""
        tensors = [(key, tuple(t.shape), str(t.dtype)) for key, t in self.tensors.items()]
        return [dict(self.keys), tensors, sorted(self.values)]

    def shards(self, owned: Collection[str]) -> list[Shard]:
        """The added tensors that this rank gives to the others, as buffers."""
        chosen = {key: t.detach().contiguous() for key, t in self.tensors.items() if key in owned}
        return [
            Shard(key, tensor, tuple(tensor.shape), whole(tensor.shape), "buffer")
            for key, tensor in chosen.items()
        ]


@dataclass(frozen=True)
class Outward:
    """The same of all ranks together, which each of them knows.

    Attributes:
        keys: as `OwnState.keys`.
        owners: of each tensor that a module adds, the index of the rank whose it is: the first.
        holders: of each value that is no tensor, the indices of the ranks that have it.
        ignored: names of buffers that are left out.
        packed: fqns of frozen parameters whose bits are no numbers of their dtype.
        stem: of the files of an export.
        files: of an adapter, by fqn the stem and the name of what is exported; None, everything.
        refusal: why it cannot be exported.
        pending: that is not known yet.
    """

    keys: Mapping[str, tuple[str, ...]]
    owners: Mapping[str, int]
    holders: Mapping[str, Sequence[int]]
    ignored: frozenset[str]
    packed: frozenset[str]
    stem: str
    files: Mapping[str, tuple[str, str]] | None
    refusal: str
    pending: bool

    @classmethod
    def of(cls, merged: Mapping[str, Any]) -> Outward:
        """From what `merge` returned."""
        keys = {fqn: tuple(names) for fqn, names in merged["keys"].items()}
        ignored, packed = (frozenset(merged[word]) for word in ("ignored", "packed"))
        files = merged["files"] and {fqn: tuple(place) for fqn, place in merged["files"].items()}
        form = merged["stem"], files, merged["refusal"], merged["pending"]
        return cls(keys, merged["owners"], merged["holders"], ignored, packed, *form)

    @classmethod
    def none(cls) -> Outward:
        """Of ranks that have told nothing yet."""
        return cls({}, {}, {}, frozenset(), frozenset(), "", None, "", False)

    def names(self, item: Item) -> tuple[str, ...]:
        """The keys that a tensor has in the unwrapped model's state dict."""
        return self.keys.get(item.fqn, (item.fqn, *item.aliases))

    def chosen(self, plan: Plan) -> list[int]:
        """Indices of the items that have a key."""
        return [index for index, item in enumerate(plan.items) if self.names(item)]

    def applied(self, plan: Plan, dropped: Collection[str]) -> Plan:
        """The plan, whose items know their keys as further names and are exported under one."""
        items = []
        for item in plan.items:
            names = self.names(item)
            stem, file_name = self.stem if names else "", item.file_name
            if item.fqn in self.keys and names:
                file_name = next((name for name in names if name not in dropped), names[0])
            if self.files is not None:
                stem, file_name = self.files.get(item.fqn, ("", file_name))
            known = (item.fqn, *item.aliases)
            new = dict.fromkeys(name for name in (*names, file_name) if name not in known)
            aliases = (*item.aliases, *new)
            items.append(replace(item, aliases=aliases, file_name=file_name, stem=stem))
        return replace(plan, items=tuple(items))

    def stored(self, plan: Plan) -> Plan:
        """The plan as a checkpoint keeps it: what must not be cast has the role of a buffer."""
        role: Role = "buffer"
        items = [replace(i, role=role) if i.fqn in self.packed else i for i in plan.items]
        return replace(plan, items=tuple(items))

    def check_values(self, op: str, receivers: int) -> None:
        """Raises RuntimeError unless the first ranks, so many, have all that is no tensor."""
        first = set(range(receivers))
        lacking = sorted(key for key, have in self.holders.items() if not first <= set(have))
        if lacking:
            raise RuntimeError(
                f"{op}: {abbreviate(lacking)}: extra state of a module that is no tensor, and "
                "that not every rank has which the result is for; give it as a tensor, which can "
                "travel"
            )

    def check_export(self) -> None:
        """Raises RuntimeError where the model cannot be exported."""
        if self.refusal:
            raise RuntimeError(f"export: {self.refusal}")
        remedy = "take ema.full_state_dict(), or give it as a tensor"
        self.check_tensors("export", remedy)

    def check_tensors(self, op: str, remedy: str) -> None:
        """Raises RuntimeError where a module adds something that is no tensor."""
        if self.holders:
            raise RuntimeError(
                f"{op}: {abbreviate(sorted(self.holders))}: state that the model's modules write "
                f"and that is no tensor, which a file of tensors cannot hold; {remedy}"
            )


def payload(
    state: OwnState, ignored: Collection[str], packed: Collection[str], form: Any
) -> dict[str, Any]:
    """What a rank tells the others, as JSON; ``form`` is a `pretrained.Form`."""
    return {
        "stem": form.stem,
        "files": form.files,
        "refusal": form.refusal,
        "pending": form.pending,
        "keys": {fqn: list(names) for fqn, names in state.keys.items()},
        "tensors": list(state.tensors),
        "values": list(state.values),
        "ignored": sorted(ignored),
        "packed": sorted(packed),
    }


def merge(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The payloads of all ranks as one: of what several ranks have, the first one's is taken."""
    keys: dict[str, list[str]] = {}
    owners: dict[str, int] = {}
    holders: dict[str, list[int]] = {}
    ignored: set[str] = set()
    packed: set[str] = set()
    for index, word in enumerate(told):
        for fqn, names in word["keys"].items():
            keys.setdefault(fqn, names)
        for key in word["tensors"]:
            owners.setdefault(key, index)
        for key in word["values"]:
            holders.setdefault(key, []).append(index)
        ignored.update(word["ignored"])
        packed.update(word["packed"])
    return {
        **{word: told[0][word] for word in ("stem", "files", "refusal", "pending")},
        "keys": keys,
        "owners": owners,
        "holders": holders,
        "ignored": sorted(ignored),
        "packed": sorted(packed),
    }


# ---- reading ----------------------------------------------------------------------------------


def packed(models: Sequence[nn.Module]) -> frozenset[str]:
    """Frozen parameters that hold other data than numbers of their dtype.

    Such as bitsandbytes' 4-bit weights, whose bytes lie in tensors of any dtype
    (``quant_storage``): told by their ``quant_state``, or by a parameter class of their own.
    """
    found = set()
    for model in models:
        for prefix, module in walk(model):
            for key, param in module._parameters.items():
                if param is None or param.requires_grad or not param.is_floating_point():
                    continue
                holder = module if key == "weight" else param
                states = (getattr(o, "quant_state", None) for o in (param, holder))
                own_class = type(param) is not nn.Parameter and nn.Parameter in type(param).__mro__
                foreign = own_class and not type(param).__module__.startswith("torch.")
                if foreign or any(state is not None for state in states):
                    found.add(f"{prefix}{key}")
    return frozenset(found)


def read(
    models: Sequence[nn.Module],
    shards: Sequence[Shard],
    averaged: Collection[str],
    ignored: Collection[str],
) -> OwnState:
    """What the models' own code makes of their state. Local.

    Raises:
        RuntimeError: a module computes state from tensors that are averaged or not whole here, or
            its code fails without their values.
    """
    if not any(_has_own_code(module) for model in models for _, module in walk(model)):
        return OwnState()
    made = Skeletons(models, shards, averaged)
    table = made.table
    keys: dict[str, list[str]] = {shard.fqn: [] for shard in shards}
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    computed = []
    for key, value in made.state_dict().items():
        shard = made.shard_of(value) or (table.get(key) if isinstance(value, Tensor) else None)
        if shard is not None:
            keys[shard.fqn].append(key)
        elif key in ignored or made.is_one_of(value, ignored):
            continue
        elif not isinstance(value, Tensor):
            values[key] = value
        elif value.device.type == "meta" or hasattr(value, "device_mesh"):
            computed.append(key)
        elif is_traceable_wrapper_subclass(value):  # which cannot be taken apart
            values[key] = value
        else:
            tensors[key] = value
    if computed:
        raise RuntimeError(
            f"{abbreviate(sorted(computed))}: {made.owner_of(computed[0])} computes this state "
            "from weights that are averaged or sharded, so it would not fit the average; compute "
            "it where it is loaded, or leave those weights out with select="
        )
    renamed = {
        shard.fqn: tuple(keys[shard.fqn])
        for shard in shards
        if set(keys[shard.fqn]) != set(shard.names)
    }
    return OwnState(renamed, tensors, values)


def _has_own_code(module: nn.Module) -> bool:
    if wrapped_child(module) is not None:
        return False
    methods = (getattr(type(module), name, None) for name in _METHODS)
    overridden = any(getattr(m, "__module__", "") != nn.Module.__module__ for m in methods)
    return overridden or any(True for _ in _hooks(module))


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of its ``state_dict`` that are not a wrapper's."""
    for hooks in (module._state_dict_pre_hooks, module._state_dict_hooks):
        yield from (hook for hook in hooks.values() if not _of_wrapper(hook))


def _of_wrapper(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)  # torch wraps those of its public calls
    inner = getattr(inner, "func", inner)  # a partial
    home = getattr(inner, "__module__", None) or type(inner).__module__
    return f"{home}.".startswith(_WRAPPERS)


class Skeletons:
    """The models without wrappers, and with stand-ins; their code runs on them.

    Attributes:
        models: the skeletons.
        table: shards by each of their names.
    """

    def __init__(
        self, models: Sequence[nn.Module], shards: Sequence[Shard], averaged: Collection[str]
    ) -> None:
        self.table = {name: shard for shard in shards for name in shard.names}
        self._averaged = averaged
        self._by_prefix: dict[str, list[str]] = {}
        for name in self.table:
            prefix, dot, key = name.rpartition(".")
            self._by_prefix.setdefault(prefix + dot, []).append(key)
        self._stand_ins: dict[str, Tensor] = {}
        self._known: dict[Any, Shard] = {}
        self._others: dict[Any, str] = {}  # names of tensors that are not gathered
        self._clones: dict[int, nn.Module] = {}
        self.models = [self._clone(model, "") for model in models]

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of all models as one."""
        merged: dict[str, Any] = {}
        for model in self.models:
            try:
                with torch.no_grad():
                    merged.update(model.state_dict(keep_vars=True))
            except Exception as error:
                raise RuntimeError(
                    f"{type(model).__name__}.state_dict() of the unwrapped model, asked for its "
                    f"keys with stand-ins for weights that are averaged or sharded, raised "
                    f"{type(error).__name__}: {error}; the code that writes a module's state must "
                    "not need the values of its weights"
                ) from error
        return merged

    def shard_of(self, value: Any) -> Shard | None:
        """The shard that ``value`` stands for."""
        return self._known.get(_identity(value)) if isinstance(value, Tensor) else None

    def is_one_of(self, value: Any, names: Collection[str]) -> bool:
        """Whether ``value`` is a buffer of one of these names."""
        return isinstance(value, Tensor) and self._others.get(_identity(value)) in names

    def owner_of(self, key: str) -> str:
        """Words for the module that writes ``key``, as far as its name tells."""
        found = "", self.models[0]
        for model in self.models:
            for name, module in model.named_modules():
                if key.startswith(f"{name}.") and len(name) > len(found[0]):
                    found = name, module
        return f"module {found[0]!r} ({type(found[1]).__name__})"

    def _clone(self, module: nn.Module, prefix: str) -> nn.Module:
        inner = wrapped_child(module)
        if inner is not None:
            wrapped = module._modules[inner]
            assert wrapped is not None, inner
            return self._clone(wrapped, prefix)
        if id(module) in self._clones:
            return self._clones[id(module)]
        cls: type[Any] = type(module)
        if hasattr(cls, "__del__"):  # what it closes is not the clone's
            cls = type(cls.__name__, (cls,), {"__del__": lambda self: None})
        if isinstance(module, torch.jit.ScriptModule):  # what it holds lies in C++
            clone = nn.Module()
        else:
            clone = object.__new__(cls)
            clone.__dict__.update(module.__dict__)
        self._clones[id(module)] = clone
        tables = self._tables(module, prefix)
        for key in tables["_parameters"]:
            clone.__dict__.pop(key, None)  # where FSDP1 keeps a view of its flat parameter
        clone.__dict__.update(tables)
        for word in ("_state_dict_hooks", "_state_dict_pre_hooks"):
            hooks = getattr(module, word)
            clone.__dict__[word] = type(hooks)(
                (number, hook) for number, hook in hooks.items() if not _of_wrapper(hook)
            )
        clone.__dict__["_modules"] = {
            name: None if child is None else self._clone(child, f"{prefix}{name}.")
            for name, child in module._modules.items()
        }
        return clone

    def _tables(self, module: nn.Module, prefix: str) -> dict[str, dict[str, Any]]:
        """The module's tables of parameters and buffers, with stand-ins."""
        parameters: dict[str, Tensor | None] = {
            key: param
            for key, param in module._parameters.items()
            if param is None or prefix + key in self.table  # else FSDP1's flat parameter
        }
        buffers = dict(module._buffers)
        for key in self._by_prefix.get(prefix, ()):
            shard = self.table[prefix + key]
            place = buffers if key in buffers else parameters
            place[key] = self._tensor(shard, place.get(key), module, key)
        for key, buffer in buffers.items():
            if buffer is not None and prefix + key not in self.table:
                self._others[_identity(buffer)] = prefix + key
        return {"_parameters": parameters, "_buffers": buffers}

    def _tensor(self, shard: Shard, own: Tensor | None, module: nn.Module, key: str) -> Tensor:
        """The model's own tensor where it is whole here and not averaged, else a stand-in."""
        tensor = self._stand_ins.get(shard.fqn)
        if tensor is None:
            here = shard.boxes == whole(shard.shape) and own is not None
            plain = own is not None and not hasattr(own, "device_mesh")
            if here and plain and own is not None and tuple(own.shape) == shard.shape:
                tensor = own
            if tensor is None or shard.fqn in self._averaged:
                tensor = torch.empty(shard.shape, dtype=shard.own.dtype, device="meta")
                if shard.role != "buffer":
                    tensor = nn.Parameter(tensor, requires_grad=False)
                for holder in (own, module if key == "weight" else None):
                    state = getattr(holder, "quant_state", None)  # bitsandbytes writes it out
                    if state is not None:
                        tensor.quant_state = state  # type: ignore[attr-defined]
            self._stand_ins[shard.fqn] = tensor
            self._known[_identity(tensor)] = shard
        return tensor


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same elements of the same memory."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has none
        return id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
