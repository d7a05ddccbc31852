"""Tensor subclasses as quantisation and float8 training make them, without their libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shardema.backends import tree

_ALIASES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.view.default,  # as DTensor.from_local does, in the same shape
)


class Packed(Tensor):
    """Values in int8, as torchao's and quanto's weights: a wrapper without memory of its own."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, scale: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.packed, self.scale = packed, scale

    @classmethod
    def of(cls, values: Tensor) -> Packed:
        scale = values.abs().max() / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def values(self) -> Tensor:
        return self.packed * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> Packed:
        return Packed(inner["packed"], inner["scale"])

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        one = args[0]
        if func in _ALIASES:
            return cls(one.packed, one.scale)
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return cls(one.packed.clone(), one.scale.clone())
        if func is torch.ops.aten.copy_.default:
            one.packed.copy_(args[1].packed)
            one.scale.copy_(args[1].scale)
            return one
        raise NotImplementedError(str(func))


class Mute(Packed):
    """The same, which cannot even be copied."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIASES:
            return cls(args[0].packed, args[0].scale)
        raise KeyError(func)


class Casting(Tensor):
    """A weight of float8 training: its high-precision values, and what a cast needs besides."""

    @staticmethod
    def __new__(
        cls, values: Tensor, other: Tensor | None = None, *, dtype: Any = None, shape: Any = None
    ) -> Casting:
        shape, dtype = shape or values.shape, dtype or values.dtype
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    def __init__(self, values: Tensor, other: Tensor | None = None, **_: Any) -> None:
        self._tensor, self._other = values, other
        self._precomputed_scale: Tensor | None = None

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        more = {"_other": self._other, "_precomputed_scale": self._precomputed_scale}
        return ["_tensor", *(name for name, value in more.items() if value is not None)], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> Casting:
        return Casting(inner["_tensor"])

    def __repr__(self, **_: Any) -> str:
        return f"Casting({self._tensor})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ALIASES[:2]:
            one = args[0]
            return cls(one._tensor, one._other, dtype=one.dtype, shape=one.shape)

        def inner(value: Any) -> Any:
            return value._tensor if isinstance(value, cls) else value

        args, kwargs = torch.utils._pytree.tree_map(inner, (args, kwargs or {}))
        out = func(*args, **kwargs)
        kept = (
            torch.ops.aten.split.Tensor,
            torch.ops.aten.new_zeros.default,
            torch.ops.aten.slice.Tensor,
            torch.ops.aten.view.default,
            torch.ops.aten.as_strided.default,
            torch.ops.aten.clone.default,
            torch.ops.aten._to_copy.default,
        )
        if func not in kept:
            return out
        return torch.utils._pytree.tree_map(lambda t: cls(t), out)

    # how fully_shard gathers it

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self._tensor,), None

    def fsdp_post_all_gather(
        self, outputs: Any, metadata: Any, dtype: Any, *, out: Tensor | None = None
    ) -> Any:
        if out is not None:
            return None
        return Casting(outputs[0]), outputs


def counted_share_memory(calls: list[int]) -> Callable[[], None]:
    """Counts the exact comparisons of memory; returns what ends that."""
    original = tree.share_memory

    def counting(a: Tensor, b: Tensor) -> bool:
        calls[0] += 1
        return original(a, b)

    tree.share_memory = counting

    def end() -> None:
        tree.share_memory = original

    return end
