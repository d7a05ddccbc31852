"""One call of compiled code for all pairs on a CPU, of mixed dtypes too.

::

    pairs    (shadow, param, slot) ...        dense tensors of equal strides
    rows     param, numel | param, numel      one for each param; read from memory once
    twins    shadow slot  shadow slot | ..    the averages of each row, and their roundings
    lerp_    weights -> C doubles, then one call that processes the rows with torch's threads

The code is ``fused_cpu.cpp``, which `build` compiles once. Before it is used it is compared with
``torch.lerp`` bitwise; if it differs, or there is no compiler, foreach runs. How it goes through
memory is measured once on a host, see `variants`, when there is a table beyond the caches.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardema.kernels import build, reference, variants
from shardema.kernels.bound import Bound
from shardema.kernels.rounding import Compensated, Rounding, Stochastic, runs
from shardema.kernels.variants import DEFAULT, VARIANTS, Variant
from shardema.shards.strides import dense_like

log = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("fused_cpu.cpp")

# their codes in fused_cpu.cpp
PARAM_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SHADOW_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

# Bytes of averages from which the variant matters; what is measured takes 120 MiB for 0.3 s.
LARGE = 64 << 20
_MEASURED_NUMEL, _REPEATS = 6 << 20, 5


class Threads(ctypes.Structure):
    """Functions of the OpenMP runtime that torch uses; null if it has none."""

    _fields_ = [
        ("fork", ctypes.c_void_p),
        ("number", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
    ]


@dataclass(frozen=True, eq=False)
class Library:
    """``lerp_(rows, count, twins, weights, most threads, threads, variant)`` of the compiled code.

    Attributes:
        path: its file.
    """

    lerp_: Any
    threads: Threads
    path: Path


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
    variant: ctypes.Array[ctypes.c_int64]

    def __call__(self, weights: Sequence[float]) -> None:
        self.weights[:] = list(weights[: len(self.weights)])
        threads = torch.get_num_threads()
        table = (self.rows, self.count, self.twins, self.weights)
        self.code.lerp_(*table, threads, self.code.threads, self.variant)
        torch.autograd.graph.increment_version(self.shadows)


def supports(shadow: Tensor, param: Tensor, stored: Rounding | None = None) -> bool:
    """Whether the compiled code supports a pair: plain dense CPU tensors of equal strides.

    Of shadows that are rounded at random also boxes of such tensors.
    """
    if shadow.dtype not in SHADOW_DTYPES or param.dtype not in PARAM_DTYPES:
        return False
    for tensor in (shadow, param):
        own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if own or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return False
    if shadow.shape != param.shape:
        return False
    if isinstance(stored, Stochastic):
        return runs(shadow, param, stored) is not None
    if shadow.is_contiguous() and param.is_contiguous():
        return True
    return shadow.stride() == param.stride() == dense_like(param)


def bind(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
) -> Bound:
    """Returns ``lerp_(weights)`` over pairs that it `supports`; their storage must not change.

    Raises:
        RuntimeError: there is no compiled code; see `library`.
    """
    code = library()
    if code is None:
        raise RuntimeError("fused: the CPU kernel could not be compiled; use kernel='foreach'")
    large = sum(shadow.nbytes for shadow in shadows) >= LARGE
    variant = _fastest(code, torch.get_num_threads()) if large else DEFAULT
    return Bound(table(code, shadows, params, slots, roundings, variant), ("fused",))


@functools.cache
def _fastest(code: Library, threads: int) -> Variant:
    return variants.fastest(code.path, threads, functools.partial(times, code))


def times(code: Library) -> dict[Variant, float]:
    """Seconds of each variant: of one average of a parameter, and two of another."""
    tensors = [torch.ones(_MEASURED_NUMEL, dtype=torch.float32, device="cpu") for _ in range(5)]
    shadows, params = tensors[:3], [tensors[3], tensors[4], tensors[4]]
    one = table(code, shadows, params, [0, 0, 0])
    found = dict.fromkeys(VARIANTS, float("inf"))
    for _ in range(_REPEATS):  # in turn: a host that slows down slows all of them
        for variant in VARIANTS:
            of_variant = replace(one, variant=_fields(variant))
            start = time.perf_counter()
            of_variant([0.5])
            found[variant] = min(found[variant], time.perf_counter() - start)
    return found


def table(
    code: Library,
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
    variant: Variant = DEFAULT,
) -> Table:
    """The table of the pairs. A parameter that is listed several times becomes one row."""
    how = roundings or [None] * len(shadows)
    rows: dict[tuple[int, int, torch.dtype], list[list[int]]] = {}
    for shadow, param, slot, stored in zip(shadows, params, slots, how, strict=True):
        for address, numel, fields in _twins(shadow, param, slot, stored):
            rows.setdefault((address, numel, param.dtype), []).append(fields)
    row_fields, twin_fields, start, first = [], [], 0, 0
    for (address, numel, dtype), twins in rows.items():
        row_fields += [start, address, PARAM_DTYPES[dtype], first]
        start += numel
        first += len(twins)
        for fields in twins:
            twin_fields += fields
    row_fields += [start, 0, 0, first]  # the end of the table
    numbers = [*slots, *(one.number for one in how if isinstance(one, Stochastic))]
    return Table(
        code,
        len(rows),
        (ctypes.c_int64 * len(row_fields))(*row_fields),
        (ctypes.c_int64 * len(twin_fields))(*twin_fields),
        (ctypes.c_double * (1 + max(numbers)))(),
        [*shadows, *(one.companion for one in how if isinstance(one, Compensated))],
        [param.detach() for param in params],
        _fields(variant),
    )


def _fields(variant: Variant) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 3)(variant.ahead, variant.block, variant.width)


def _twins(
    shadow: Tensor, param: Tensor, slot: int, stored: Rounding | None
) -> Iterator[tuple[int, int, list[int]]]:
    """Address and size of each row of a pair, and the fields of its twin."""
    fields = [shadow.data_ptr(), SHADOW_DTYPES[shadow.dtype], slot]
    if not isinstance(stored, Stochastic):
        rest = [-1, 0] if stored is None else [slot, stored.companion.data_ptr()]
        yield param.data_ptr(), param.numel(), [*fields, *rest, 0, 0, 1, 0, 0]
        return
    for run in runs(shadow, param, stored) or ():
        address = param.data_ptr() + run.param * param.itemsize
        fields[0] = shadow.data_ptr() + run.shadow * shadow.itemsize
        key = stored.key - (1 << 64) if stored.key >> 63 else stored.key
        places = [run.first, run.run, run.step, run.jump]
        yield address, run.numel, [*fields, stored.number, 0, key, *places]


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
    lerp_.argtypes = [address, number, address, address, number, threads, address]
    return Library(lerp_, _threads(), Path(made._name))


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
    return all(
        _agrees(code, param, shadow) and _agrees(code, param, shadow, rounded=True)
        for param, shadow in every
    )


def _agrees(
    code: Library, param_dtype: torch.dtype, shadow_dtype: torch.dtype, rounded: bool = False
) -> bool:
    shadow, param = _samples(shadow_dtype, 0), _samples(param_dtype, 1)
    numel = shadow.numel()
    for weight in (1e-4, 0.3, 0.49999997, 0.5, 0.9, 1 - 2**-24, 1.0):
        results = []
        for bind in (functools.partial(table, code), reference.bind):
            found, lost = shadow.clone(), torch.arange(numel, dtype=torch.int16, device="cpu")
            how: Rounding | None = None
            if rounded and shadow_dtype == torch.bfloat16:
                how = Stochastic(7, 1, 11, (1,))
            elif rounded and shadow_dtype == torch.float32:
                how = Compensated(lost)
            bind([found], [param], [0], [how])([weight, 3.0])
            results.append((found, lost))
        (got, got_lost), (expected, expected_lost) = results
        if not (same_bits(got, expected) and torch.equal(got_lost, expected_lost)):
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
