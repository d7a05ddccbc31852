"""All shards and all averages in one launch: compiled code on a CPU, Triton on CUDA, else foreach.

::

    pairs that fused_cpu supports   C++, compiled once
    pairs that fused_gpu supports   Triton, where it is installed and can compile
    any other                      foreach
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from shardema.errors import logger
from shardema.kernels import foreach, fused_cpu
from shardema.kernels.bound import Bound
from shardema.kernels.rounding import Rounding

log = logger(__name__)

# Elements from which kernel="auto" uses a compiled kernel: below it foreach needs microseconds, and
# nothing is compiled or looked up.
AUTO_NUMEL = 1 << 16


def bind(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
) -> Bound:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device."""
    how = roundings or [None] * len(shadows)
    chosen: dict[ModuleType, list[int]] = {}
    for i, (shadow, param, stored) in enumerate(zip(shadows, params, how, strict=True)):
        if shadow.numel():
            chosen.setdefault(_kernel(shadow, param, stored), []).append(i)
    bound: list[Bound] = []
    for kernel, at in chosen.items():
        these, those = ([tensors[i] for i in at] for tensors in (shadows, params))
        bound.append(_bound(kernel, these, those, [slots[i] for i in at], [how[i] for i in at]))
    return bound[0] if len(bound) == 1 else _joined(bound)


def bind_auto(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
) -> Bound:
    """Like `bind`, but foreach for few elements."""
    numel = sum(shadow.numel() for shadow in shadows)
    return (foreach.bind if numel < AUTO_NUMEL else bind)(shadows, params, slots, roundings)


def _kernel(shadow: Tensor, param: Tensor, stored: Rounding | None) -> ModuleType:
    """The module of the kernel for this pair."""
    if fused_cpu.supports(shadow, param, stored):
        return fused_cpu if fused_cpu.library() is not None else foreach
    if _on_gpu(shadow):
        fused_gpu = _fused_gpu()
        if fused_gpu is not None and fused_gpu.supports(shadow, param, stored):
            return fused_gpu
    return foreach


def _bound(
    kernel: ModuleType,
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None],
) -> Bound:
    """Binds this kernel; foreach instead if Triton cannot compile it."""
    bound: Bound
    if kernel is not _fused_gpu():
        bound = kernel.bind(shadows, params, slots, roundings)
        return bound
    try:
        bound = kernel.bind(shadows, params, slots, roundings)
    except torch.OutOfMemoryError:
        raise
    # no C compiler, a broken one, no headers, no writable folder, an unknown GPU: Triton raises
    # exceptions of many classes; nothing was written yet
    except Exception as error:
        _do_without_triton(error)
        bound = foreach.bind(shadows, params, slots, roundings)
    return bound


def _joined(bound: Sequence[Bound]) -> Bound:
    def lerp_(weights: Sequence[float]) -> None:
        for one in bound:
            one(weights)

    return Bound(lerp_, tuple(dict.fromkeys(name for one in bound for name in one.kernel_names)))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


_failed = threading.Event()  # Triton failed in this process


def _fused_gpu() -> ModuleType | None:
    """The module that needs Triton; None if Triton is not installed, or has failed."""
    if _failed.is_set() or not _has_triton():
        return None
    try:
        return importlib.import_module("shardema.kernels.fused_gpu")
    except Exception as error:  # built for another system
        _do_without_triton(error)
        return None


def _do_without_triton(error: Exception) -> None:
    _failed.set()
    log.warning(
        "kernel 'fused' cannot be compiled for the GPU, 'foreach' runs instead: %s: %s",
        type(error).__name__,
        error,
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
