"""The host's own limit: hand-written loops in place over the bytes that an update moves.

One flat tensor of parameters, in their dtype, and one flat fp32 average: ordinary stores, the same
with prefetching, and streaming stores; on one thread and on all. The fastest of them is the limit.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import Missing
from models import locals_of
from rivals import DECAY, Average, Build
from shardema.kernels import build, fused_cpu

_LINE = 64  # the loops work on so many elements at a time
HOW = ("ordinary", "prefetched", "streamed")


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


def builds() -> dict[str, Build]:
    """Every loop, by name; they share one average of a model.

    Raises:
        Missing: there is no C++ compiler.
    """
    _code()
    shared = functools.cache(_flat)
    counts = sorted({1, torch.get_num_threads()})
    return {
        f"{how}_{count}_thread{'s' * (count > 1)}": functools.partial(_loop, shared, how, count)
        for how in HOW
        for count in counts
    }


def _flat(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The parameters, flat, and their average."""
    whole = torch.cat([param.reshape(-1) for param in locals_of(model)])
    flat = whole[: whole.numel() // _LINE * _LINE]
    return flat, flat.float().clone()


def _loop(
    shared: Callable[[nn.Module], tuple[Tensor, Tensor]], how: str, count: int, model: nn.Module
) -> Average:
    triad, threads = _code()
    flat, average = shared(model)
    narrow = int(flat.dtype == torch.bfloat16)
    rest = (average.numel(), 1 - DECAY, HOW.index(how), count, ctypes.byref(threads))
    return Average(
        lambda: triad(flat.data_ptr(), narrow, average.data_ptr(), *rest), lambda: [average]
    )
