"""All shards and all averages in one launch: compiled code on a CPU, Triton on CUDA, else foreach.

::

    pairs that fused_cpu takes     C++, compiled once
    pairs that fused_gpu takes     Triton, where it is installed
    any other                      foreach
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from shardema.kernels import foreach, fused_cpu
from shardema.kernels.bound import Bound

# Elements that are worth a compiled kernel where none was asked for by name: below it a step
# takes foreach some microseconds, and nothing need be compiled or looked up.
AUTO_NUMEL = 1 << 16


def bind(shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]) -> Bound:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device."""
    chosen: dict[ModuleType, list[int]] = {}
    for i, (shadow, param) in enumerate(zip(shadows, params, strict=True)):
        if shadow.numel():
            chosen.setdefault(_kernel(shadow, param), []).append(i)
    bound: list[Bound] = []
    for kernel, at in chosen.items():
        these = [[tensors[i] for i in at] for tensors in (shadows, params)]
        bound.append(kernel.bind(*these, [slots[i] for i in at]))
    return bound[0] if len(bound) == 1 else _joined(bound)


def bind_auto(shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]) -> Bound:
    """Like `bind`; foreach where there is little to do."""
    numel = sum(shadow.numel() for shadow in shadows)
    return (foreach.bind if numel < AUTO_NUMEL else bind)(shadows, params, slots)


def _kernel(shadow: Tensor, param: Tensor) -> ModuleType:
    """The module that takes this pair."""
    if fused_cpu.takes(shadow, param):
        return fused_cpu if fused_cpu.library() is not None else foreach
    if shadow.is_cuda and _has_triton():
        fused_gpu = importlib.import_module("shardema.kernels.fused_gpu")
        if fused_gpu.takes(shadow, param):
            return fused_gpu
    return foreach


def _joined(bound: Sequence[Bound]) -> Bound:
    def lerp_(weights: Sequence[float]) -> None:
        for one in bound:
            one(weights)

    return Bound(lerp_, tuple(dict.fromkeys(name for one in bound for name in one.runs)))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
