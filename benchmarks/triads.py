"""The host's own limit: hand-written loops over the memory of an average and its parameters.

In place, as an update: ordinary stores by the widest vectors and by those of 256 bits, the former
with prefetching, and streaming stores; on one thread and on all. The fastest of them is the limit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import Missing
from rivals import DECAY
from shardema.kernels import build, fused_cpu

_LINE = 64  # the loops work on so many elements at a time
HOW = ("ordinary", "256_bits", "prefetched", "streamed")


@functools.cache
def _code() -> tuple[Any, fused_cpu.Threads]:
    kernel = fused_cpu.library()
    if kernel is None:
        raise Missing("no C++ compiler")
    source = Path(__file__).with_name("triads.cpp")
    flags = [flag for flag in build.FLAGS if flag != "-ffp-contract=off"]
    triad = build.load(source, (*flags, *build.instructions())).triad
    address, number = ctypes.c_void_p, ctypes.c_int64
    triad.argtypes = [address, number, address, number, ctypes.c_float, number, number, address]
    triad.restype = None
    return triad, kernel.threads


def loops(params: Sequence[Tensor], averages: Sequence[Tensor]) -> dict[str, Callable[[], None]]:
    """Every loop over these, by name.

    Args:
        params: contiguous, float32 or bfloat16.
        averages: contiguous, float32, aligned to 64 bytes, one for each.

    Raises:
        Missing: there is no C++ compiler.
    """
    triad, threads = _code()
    pairs = [
        (p.data_ptr(), int(p.dtype == torch.bfloat16), s.data_ptr(), s.numel() // _LINE * _LINE)
        for p, s in zip(params, averages, strict=True)
    ]

    def loop(how: int, count: int) -> None:
        for pair in pairs:
            triad(*pair, 1 - DECAY, how, count, ctypes.byref(threads))

    return {
        f"{name}_{count}_thread{'s' * (count > 1)}": functools.partial(loop, how, count)
        for how, name in enumerate(HOW)
        for count in sorted({1, torch.get_num_threads()})
    }
