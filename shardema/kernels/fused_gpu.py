"""One Triton launch over any number of tensors, through a table of addresses that is built once.

::

    pairs      (shadow, param, slot) ...        dense, with equal strides
    jobs       param, its shadows, their slots  a parameter is read once for all its averages
    table      a row per block of a parameter   size, wide?, param, shadows[K], slots[K]   int64
    launch     a program per row                one launch per (param dtype, shadow dtypes)
    rounded    a table of its own per rounding  one launch per (param dtype, rounding)
    weights    a float64 per slot, on the GPU   read by the programs, so a graph can be replayed

Only this file imports triton.
"""

# Triton code cannot be typed, and its decorator has no types if triton is not installed.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardema.kernels.bound import Bound
from shardema.kernels.rounding import Compensated, Rounding, Stochastic, runs
from shardema.shards.strides import dense_like

BLOCK = 4096  # elements of a program
PART = 1024  # elements that it masks at once
MAX_AVERAGES = 4  # shadows that a program holds in its registers
WARPS = 8
ALIGN = 16  # bytes that a thread loads at most at once, if a block's addresses are aligned to it

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_Dtypes = tuple[torch.dtype, ...]


@triton.jit
def lerp_kernel(
    table,
    weights,
    PARAM: tl.constexpr,
    SHADOWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    EACH: tl.constexpr,
):
    """A program per row of ``table``; the slots of a row are indices into ``weights``.

    A full block whose addresses are aligned is done at once, any other part by part under a mask:
    masks of a whole block would take the registers of all programs.
    """
    row = table + tl.program_id(0).to(tl.int64) * (3 + 2 * len(SHADOWS))
    size = tl.load(row).to(tl.int32)
    if tl.load(row + 1) != 0:
        _block(row + 2, weights, 0, size, PARAM, SHADOWS, BLOCK, EACH)
    else:
        for start in range(0, size, PART):
            _block(row + 2, weights, start, size, PARAM, SHADOWS, PART, 0)


