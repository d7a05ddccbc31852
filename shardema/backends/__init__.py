"""Backends read a model as shards: one module for each way that a model can be sharded.

A backend is a module with

* ``matches(models) -> bool``: whether the models are sharded in this way;
* ``read(models) -> list[Shard]``: every parameter and persistent buffer, without a collective. Call
  ``ensure_sharded`` before it;
* ``ensure_sharded(models, force=False)``: frees weights that a forward left gathered, so that the
  next forward uses the shards; raises RuntimeError while the gathered weights are in use, unless
  ``force`` is set;
* ``mark_written(models)``: called after the shards were written; a backward through an earlier
  forward must then raise instead of mixing weights;
* ``ranks(models) -> tuple[int, ...] | None``: global ranks that share the models, None for all;
* ``engine(models) -> Engine | None``: the engine that steps the weights and gathers what was
  written into them; None if the training loop and the forward do.

Private attributes of FSDP and DeepSpeed are used in the file of their backend only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from shardema.backends import plain
from shardema.backends.tree import refuse_unknown_wrappers
from shardema.errors import ArgumentError
from shardema.shards.shard import Shard

Models = Sequence[nn.Module]


class Handle(Protocol):
    """Handle of a hook, as torch's ``RemovableHandle``."""

    def remove(self) -> None: ...


class Engine(Protocol):
    """An engine that steps the weights itself; the methods are documented in `zero.Engine`."""

    def applied(self) -> int | None: ...

    def parameters(self) -> Mapping[str, Tensor]: ...

    def release(self) -> None: ...

    def publish(self) -> None: ...

    def hook(
        self, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> Handle: ...


class Backend(Protocol):
    """The functions of a backend module; see the docstring of this module."""

    def matches(self, models: Models) -> bool: ...

    def read(self, models: Models) -> list[Shard]: ...

    def ensure_sharded(self, models: Models, *, force: bool = False) -> None: ...

    def mark_written(self, models: Models) -> None: ...

    def ranks(self, models: Models) -> tuple[int, ...] | None: ...

    def engine(self, models: Models) -> Engine | None: ...


class _Late:
    """A backend whose module is imported only if a model may match it.

    A model can only match if the package that shards it has been imported. Until then `import
    shardema` does not import it either: torch's FSDP and DTensor take about a second.
    """

    def __init__(self, name: str, package: str) -> None:
        self._name, self._package = name, package

    def may_match(self) -> bool:
        return self._package in sys.modules

    def matches(self, models: Models) -> bool:
        return self.may_match() and bool(self._module().matches(models))

    def _module(self) -> Any:
        return importlib.import_module(f"shardema.backends.{self._name}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module(), name)


_LATE = {
    "fsdp1": _Late("fsdp1", "torch.distributed.fsdp"),
    "fsdp2": _Late("fsdp2", "torch.distributed.tensor"),
    "zero": _Late("zero", "deepspeed"),
}
BACKENDS: dict[str, Backend] = {"plain": plain, **cast("dict[str, Backend]", _LATE)}
_TEACHERS = {"zero": _Late("zero_frozen", "deepspeed")}  # models that no training loop steps


def refuse_unknown(models: Models) -> None:
    """Raises ValueError for unknown wrappers, and for a part of a sharded module."""
    refuse_unknown_wrappers(models)
    for late in (_LATE["fsdp1"], _LATE["fsdp2"]):
        if late.may_match():
            late.refuse_parts(models)


def find(models: Models, name: str = "auto") -> tuple[str, Backend]:
    """The backend of ``models`` and its name.

    Args:
        models: modules as the training loop holds them, wrapped.
        name: ``"auto"``, or the name of the backend that must match. ``"plain"`` includes DDP.

    Raises:
        ValueError: two backends match, the named one does not, or there is no such backend.
    """
    matching = [key for key in BACKENDS if key != "plain" and BACKENDS[key].matches(models)]
    if len(matching) > 1:
        raise ArgumentError(
            f"the model is sharded in several ways at once: {matching}; shard it in one way, or "
            "build one ShardedEMA for each part"
        )
    found = matching[0] if matching else "plain"
    if name not in ("auto", *BACKENDS):
        raise ArgumentError(f"backend: got {name!r}, expected 'auto' or one of {sorted(BACKENDS)}")
    if name not in ("auto", found):
        kinds = sorted({type(model).__name__ for model in models})
        raise ArgumentError(
            f"backend: got {name!r}, but the model ({', '.join(kinds)}) is of backend {found!r}; "
            "leave backend='auto', or build the EMA after wrapping the model"
        )
    return found, BACKENDS[found]


def find_teacher(models: Models) -> tuple[str, Backend]:
    """Like `find`, for models that nothing steps: also an engine without an optimizer."""
    for name, late in _TEACHERS.items():
        if late.matches(models):
            return name, cast("Backend", late)
    return find(models)


__all__ = ["BACKENDS", "Backend", "Engine", "Handle", "find", "find_teacher", "refuse_unknown"]
