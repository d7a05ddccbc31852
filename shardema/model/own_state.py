"""The keys of the unwrapped model's own ``state_dict()``, found without gathering anything.

::

    model     -skeleton->    the same modules without wrappers; a meta tensor stands for each tensor
                             that is averaged or not whole on this rank
    skeleton  -state_dict->  runs the model's own code (overrides, hooks, extra state); each value
                             is a known tensor, or something that a module added
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardema.backends.tree import walk, wrapped_child
from shardema.errors import CallError, abbreviate
from shardema.ranks.plan import Item, Plan
from shardema.shards.boxes import whole
from shardema.shards.shard import Role, Shard

# Packages whose state-dict hooks work on wrapped modules and do not apply to the skeleton.
_WRAPPERS = ("torch.distributed.", "deepspeed.", "accelerate.")
_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


@dataclass(frozen=True)
class OwnState:
    """How a model's own code changes its state dict, on this rank.

    Attributes:
        keys: by fqn, the keys of a tensor if they differ from its names; empty if it is omitted.
        tensors: by key, tensors that modules add: whole, and the same for every average.
        values: by key, other objects that modules add.
    """

    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> list[Any]:
        """What a plan depends on: if it has changed, a new plan is needed."""
        tensors = [(key, tuple(t.shape), str(t.dtype)) for key, t in self.tensors.items()]
        return [dict(self.keys), tensors, sorted(self.values)]

    def shards(self, owned: Collection[str]) -> list[Shard]:
        """The added tensors that this rank provides to the others, as buffers."""
        chosen = {key: t.detach().contiguous() for key, t in self.tensors.items() if key in owned}
        return [
            Shard(key, tensor, tuple(tensor.shape), whole(tensor.shape), "buffer")
            for key, tensor in chosen.items()
        ]


@dataclass(frozen=True)
class MergedState:
    """`OwnState` and export form of all ranks, merged; equal on all ranks.

    Attributes:
        keys: as `OwnState.keys`.
        owners: by key of an added tensor, the index of the first rank that has it, which provides
            it.
        holders: by key of another added object, the indices of the ranks that have it.
        ignored: names of ignored buffers.
        packed: fqns of frozen parameters that hold packed data rather than numbers of their dtype.
        stem: of the file names of an export.
        files: for an adapter, by fqn the stem and the name of each exported tensor; None to export
            all tensors.
        refusal: why the model cannot be exported; empty if it can.
        pending: ``stem``, ``files`` and ``refusal`` are not known yet.
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
    def of(cls, merged: Mapping[str, Any]) -> MergedState:
        """From what `merge` returned."""
        keys = {fqn: tuple(names) for fqn, names in merged["keys"].items()}
        ignored, packed = (frozenset(merged[word]) for word in ("ignored", "packed"))
        files = merged["files"] and {fqn: tuple(place) for fqn, place in merged["files"].items()}
        form = merged["stem"], files, merged["refusal"], merged["pending"]
        return cls(keys, merged["owners"], merged["holders"], ignored, packed, *form)

    @classmethod
    def none(cls) -> MergedState:
        """Before the first exchange."""
        return cls({}, {}, {}, frozenset(), frozenset(), "", None, "", False)

    def names(self, item: Item) -> tuple[str, ...]:
        """The keys that a tensor has in the unwrapped model's state dict."""
        if item.fqn in self.keys:
            return self.keys[item.fqn]
        _, in_file = (self.files or {}).get(item.fqn, ("", ""))  # PEFT's, an alias in `applied`
        return (item.fqn, *(name for name in item.aliases if name != in_file))

    def averages_adapters(self, plan: Plan) -> bool:
        """Whether the model has PEFT adapters, and nothing else is averaged."""
        return bool(self.files) and all(item.stem for item in plan.items if item.averaged)

    def adapter_names(self, item: Item) -> tuple[str, ...]:
        """The name of an adapter's tensor in PEFT's file, after its folder; none of any other."""
        folder, slash, _ = item.stem.rpartition("/")
        return (f"{folder}{slash}{item.file_name}",) if item.stem else ()

    def applied(self, plan: Plan, dropped: Collection[str]) -> Plan:
        """The plan with each item's keys as aliases, and its name and stem in an export."""
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
        """The plan of a checkpoint: packed parameters, which must not be cast, become buffers."""
        role: Role = "buffer"
        items = [replace(i, role=role) if i.fqn in self.packed else i for i in plan.items]
        return replace(plan, items=tuple(items))

    def check_values(self, op: str, receivers: int) -> None:
        """Raises RuntimeError if one of the first ``receivers`` ranks lacks extra state.

        Only extra state that is not a tensor: it is not transferred between ranks.
        """
        first = set(range(receivers))
        lacking = sorted(key for key, have in self.holders.items() if not first <= set(have))
        if lacking:
            raise CallError(
                f"{op}: {abbreviate(lacking)}: extra state of a module that is no tensor, so it "
                "is not transferred, and a rank that receives the result does not have it; make it "
                "a tensor"
            )

    def check_export(self) -> None:
        """Raises RuntimeError if the model cannot be exported."""
        if self.refusal:
            raise CallError(f"export: {self.refusal}")
        remedy = "use ema.full_state_dict(), or make it a tensor"
        self.check_tensors("export", remedy)

    def check_tensors(self, op: str, remedy: str) -> None:
        """Raises RuntimeError if a module adds something other than tensors."""
        if self.holders:
            raise CallError(
                f"{op}: {abbreviate(sorted(self.holders))}: state that the model's modules write "
                f"and that is no tensor, which a file of tensors cannot hold; {remedy}"
            )