@triton.jit
def _block(
    row,
    weights,
    start,
    size,
    PARAM: tl.constexpr,
    SHADOWS: tl.constexpr,
    NUMEL: tl.constexpr,
    EACH: tl.constexpr,
):
    """All averages of ``NUMEL`` elements of a block.

    EACH: of a full block, the elements that a thread reads at once from each tensor, aligned to
    that many. It is the same for all tensors, so that no values move between threads. 0: elements
    from ``size`` on are left out.
    """
    at = start + tl.arange(0, NUMEL)
    source = tl.load(row).to(tl.pointer_type(PARAM))
    if EACH > 0:
        param = tl.load(tl.multiple_of(source, EACH * PARAM.primitive_bitwidth // 8) + at)
    else:
        param = tl.load(source + at, mask=at < size)
    for k in tl.static_range(len(SHADOWS)):
        weight = tl.load(weights + tl.load(row + 1 + len(SHADOWS) + k))
        weight = weight.to(tl.float64 if SHADOWS[k].is_fp64() else tl.float32)
        if weight != 0:
            target = tl.load(row + 1 + k).to(tl.pointer_type(SHADOWS[k]))
            if EACH > 0:
                target = tl.multiple_of(target, EACH * SHADOWS[k].primitive_bitwidth // 8)
                shadow = tl.load(target + at)
                tl.store(target + at, _lerp(shadow, param, weight, SHADOWS[k]))
            else:
                shadow = tl.load(target + at, mask=at < size)
                tl.store(target + at, _lerp(shadow, param, weight, SHADOWS[k]), mask=at < size)


@triton.jit
def _lerp(shadow, param, weight, SHADOW: tl.constexpr):
    """torch.lerp (ATen/native/Lerp.h), with its multiplication and addition fused.

    ``weight`` has the dtype of the arithmetic; 1 is a copy. The parameter is converted to the
    shadow's dtype first.
    """
    end = param.to(weight.dtype).to(SHADOW)
    near = shadow.to(weight.dtype)
    far = end.to(weight.dtype)
    small = tl.abs(weight) < 0.5
    share = tl.where(small, weight, weight - 1)
    moved = tl.fma(share, far - near, tl.where(small, near, far))
    return tl.where(weight == 1, end, moved.to(SHADOW))


@triton.jit
def _mixed(x):
    """The last part of splitmix64, of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _finite(bits):
    """Whether the bits of a float64 are neither inf nor NaN."""
    return ((bits >> 52) & 0x7FF) != 0x7FF


@triton.jit
def _has_companion(bits):
    """Whether the bits of a float64 are neither those of inf, NaN nor 0."""
    return _finite(bits) & ((bits & 0x7FFFFFFFFFFFFFFF) != 0)


@triton.jit
def stochastic_kernel(table, weights, PARAM: tl.constexpr, PART: tl.constexpr):
    """A program per row: bfloat16 shadows, rounded at random as `rounding` says."""
    row = table + tl.program_id(0).to(tl.int64) * 11
    size = tl.load(row).to(tl.int32)
    weight = tl.load(weights + tl.load(row + 3))
    if weight != 0:
        number = tl.load(weights + tl.load(row + 4)).to(tl.int64).to(tl.uint64)
        key = _mixed(tl.load(row + 5).to(tl.uint64) + number * 0x9E3779B97F4A7C15)
        for start in range(0, size, PART):
            _stochastic(row, weight, key, start + tl.arange(0, PART), size, PARAM)


@triton.jit
def _stochastic(row, weight, key, at, size, PARAM: tl.constexpr):
    inside = at < size
    param = tl.load(tl.load(row + 1).to(tl.pointer_type(PARAM)) + at, mask=inside)
    target = tl.load(row + 2).to(tl.pointer_type(tl.bfloat16)) + at
    shadow = tl.load(target, mask=inside)
    value = _lerp(shadow.to(tl.float64), param, weight, tl.float64)
    element = tl.load(row + 7) + at
    run = tl.load(row + 8)
    place = (element // run) * tl.load(row + 10) + (element % run) * tl.load(row + 9)
    place = (tl.load(row + 6) + place).to(tl.uint64)
    x = place * 0x9E3779B97F4A7C15 + key
    noise = ((x ^ (x >> 32)) * 0xBF58476D1CE4E5B9) >> 19
    bits = value.to(tl.int64, bitcast=True)
    cut = (bits + noise.to(tl.int64)) & -35184372088832  # 45 zeros
    value = tl.where(value == value, cut.to(tl.float64, bitcast=True), value)
    upper = value.to(tl.float32).to(tl.int32, bitcast=True) >> 16
    tl.store(target, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)


@triton.jit
def compensated_kernel(table, weights, PARAM: tl.constexpr, PART: tl.constexpr):
    """A program per row: float32 shadows and their companions, as `rounding` says."""
    row = table + tl.program_id(0).to(tl.int64) * 5
    size = tl.load(row).to(tl.int32)
    weight = tl.load(weights + tl.load(row + 3))
    if weight != 0:
        for start in range(0, size, PART):
            _compensated(row, weight, start + tl.arange(0, PART), size, PARAM)


@triton.jit
def _compensated(row, weight, at, size, PARAM: tl.constexpr):
    inside = at < size
    param = tl.load(tl.load(row + 1).to(tl.pointer_type(PARAM)) + at, mask=inside)
    target = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + at
    companion = tl.load(row + 4).to(tl.pointer_type(tl.int16)) + at
    shadow = tl.load(target, mask=inside).to(tl.float64).to(tl.int64, bitcast=True)
    lost = tl.load(companion, mask=inside).to(tl.int64) * 8192
    lost = tl.where(_has_companion(shadow), lost, 0)
    start = (shadow + lost).to(tl.float64, bitcast=True)
    value = _lerp(start, param, weight, tl.float64)
    nearest = value.to(tl.float32)
    stored = nearest.to(tl.float64).to(tl.int64, bitcast=True)
    units = (value.to(tl.int64, bitcast=True) - stored + 4096) >> 13
    units = tl.minimum(tl.maximum(units, -32768), 32767)
    tl.store(target, nearest, mask=inside)
    units = tl.where(_has_companion(stored), units, 0)
    tl.store(companion, units.to(tl.int16), mask=inside)


@dataclass(frozen=True)
class Replayable(Bound):
    """A bound kernel, ``lerp_(weights)``, that a CUDA graph can capture.

    Args:
        launch: updates the shadows with the last weights; the part that is captured.
        refresh: sets the weights of later launches and replays on the current stream, one for
            each slot. Neither waits for the GPU nor allocates.

    A captured graph reads tables that this object keeps alive: keep it as long as the graph.
    """

    launch: Callable[[], None]
    refresh: Callable[[Sequence[float]], None]


@dataclass
class _Job:
    """A parameter, at most `MAX_AVERAGES` shadows of it, and their slots."""

    param: Tensor
    shadows: list[Tensor] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Launch:
    """The arguments of one launch."""

    table: Tensor  # [blocks, 3 + 2 * len(shadows)]
    weights: Tensor  # [slots]
    param: torch.dtype
    shadows: _Dtypes

    def run(self, programs: int) -> None:
        with torch.cuda.device_of(self.table):
            lerp_kernel[(programs,)](
                self.table,
                self.weights,
                PARAM=_TYPES[self.param],
                SHADOWS=tuple(_TYPES[dtype] for dtype in self.shadows),
                BLOCK=BLOCK,
                PART=PART,
                EACH=ALIGN // max(self.param.itemsize, *(d.itemsize for d in self.shadows)),
                num_warps=WARPS,
            )


@dataclass(frozen=True)
class _Rounded:
    """A pair with a rounding."""

    shadow: Tensor
    param: Tensor
    slot: int
    stored: Rounding

    @property
    def slots(self) -> list[int]:
        stored = self.stored
        return [self.slot, stored.number] if isinstance(stored, Stochastic) else [self.slot]


@dataclass(frozen=True)
class _RoundedLaunch:
    """The arguments of one launch of pairs with a rounding."""

    table: Tensor  # [blocks, fields]
    weights: Tensor  # [slots]
    param: torch.dtype
    kernel: Any

    def run(self, programs: int) -> None:
        with torch.cuda.device_of(self.table):
            self.kernel[(programs,)](
                self.table, self.weights, PARAM=_TYPES[self.param], PART=PART, num_warps=WARPS
            )


class _Written:
    """Tensors that the current streams have written; other streams wait for that once.

    Args:
        tensors: on any devices; only those of a GPU have streams.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_cuda:
                self._tensors.setdefault(tensor.device, []).append(tensor)
        self._streams = {torch.cuda.current_stream(device) for device in self._tensors}
        self._events = {stream.device: stream.record_event() for stream in self._streams}

    def wait(self) -> None:
        """Lets the current streams wait; the host does not."""
        for device, tensors in self._tensors.items():
            stream = torch.cuda.current_stream(device)
            if stream not in self._streams:
                stream.wait_event(self._events[device])
                for tensor in tensors:  # freed memory is not reused before this stream is done
                    tensor.record_stream(stream)
                self._streams.add(stream)


class _Work:
    """The launches, and their weights on each device."""

    def __init__(self, jobs: Sequence[_Job], rounded: Sequence[_Rounded]) -> None:
        # kept alive: the tables hold their addresses
        self._params = [job.param for job in jobs] + [one.param for one in rounded]
        self._shadows = [shadow for job in jobs for shadow in job.shadows]
        self._shadows += [one.shadow for one in rounded]
        lost = (one.stored for one in rounded)
        self._shadows += [one.companion for one in lost if isinstance(one, Compensated)]
        groups: dict[tuple[torch.device, torch.dtype, _Dtypes], list[_Job]] = {}
        for job in jobs:
            dtypes = tuple(shadow.dtype for shadow in job.shadows)
            groups.setdefault((job.param.device, job.param.dtype, dtypes), []).append(job)
        alike: dict[tuple[torch.device, torch.dtype, bool], list[_Rounded]] = {}
        for pair in rounded:
            at_random = isinstance(pair.stored, Stochastic)
            alike.setdefault((pair.param.device, pair.param.dtype, at_random), []).append(pair)
        used = [slot for job in jobs for slot in job.slots]
        used += [slot for pair in rounded for slot in pair.slots]
        count = 1 + max(used, default=-1)
        self._sent = [0.0] * count
        self._weights = {
            key[0]: torch.zeros(count, dtype=torch.float64, device=key[0])
            for key in (*groups, *alike)
        }
        self._launches: list[_Launch | _RoundedLaunch] = [
            _Launch(_on(device, rows(group)), self._weights[device], dtype, dtypes)
            for (device, dtype, dtypes), group in groups.items()
        ]
        for (device, dtype, at_random), pairs in alike.items():
            table = _on(device, rounded_rows(pairs))
            kernel = stochastic_kernel if at_random else compensated_kernel
            self._launches.append(_RoundedLaunch(table, self._weights[device], dtype, kernel))
        for one in self._launches:  # compiles now, not in a capture; weights of 0 write nothing
            one.run(1)
        tables = [one.table for one in self._launches]
        self._written = _Written([*tables, *self._weights.values()])

    def move(self, weights: Sequence[float]) -> None:
        """Updates the shadows; in a capture, with the weights of each replay."""
        if not self._capturing():
            self.refresh(weights)
            if not any(weights):
                return
        self.launch()

    def refresh(self, weights: Sequence[float]) -> None:
        """Writes the weights that have changed, each as an argument of its own fill kernel.

        A host buffer could be overwritten by the next weights before it is copied.
        """
        if self._capturing():
            raise RuntimeError(
                "refresh: got a stream that captures a CUDA graph, expected one that does not: "
                "the graph would keep these weights; refresh before each replay, outside of it"
            )
        self._written.wait()  # a captured stream must not; `torch.cuda.graph` has waited for all
        for slot, old in enumerate(self._sent):
            if weights[slot] != old:
                for tensor in self._weights.values():
                    tensor[slot].fill_(weights[slot])
                self._sent[slot] = weights[slot]

    def launch(self) -> None:
        for one in self._launches:
            one.run(one.table.shape[0])
        torch.autograd.graph.increment_version(self._shadows)

    def _capturing(self) -> bool:
        for tensor in self._weights.values():
            with torch.cuda.device_of(tensor):
                if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
                    return True
        return False


def supports(shadow: Tensor, param: Tensor, stored: Rounding | None = None) -> bool:
    """Whether the kernel supports a pair: known dtypes, dense, equal strides.

    Of shadows that are rounded at random also boxes of such tensors.
    """
    for tensor in (shadow, param):
        own = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if own or tensor.dtype not in _TYPES or tensor.layout != torch.strided:
            return False
    if shadow.shape != param.shape or shadow.device != param.device:
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
) -> Replayable:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device.

    It stores addresses: the tensors' storage must not change. Must not be called while a CUDA
    graph is captured, since it may compile.

    Raises:
        ValueError: a pair that it does not support, see `supports`.
    """
    jobs: list[_Job] = []
    rounded: list[_Rounded] = []
    last: dict[tuple[torch.device, torch.dtype, int, int], _Job] = {}
    how = roundings or [None] * len(shadows)
    for shadow, param, slot, stored in zip(shadows, params, slots, how, strict=True):
        if not supports(shadow, param, stored):
            raise ValueError(
                f"fused: got a shadow of {_facts(shadow)} and a parameter of {_facts(param)}, "
                "expected dense tensors of a floating dtype, with equal strides, on one device; "
                "use kernel='foreach'"
            )
        if shadow.numel() == 0:
            continue
        if stored is not None:
            rounded.append(_Rounded(shadow, param.detach(), slot, stored))
            continue
        key = (param.device, param.dtype, param.data_ptr(), param.numel())
        if key not in last or len(last[key].slots) == MAX_AVERAGES:
            # detached: keeps this storage, even if the parameter gets another
            last[key] = _Job(param.detach())
            jobs.append(last[key])
        last[key].shadows.append(shadow)
        last[key].slots.append(slot)
    work = _Work(jobs, rounded)
    names = ("fused",) if jobs or rounded else ()
    return Replayable(work.move, names, work.launch, work.refresh)


def rows(jobs: Sequence[_Job]) -> Tensor:
    """The table of jobs of the same dtypes, `[blocks, 3 + 2 * shadows]`, int64, on the host.

    A row: elements of the block, whether it is full and all addresses are aligned to `ALIGN` bytes,
    the addresses of its parameter and its shadows, the slots. The addresses are those of the block
    itself, so the kernel never multiplies an index that could exceed 32 bits.
    """
    tensors = [[job.param, *job.shadows] for job in jobs]
    with torch.device("cpu"):  # whatever the default device is
        steps = torch.tensor([tensor.itemsize for tensor in tensors[0]])
        numels = torch.tensor([job.param.numel() for job in jobs])
        starts = torch.tensor([[tensor.data_ptr() for tensor in row] for row in tensors])
        slots = torch.tensor([job.slots for job in jobs])
    of, begin, sizes = _blocks(numels)
    addresses = starts[of] + begin[:, None] * steps
    wide = (sizes == BLOCK) & (addresses % ALIGN == 0).all(1)
    return torch.cat([sizes[:, None], wide[:, None], addresses, slots[of]], dim=1)


def rounded_rows(pairs: Sequence[_Rounded]) -> Tensor:
    """The table of pairs of the same dtypes and kind of rounding, int64, on the host.

    A row: elements of the block, the addresses of its parameter and its shadow, the slot. Then, of
    shadows rounded at random, the slot of the number, the key, and the place of the first element
    of its run, the number of the block's first element in it, and the run's other fields; of others
    the address of the companion.
    """
    found = [fields for pair in pairs for fields in _runs_of(pair)]
    shadow, param = pairs[0].shadow, pairs[0].param
    with torch.device("cpu"):
        table = torch.tensor(found)
    of, begin, sizes = _blocks(table[:, 0])
    table = table[of]
    table[:, 0] = sizes
    table[:, 1] += begin * param.itemsize
    table[:, 2] += begin * shadow.itemsize
    if isinstance(pairs[0].stored, Stochastic):
        table[:, 7] = begin
    else:
        table[:, 4] += begin * 2
    return table


def _runs_of(pair: _Rounded) -> Iterator[list[int]]:
    """The fields of the rows of a pair, as if a block had any size."""
    shadow, param, stored = pair.shadow, pair.param, pair.stored
    start, source = shadow.data_ptr(), param.data_ptr()
    if isinstance(stored, Compensated):
        yield [shadow.numel(), source, start, pair.slot, stored.companion.data_ptr()]
        return
    key = stored.key - (1 << 64) if stored.key >> 63 else stored.key
    for run in runs(shadow, param, stored) or ():
        addresses = [source + run.param * param.itemsize, start + run.shadow * shadow.itemsize]
        places = [run.first, 0, run.run, run.step, run.jump]
        yield [run.numel, *addresses, pair.slot, stored.number, key, *places]


def _blocks(numels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each block of jobs of these sizes: its job, its first element in it, and its size."""
    with torch.device("cpu"):
        blocks = (numels + BLOCK - 1) // BLOCK  # [jobs]
        of = torch.arange(len(numels)).repeat_interleave(blocks)  # the job of each row
        first = (blocks.cumsum(0) - blocks)[of]  # the first row of that job
        begin = (torch.arange(len(of)) - first) * BLOCK  # in elements of the job
    return of, begin, (numels[of] - begin).clamp(max=BLOCK)


def _on(device: torch.device, table: Tensor) -> Tensor:
    """A copy on the device, through pinned memory, so that the host does not wait for it."""
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _facts(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.layout} on {tensor.device}"
