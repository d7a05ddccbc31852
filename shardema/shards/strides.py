"""Memory layout of tensors: order of dims, overlaps, views of the same storage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shardema.shards.boxes import Dims, split_box, whole


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> Dims:
    """Dims from slowest to fastest in memory; empty when that is row-major.

    Raises:
        ValueError: the strides overlap or leave gaps.
    """
    dims = sorted(range(len(shape)), key=lambda d: (-stride[d], d))
    expected = 1
    for dim in reversed(dims):
        if shape[dim] == 1:
            continue
        if stride[dim] != expected:
            raise ValueError(f"strides {tuple(stride)} of shape {tuple(shape)} are not dense")
        expected *= shape[dim]
    kept = [dim for dim in dims if shape[dim] != 1]
    if kept == sorted(kept):
        return ()
    ones = [dim for dim in range(len(shape)) if shape[dim] == 1]
    return tuple(ones + kept)


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements of ``tensor`` share memory, as in an expanded tensor. Exact."""
    dims = sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[1])
    reach = 1
    for size, stride in dims:
        if size > 1 and stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # The strides interleave, but elements may still be distinct. If two elements share memory and
    # first differ in dim d, so do their translates that begin at index 0 in the dims up to d.
    for d in range(tensor.dim()):
        rest = tensor[(0,) * d]
        if rest.shape[0] > 1 and share_memory(rest[:1], rest[1:]):
            return True
    return False


class _Layout:
    """A tensor's memory layout for numpy, which only uses the addresses."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        start = tensor.storage_offset() * size + _ALIGNED
        self.__array_interface__ = {
            "version": 3,
            "data": (start, False),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


_ALIGNED = 1 << 12  # any address that is not null


_MOST_WORK = 1 << 20  # candidates that numpy tries before it gives up


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage share an element; True if that is too hard to find out."""
    try:
        first, second = np.asarray(_Layout(a)), np.asarray(_Layout(b))
        return bool(np.shares_memory(first, second, _MOST_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def dense_like(tensor: Tensor) -> Dims:
    """The strides of a dense tensor that keeps the memory order of ``tensor``."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def aligned_parts(a: Tensor, b: Tensor, max_numel: int) -> list[tuple[Tensor, Tensor]]:
    """Two tensors of one shape as pairs of views of at most ``max_numel`` elements each.

    Flat views if both are dense with equal strides, else blocks of the shape.
    """
    n = a.numel()
    if n == 0:
        return []
    if a.stride() == b.stride() and a.stride() == dense_like(a):
        flat = [t.as_strided((n,), (1,)) for t in (a, b)]
        return list(zip(*(torch.split(t, max_numel) for t in flat), strict=True))
    boxes = [part for box in whole(a.shape) for part in split_box(box, max_numel)]
    return [(box.view(a), box.view(b)) for box in boxes]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order; a view where it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
