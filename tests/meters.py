"""Meters: collectives, allocations, copies. Each is shown to fire in test_meters.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from shardema import ShardedEMA
from shardema.ranks.agree import ALL_GATHER

_COMMUNICATION = (
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced",
    "allgather_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "send",
    "recv",
    "recv_anysource",
)


@contextlib.contextmanager
def communicators() -> Iterator[set[str]]:
    """Names of the groups that make a communicator inside, by the rules of NCCL.

    Raises at what makes more of them, or hangs: a send that is not in a batch makes one for its two
    ranks; a batch that not all ranks of a group take part in must not be the group's first call.
    """
    made: set[str] = set()
    batches: list[Any] = []
    cls, batch = dist.ProcessGroup, dist.batch_isend_irecv
    originals = {name: cls.__dict__[name] for name in _COMMUNICATION if name in cls.__dict__}

    def in_batch(parts: list[Any]) -> Any:
        batches.append(parts)
        try:
            return batch(parts)
        finally:
            batches.pop()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if name in ("send", "recv", "recv_anysource"):
                assert batches, f"{name} makes a communicator of two ranks"
                assert group.group_name in made, "a batch is the first call of its group"
            made.add(group.group_name)
            return original(group, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, original in originals.items():
            stack.callback(setattr, cls, name, original)
            setattr(cls, name, counted(name, getattr(cls, name)))
        stack.callback(setattr, dist, "batch_isend_irecv", batch)
        dist.batch_isend_irecv = in_batch
        yield made


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of the calls that reach any ProcessGroup inside, in order."""
    calls: list[str] = []
    cls = dist.ProcessGroup
    originals = {name: cls.__dict__[name] for name in _COMMUNICATION if name in cls.__dict__}

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        return call

    for name in originals:
        setattr(cls, name, counted(name, getattr(cls, name)))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(cls, name, original)


@contextlib.contextmanager
def gathered() -> Iterator[list[int]]:
    """Bytes that this rank gives to each all-gather of the library inside."""
    given: list[int] = []
    original = getattr(dist, ALL_GATHER)

    def counted(output: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(own.nbytes)
        return original(output, own, *args, **kwargs)

    setattr(dist, ALL_GATHER, counted)
    try:
        yield given
    finally:
        setattr(dist, ALL_GATHER, original)


def allocated(call: Callable[[], object]) -> int:
    """Bytes of CPU tensors that a call allocates, counted at the allocator."""
    call()  # the first call may
    return allocated_at_first(call)


def allocated_at_first(call: Callable[[], object]) -> int:
    """Like `allocated`, of a call that was not made before."""
    return sum(n for n in _memory_events(call) if n > 0)


def peak(call: Callable[[], object]) -> int:
    """Most bytes of CPU tensors that a call holds at a time, beyond what it was started with."""
    return max(itertools.accumulate(_memory_events(call), initial=0))


def kept(call: Callable[[], object]) -> int:
    """Bytes of CPU tensors that are held after a call beyond those before it."""
    return sum(_memory_events(call))


def _memory_events(call: Callable[[], object]) -> list[int]:
    """Bytes of every single allocation and, negative, of every release, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None
    found = seen.profiler.kineto_results.events()
    events = [e for e in found if e.name() == "[memory]" and e.device_type() == DeviceType.CPU]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def allocated_on_gpu(call: Callable[[], object]) -> int:
    """Allocations that a call makes on the GPU."""
    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)


def bytes_on_gpu(call: Callable[[], object]) -> int:
    """Bytes of tensors that a call allocates on the GPU, after a first call."""
    call()
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    call()
    return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before)


def peak_on_gpu(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds on the GPU beyond what it was started with."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Raises where the host waits for the GPU inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Dispatched(TorchDispatchMode):
    """Sees every operation on tensors inside."""

    def __init__(self, seen: Callable[[Any, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._seen(func, args)
        return func(*args, **(kwargs or {}))


def read_only_locals(ema: ShardedEMA) -> bool:
    """Whether `update` hands plain local tensors to its arithmetic, and no DTensor."""
    kinds: set[type] = set()

    def note(func: Any, args: tuple[Any, ...]) -> None:
        if "lerp" in str(func) or "copy" in str(func):
            for arg in args[:2]:
                for tensor in arg if isinstance(arg, list | tuple) else [arg]:
                    kinds.add(type(tensor))

    with _Dispatched(note):
        ema.update()
    return bool(kinds) and all(kind in (Tensor, torch.nn.Parameter) for kind in kinds)


def copies(call: Callable[[], object]) -> int:
    """How many in-place copies a call makes."""
    count = 0

    def note(func: Any, _: tuple[Any, ...]) -> None:
        nonlocal count
        count += func is torch.ops.aten.copy_.default

    with _Dispatched(note):
        call()
    return count


@contextlib.contextmanager
def interrupt_at_copy(number: int) -> Iterator[None]:
    """Raises KeyboardInterrupt right after the in-place copy of this number, once."""
    left = number

    class Interrupt(_Dispatched):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            nonlocal left
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.copy_.default:
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return result

    with Interrupt(lambda func, args: None):
        yield
