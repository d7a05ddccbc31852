"""One call of compiled code for all pairs on a CPU, of mixed dtypes too.

::

    pairs    (shadow, param, slot) ...        dense tensors of equal strides
    rows     param, numel | param, numel      one for each param; read from memory once
    twins    shadow slot  shadow slot | ..    the averages of each row
    lerp_    weights -> C doubles, then one call that processes the rows with torch's threads

The code is ``fused_cpu.cpp``, which `build` compiles once. Before it is used it is compared with
``torch.lerp`` bitwise; if it differs, or there is no compiler, foreach runs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardema.kernels import build, reference
from shardema.kernels.bound import Bound
from shardema.shards.strides import dense_like

log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("fused_cpu.cpp")

# their codes in fused_cpu.cpp
PARAM_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SHADOW_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


class Threads(ctypes.Structure):
    """Functions of the OpenMP runtime that torch uses; null if it has none."""

    _fields_ = [
        ("fork", ctypes.c_void_p),
        ("number", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Library:
    """``lerp_(rows, count, twins, weights, most threads, threads)`` of the compiled code."""

    lerp_: Any
    threads: Threads


@dataclass(frozen=True)
class Table:
    """The arguments of the compiled code, and references that keep their addresses valid."""

    code: Library
    count: int  # of rows
    rows: ctypes.Array[ctypes.c_int64]
    twins: ctypes.Array[ctypes.c_int64]
    weights: ctypes.Array[ctypes.c_double]
    shadows: Sequence[Tensor]
    held: Sequence[Tensor]  # keeps the parameters' memory, even if they get another

    def __call__(self, weights: Sequence[float]) -> None:
        self.weights[:] = list(weights[: len(self.weights)])
        threads = torch.get_num_threads()
        self.code.lerp_(self.rows, self.count, self.twins, self.weights, threads, self.code.threads)
        torch.autograd.graph.increment_version(self.shadows)


def supports(shadow: Tensor, param: Tensor) -> bool:
    """Whether the compiled code supports a pair: plain dense CPU tensors of equal strides."""
    if shadow.dtype not in SHADOW_DTYPES or param.dtype not in PARAM_DTYPES:
        return False
    for tensor in (shadow, param):
        own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if own or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
    if shadow.shape != param.shape:
        return False
    if shadow.is_contiguous() and param.is_contiguous():
        return True
    return shadow.stride() == param.stride() == dense_like(param)


def bind(shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]) -> Bound:
    """Returns ``lerp_(weights)`` over pairs that it `supports`; their storage must not change.

    Raises:
        RuntimeError: there is no compiled code; see `library`.
    """
    code = library()
    if code is None:
        raise RuntimeError("fused: the CPU kernel could not be compiled; use kernel='foreach'")
    return Bound(table(code, shadows, params, slots), ("fused",))


def table(
    code: Library, shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]
) -> Table:
    """The table of the pairs. A parameter that is listed several times becomes one row."""
    rows: dict[tuple[int, int, torch.dtype], list[tuple[Tensor, int]]] = {}
    for shadow, param, slot in zip(shadows, params, slots, strict=True):
        key = (param.data_ptr(), param.numel(), param.dtype)
        rows.setdefault(key, []).append((shadow, slot))
    row_fields, twin_fields, start, first = [], [], 0, 0
    for (address, numel, dtype), twins in rows.items():
        row_fields += [start, address, PARAM_DTYPES[dtype], first]
        start += numel
        first += len(twins)
        for shadow, slot in twins:
            twin_fields += [shadow.data_ptr(), SHADOW_DTYPES[shadow.dtype], slot]
    row_fields += [start, 0, 0, first]  # the end of the table
    return Table(
        code,
        len(rows),
        (ctypes.c_int64 * len(row_fields))(*row_fields),
        (ctypes.c_int64 * len(twin_fields))(*twin_fields),
        (ctypes.c_double * (1 + max(slots)))(),
        list(shadows),
        [param.detach() for param in params],
    )


_once = threading.Lock()


def library() -> Library | None:
    """The compiled code; None if it is not available, with one warning that gives the reason."""
    with _once:
        return _library()


@functools.cache
def _library() -> Library | None:
    try:
        code = open_library(build.load(_SOURCE, (*build.FLAGS, *build.instructions())))
    except (ImportError, OSError, RuntimeError) as error:
        log.warning(
            "kernel 'fused' cannot be compiled for the CPU, 'foreach' runs instead: %s", error
        )
        return None
    if not agrees(code):
        log.warning(
            "kernel 'fused' does not round as torch.lerp of torch %s (%s) does on this CPU, "
            "'foreach' runs instead",
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
        )
        return None
    return code


def open_library(made: ctypes.CDLL) -> Library:
    """The function of a compiled ``fused_cpu.cpp``, with torch's OpenMP runtime."""
    lerp_ = made.shardema_lerp
    lerp_.restype = None
    address, number = ctypes.c_void_p, ctypes.c_int64
    threads = ctypes.POINTER(Threads)
    lerp_.argtypes = [address, number, address, address, number, threads]
    return Library(lerp_, _threads())


def _threads() -> Threads:
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:  # a handle of torch's own library also finds symbols of the libraries that it loaded
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return Threads(*(ctypes.cast(torch_cpu[name], ctypes.c_void_p).value for name in names))
    except (OSError, AttributeError):
        return Threads()


def agrees(code: Library) -> bool:
    """Whether it is bitwise equal to the reference kernel, for every pair of dtypes."""
    every = itertools.product(PARAM_DTYPES, SHADOW_DTYPES)
    return all(_agrees(code, param, shadow) for param, shadow in every)


def _agrees(code: Library, param_dtype: torch.dtype, shadow_dtype: torch.dtype) -> bool:
    shadow, param = _samples(shadow_dtype, 0), _samples(param_dtype, 1)
    for weight in (1e-4, 0.3, 0.49999997, 0.5, 0.9, 1 - 2**-24, 1.0):
        got, expected = shadow.clone(), shadow.clone()
        table(code, [got], [param], [0])([weight])
        reference.bind([expected], [param], [0])([weight])
        if not same_bits(got, expected):
            return False
    return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal, except for the payload of NaNs."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


def _samples(dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of many magnitudes, subnormals, inf, NaN and zeros of both signs: [2085]."""
    chance = random.Random(seed)
    numbers = [chance.gauss(0, 1) for _ in range(2048)]
    numbers[1024:] = [x * 2.0 ** chance.randrange(-140, 16) for x in numbers[1024:]]
    inf = float("inf")
    numbers += chance.choices([inf, -inf, float("nan"), 0.0, -0.0, 1.0], k=37)
    return torch.tensor(numbers, device="cpu", dtype=torch.float64).to(dtype)