def payload(
    state: OwnState, ignored: Collection[str], packed: Collection[str], form: Any
) -> dict[str, Any]:
    """What a rank sends to the others, as JSON; ``form`` is a `pretrained.Form`."""
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


def merge(gathered: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the payloads of all ranks; the first rank that has a key provides its value."""
    keys: dict[str, list[str]] = {}
    owners: dict[str, int] = {}
    holders: dict[str, list[int]] = {}
    ignored: set[str] = set()
    packed: set[str] = set()
    for index, word in enumerate(gathered):
        for fqn, names in word["keys"].items():
            keys.setdefault(fqn, names)
        for key in word["tensors"]:
            owners.setdefault(key, index)
        for key in word["values"]:
            holders.setdefault(key, []).append(index)
        ignored.update(word["ignored"])
        packed.update(word["packed"])
    return {
        **{word: gathered[0][word] for word in ("stem", "files", "refusal", "pending")},
        "keys": keys,
        "owners": owners,
        "holders": holders,
        "ignored": sorted(ignored),
        "packed": sorted(packed),
    }


# ---- reading ----------------------------------------------------------------------------------


def packed(models: Sequence[nn.Module]) -> frozenset[str]:
    """Fqns of frozen parameters that hold packed data rather than numbers of their dtype.

    For example bitsandbytes' 4-bit weights, whose bytes are stored in tensors of any dtype
    (``quant_storage``). They are recognized by ``quant_state`` or by their own parameter class.
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
    """Runs the models' own state-dict code on skeletons. Local.

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
        raise CallError(
            f"{abbreviate(sorted(computed))}: {made.owner_of(computed[0])} computes this state "
            "from weights that are averaged or sharded, so it would not fit the average; compute "
            "it when it is loaded, or exclude those weights with select="
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
    """Copies of the models without wrappers, with meta tensors, to run their own code on.

    Attributes:
        models: the skeletons.
        table: shards by each of their names.
    """

    def __init__(
        self, models: Sequence[nn.Module], shards: Sequence[Shard], averaged: Collection[str]
    ) -> None:
        self.table: dict[str, Shard] = {name: shard for shard in shards for name in shard.names}
        self._averaged = averaged
        self._by_prefix: dict[str, list[str]] = {}
        for name in self.table:
            prefix, dot, key = name.rpartition(".")
            self._by_prefix.setdefault(prefix + dot, []).append(key)
        self._stand_ins: dict[str, Tensor] = {}
        self._known: dict[Any, Shard] = {}
        self._others: dict[Any, str] = {}  # names of buffers that have no shard
        self._clones: dict[int, nn.Module] = {}
        self.models: list[nn.Module] = [self._clone(model, "") for model in models]

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of all models as one."""
        merged: dict[str, Any] = {}
        for model in self.models:
            try:
                with torch.no_grad():
                    merged.update(model.state_dict(keep_vars=True))
            except Exception as error:
                raise CallError(
                    f"{type(model).__name__}.state_dict() of the unwrapped model, asked for its "
                    f"keys with stand-ins for weights that are averaged or sharded, raised "
                    f"{type(error).__name__}: {error}; the code that writes a module's state must "
                    "not need the values of its weights"
                ) from error
        return merged

    def shard_of(self, value: Any) -> Shard | None:
        """The shard that ``value`` represents, None if there is none."""
        return self._known.get(_identity(value)) if isinstance(value, Tensor) else None

    def is_one_of(self, value: Any, names: Collection[str]) -> bool:
        """Whether ``value`` is a buffer of one of these names."""
        return isinstance(value, Tensor) and self._others.get(_identity(value)) in names

    def owner_of(self, key: str) -> str:
        """Describes the module that writes ``key``, inferred from the key, for error messages."""
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
        if hasattr(cls, "__del__"):  # the clone must not release what the module owns
            cls = type(cls.__name__, (cls,), {"__del__": lambda self: None})
        if isinstance(module, torch.jit.ScriptModule):  # its contents are stored in C++
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
        """The module's parameters and buffers, with meta tensors where needed."""
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
        """The model's own tensor if it is whole here and not averaged, else a meta tensor."""
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
    """Equal for tensors that are the same view of the same storage."""
    try:
        storage = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has none
        return id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
