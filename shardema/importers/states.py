"""Recognises the state dicts of other libraries by their content, and finds the average in them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files.safetensors import BROKEN, checked_int
from shardema.files.sources import Imported

_State = Mapping[str, Any]
_LISTED = "shadow_params"


@dataclass(frozen=True)
class StateFormat:
    """A state dict of another library.

    Attributes:
        says: what it is recognised by.
        looks: whether a state is one.
        read: what it holds; may raise one of `BROKEN`.
    """

    says: str
    looks: Callable[[_State], bool]
    read: Callable[[_State], Imported]


def read(
    label: str,
    path: str,
    state: Any,
    format: str,
    key: str,
    prefix: str,
    names: Sequence[str] | None,
) -> Imported:
    """The average in ``state``; see `shardema.importers.read`."""

    def refuse(text: str) -> NoReturn:
        raise (
            CheckpointError(f"{label}: {text}", path=path)
            if path
            else ArgumentError(f"{label}: {text}")
        )

    try:
        part = part_of(state, key)
        fitting = [name for name, known in STATES.items() if known.looks(part)]
    except BROKEN as error:
        refuse(f"key={key!r}: {error!s:.300}")
    if format == "auto" and len(fitting) != 1:
        reads = f"reads as {' and as '.join(fitting)}" if fitting else "is in no known format"
        raise ArgumentError(
            f"{label}: {_found(part)} {reads}; give importers.read(source, format=), one of "
            f"{list(STATES)}, or key=, the part that holds the average (shardema convert: "
            "--format, --key)"
        )
    name = fitting[0] if format == "auto" else format
    if name not in fitting:
        known = (
            f"{name} is recognised by {STATES[name].says}"
            if name in STATES
            else "it is a folder or a file"
        )
        raise ArgumentError(f"{label}: got {_found(part)}, expected format {name!r}: {known}")
    try:
        found = replace(STATES[name].read(part), format=name, path=path)
    except (*BROKEN, OverflowError) as error:  # the latter of an endless number
        refuse(f"broken {name} state ({error!s:.300})")
    return renamed(label, found, prefix, names)


def part_of(state: Any, key: str) -> _State:
    """The dict under ``key``, or the entries whose names begin with it."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"got {type(state).__name__}, expected a dict")
    if not key:
        return state
    words = key.split(".")
    for end in range(len(words), 0, -1):
        head, rest = ".".join(words[:end]), ".".join(words[end:])
        if isinstance(state.get(head), Mapping):
            return part_of(state[head], rest)
    inner = {n[len(key) + 1 :]: v for n, v in state.items() if str(n).startswith(f"{key}.")}
    if not inner:
        raise ValueError(f"nothing is there in {_found(state)}")
    return inner


def renamed(label: str, found: Imported, prefix: str, names: Sequence[str] | None) -> Imported:
    """``found`` with ``prefix`` removed from its names, or its list named by ``names``."""
    tensors = dict(found.tensors)
    if names is not None:
        if found.naming != "order" or len(names) != len(tensors) or len({*names}) != len(names):
            kind = f"a list of {len(tensors)}" if found.naming == "order" else "tensors with names"
            raise ArgumentError(
                f"{label}: got names= with {len(names)} names for {kind}, expected a different "
                "name for each tensor of a list"
            )
        tensors = dict(zip(names, tensors.values(), strict=True))
        found = replace(found, tensors=tensors, naming="fqn")
    if prefix:
        begin = prefix.replace(".", "") if found.naming == "dotless" else prefix
        tensors = {n.removeprefix(begin): v for n, v in tensors.items() if n.startswith(begin)}
        if not tensors or found.naming == "order":
            shown = abbreviate([name[:100] for name in found.tensors])
            raise ArgumentError(f"{label}: prefix={prefix!r}: no name begins with it: {shown}")
        found = replace(found, tensors=tensors)
    return found


def _found(state: _State) -> str:
    keys = [reprlib.repr(key) for key in state]
    return f"a dict of {abbreviate(keys)}" if keys else "an empty dict"


# ---- the formats ------------------------------------------------------------------------------


def _tensors(state: Any) -> dict[str, Tensor]:
    """The tensors of a flat state dict; extra state is left out."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ArgumentError(f"got {type(state).__name__}, expected a dict of tensors by name")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _within(state: _State, prefix: str) -> dict[str, Tensor]:
    inner = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    return _tensors(inner)


def _listed(values: Any) -> dict[str, Tensor]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, Tensor) for v in values):
        raise ArgumentError(f"{_LISTED}: got {type(values).__name__}, expected a list of tensors")
    return {str(number): value for number, value in enumerate(values)}


def _numbered(state: _State) -> dict[str, Tensor]:
    """``shadow_params.0``, ``shadow_params.1``, ... as a list."""
    given = _within(state, f"{_LISTED}.")
    return {str(number): given[str(number)] for number in range(len(given))}


def count_of(value: Any, what: str) -> int:
    """A count that is a number or a tensor of one element. Raises ValueError."""
    try:
        return checked_int(_number(value))
    except ValueError as error:
        raise ArgumentError(f"{what}: {error}") from error


def _number(value: Any) -> Any:
    """``value``, of a tensor the one number in it. Raises ValueError."""
    try:
        return value.item() if isinstance(value, Tensor) else value
    except RuntimeError as error:  # several elements, none, or no values
        raise ValueError(f"expected a number, got a tensor: {error!s:.100}") from error


def _words(state: _State, leave: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers, words and flags beside the tensors."""
    kinds = (int, float, bool, str)
    return {k: v for k, v in state.items() if isinstance(v, kinds) and k not in leave}


