"""Fingerprints of tensors, independent of the layout.

::

    element   its bits as a signed integer, times an odd factor for its name and its flat index
    box       the sum of its elements modulo 2**64
    tensor    the sum of disjoint boxes that cover it, on whichever ranks they are

A change of one bit always changes the fingerprint, since the factors are odd; any other change is
missed with a probability of about 2**-64. It detects accidents and does not protect against an
adversary. The values are read once, on their device; 8 bytes a tensor are copied to the host. On a
CPU compiled code reads them, or torch where there is no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from shardema.errors import logger
from shardema.kernels import build
from shardema.shards.boxes import Box, Dims, contiguous_runs, split_box

log = logger(__name__)
_SOURCE = Path(__file__).with_name("fingerprint_cpu.cpp")
_BLOCK = 4096  # elements that have one table of factors; each block multiplies it by its own
_ROWS = {"cpu": 16}  # blocks at a time: what fits into a cache
_MOST_ROWS = 1024
_MOST = 1 << 22  # elements of a box that is not contiguous in the full tensor, at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(fqn: str, shape: Dims, boxes: Iterable[tuple[Box, Tensor]]) -> Tensor:
    """The sum over some boxes of a tensor.

    Args:
        fqn: name of the tensor; equal values under different names have different fingerprints.
        shape: the full shape.
        boxes: disjoint boxes and their values ``[*box.sizes]``, of one device and any dtype. The
            same values in another dtype have another fingerprint.

    Returns:
        int64 scalar on the values' device; 0 for no element.
    """
    seed = xxhash.xxh3_64_intdigest(fqn.encode())
    sums = [one for box, values in boxes for one in _of_box(shape, box, values, seed)]
    if len(sums) == 1:
        return sums[0]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def to_host(sums: Sequence[Tensor]) -> list[int]:
    """Fingerprints as integers from 0 to 2**64 - 1; synchronizes once with each device."""
    found = [0] * len(sums)
    for device in {one.device for one in sums}:
        places = [i for i, one in enumerate(sums) if one.device == device]
        values = torch.stack([sums[i] for i in places]).tolist()
        for i, value in zip(places, values, strict=True):
            found[i] = value % (1 << 64)
    return found


def total(sums: Sequence[Tensor]) -> int:
    """The sum of fingerprints modulo 2**64."""
    return sum(to_host(sums)) % (1 << 64)


def _of_box(shape: Dims, box: Box, values: Tensor, seed: int) -> Iterator[Tensor]:
    if box.numel == 0:
        return
    code = _library() if values.device.type == "cpu" else None
    run, starts = contiguous_runs(shape, box)
    if code is not None:
        bits = _bits(values).contiguous()
        yield torch.tensor(_compiled(code, bits, run, starts, seed), device="cpu")
        return
    blocks = _odd(seed, -(-math.prod(shape) // _BLOCK))
    if len(starts) == 1 and values.is_contiguous():
        yield from _of_run(_bits(values).view(-1), starts[0], blocks)
    else:
        for part in split_box(box, _MOST):
            bits = _bits(part.relative_to(box.offsets).view(values)).reshape(-1)
            index = _indices(shape, part, bits.device)
            factors = _table(bits.device)[index % _BLOCK] * blocks.to(bits.device)[index // _BLOCK]
            yield (bits * factors).sum()


def _of_run(bits: Tensor, first: int, blocks: Tensor) -> Iterator[Tensor]:
    """Sums over elements that begin at flat index ``first`` of the full tensor."""
    table, blocks = _table(bits.device), blocks.to(bits.device)
    most = _ROWS.get(bits.device.type, _MOST_ROWS) * _BLOCK
    while bits.numel():
        block, offset = divmod(first, _BLOCK)
        if offset or bits.numel() < _BLOCK:
            count = min(_BLOCK - offset, bits.numel())
            factors = table[offset : offset + count]
        else:
            count = min(most, bits.numel() // _BLOCK * _BLOCK)
            factors = table
        rows = (bits[:count].view(-1, factors.numel()) * factors).sum(1)
        yield (rows * blocks[block : block + rows.numel()]).sum()
        bits, first = bits[count:], first + count


def _bits(values: Tensor) -> Tensor:
    """The elements' bits as integers, of the same shape."""
    if values.element_size() in _BITS:
        return values.detach().view(_BITS[values.element_size()])
    real, imaginary = torch.view_as_real(values.detach()).view(torch.int64).unbind(-1)
    return real * 3 + imaginary


def _indices(shape: Dims, box: Box, device: torch.device) -> Tensor:
    """The flat indices in the full tensor of a box's elements, ``[box.numel]``."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, offset, count in zip(shape, box.offsets, box.sizes, strict=True):
        here = torch.arange(offset, offset + count, device=device)
        index = index.unsqueeze(-1) * size + here
    return index.reshape(-1)


# ---- factors ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    """An odd factor for each element of a block, ``[_BLOCK]``."""
    return _odd(0, _BLOCK).to(device)


def _odd(seed: int, count: int) -> Tensor:
    """The first odd numbers of a splitmix64 generator (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(x.view(np.int64))


_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio


# ---- compiled -----------------------------------------------------------------------------------


def _compiled(code: Any, bits: Tensor, run: int, starts: Sequence[int], seed: int) -> int:
    """The sum as a signed integer. ``bits`` [len(starts) * run] is contiguous."""
    places = (ctypes.c_int64 * len(starts))(*starts)
    table = _table(bits.device).data_ptr()
    size, count = bits.element_size(), len(starts)
    value: int = code(bits.data_ptr(), size, run, count, places, table, seed)
    return value


_once = threading.Lock()


def _library() -> Any:
    """The compiled function; None where it cannot be had, which is logged once."""
    with _once:
        return _load()


@functools.cache
def _load() -> Any:
    try:
        code = build.load(_SOURCE, (*build.FLAGS, *build.instructions())).shardema_fingerprint
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.info("fingerprints cannot be compiled for the CPU, torch computes them: %s", error)
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    code.restype = number
    code.argtypes = [address, number, number, number, address, address, ctypes.c_uint64]
    return code