def _names(state: _State) -> set[str]:
    return {name for name in state if isinstance(name, str)}


def _read_torch(state: _State) -> Imported:
    count = count_of(state["n_averaged"], "n_averaged")
    return Imported("", _within(state, "module."), num_updates=count)


def _read_timm(state: _State) -> Imported:
    return Imported("", _tensors(state["state_dict_ema"]), metadata=_words(state))


def _read_diffusers(state: _State) -> Imported:
    count = count_of(state["optimization_step"], "optimization_step")
    tensors = _listed(state[_LISTED]) if _LISTED in state else _numbered(state)
    return Imported("", tensors, "order", count, _words(state))


def _read_torch_ema(state: _State) -> Imported:
    given = state["num_updates"]  # None where it does not count
    count = None if given is None else count_of(given, "num_updates")
    return Imported("", _listed(state[_LISTED]), "order", count, _words(state))


def _read_ema_pytorch(state: _State) -> Imported:
    count = count_of(state["step"], "step")
    if count and not _number(state["initted"]):
        raise ValueError(f"step is {count} before the first update")
    return Imported("", _within(state, "ema_model."), num_updates=count)


def _read_lit_ema(state: _State) -> Imported:
    given = state["num_updates"]
    count = None if _number(given) == -1 else count_of(given, "num_updates")
    tensors = {n: v for n, v in _tensors(state).items() if n not in ("decay", "num_updates")}
    return Imported("", tensors, "dotless", count, {"decay": float(_number(state["decay"]))})


def _read_lightning(state: _State) -> Imported:
    count = count_of(state["global_step"], "global_step")
    averaged = count_of(state["averaging_state"]["n_averaged"], "n_averaged")
    metadata = {**_words(state), "n_averaged": averaged}
    return Imported("", _tensors(state["state_dict"]), num_updates=count, metadata=metadata)


def _read_state_dict(state: _State) -> Imported:
    return Imported("", _tensors(state))


def _is_torch(state: _State) -> bool:
    names = _names(state)
    return "n_averaged" in names and any(name.startswith("module.") for name in names)


def _is_lit_ema(state: _State) -> bool:
    names = _names(state)
    dotless = not any("." in name for name in names)
    return {"decay", "num_updates"} < names and _LISTED not in names and dotless


def _is_plain(state: _State) -> bool:
    """Tensors by name, with no second place where tensors are, and no sign of the others."""
    nested = [v for v in state.values() if isinstance(v, Mapping | list | tuple)]
    inner = (v for one in nested for v in (one.values() if isinstance(one, Mapping) else one))
    marked = any(known.looks(state) for name, known in STATES.items() if name != "state_dict")
    some = not state or any(isinstance(v, Tensor) for v in state.values())
    return some and not marked and not any(isinstance(v, Tensor) for v in inner)


STATES: dict[str, StateFormat] = {
    "torch_averaged": StateFormat(
        "n_averaged beside module.*, torch's AveragedModel.state_dict()", _is_torch, _read_torch
    ),
    "timm": StateFormat(
        "state_dict_ema, a checkpoint of timm's train.py",
        lambda state: "state_dict_ema" in state,
        _read_timm,
    ),
    "diffusers": StateFormat(
        "shadow_params and optimization_step, EMAModel.state_dict() of diffusers, or a folder of "
        "its save_pretrained",
        lambda state: _LISTED in state and "optimization_step" in state,
        _read_diffusers,
    ),
    "simpletuner": StateFormat(
        "shadow_params.0, shadow_params.1, ... and optimization_step, SimpleTuner's ema_model.pt "
        "or its folder of torch.distributed.checkpoint",
        lambda state: f"{_LISTED}.0" in state and "optimization_step" in state,
        _read_diffusers,
    ),
    "torch_ema": StateFormat(
        "shadow_params, num_updates and decay, torch_ema's state_dict()",
        lambda state: {_LISTED, "num_updates", "decay"} <= _names(state),
        _read_torch_ema,
    ),
    "ema_pytorch": StateFormat(
        "ema_model.*, initted and step, the state_dict() of ema-pytorch's EMA or KarrasEMA",
        lambda state: {"initted", "step"} <= _names(state),
        _read_ema_pytorch,
    ),
    "lit_ema": StateFormat(
        "decay and num_updates beside names without dots, LitEma.state_dict()",
        _is_lit_ema,
        _read_lit_ema,
    ),
    "lightning": StateFormat(
        "current_model_state beside state_dict, a checkpoint of Lightning's WeightAveraging",
        lambda state: {"current_model_state", "state_dict"} <= _names(state),
        _read_lightning,
    ),
    "state_dict": StateFormat("tensors by the model's names", _is_plain, _read_state_dict),
}
