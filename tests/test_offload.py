"""Offloaded averages: the bits of the plain update, behind the step, in bounded memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shardema import kernels
from shardema.kernels import foreach, reference
from shardema.update import offload, staging
from shardema.update.offload import DeviceOffload, HostOffload
from tests import meters

BOTH = pytest.mark.parametrize("kind", [HostOffload, DeviceOffload])
TINY = 1024  # bytes of staging: most tensors of `case` are larger than one buffer
WEIGHTS = [(0.25, 0.0, 0.9), (1.0, 0.5, 1e-4), (0.0, 0.0, 0.0), (0.1, 0.2, 0.3)]

Case = tuple[list[Tensor], list[Tensor], list[int]]


def case(dtype: torch.dtype = torch.float32, averages: int = 3) -> Case:
    """Shadows, parameters and slots of hard shapes and strides; the last average is of float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (0, 4), (), (1031,), (2, 3, 4, 5), (17, 60), (4,)]
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params[4] = params[4].to(memory_format=torch.channels_last)
    params.append(torch.randn(6, 9, generator=generator).to(dtype).t())
    params.append(torch.randn(60, 90, generator=generator).to(dtype)[:, ::2])  # gaps
    shadows = []
    for slot in range(averages):
        wide = torch.float64 if dtype == torch.float64 or slot == 2 else torch.float32
        shadows += [torch.empty_like(p, dtype=wide).fill_(slot / 3) for p in params]
    return shadows, params * averages, [slot for slot in range(averages) for _ in params]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def expected_after(args: Case, weights: Sequence[float]) -> list[Tensor]:
    shadows = clones(args[0])
    reference.bind(shadows, args[1], args[2])(weights)
    return shadows


class Gate:
    """The reference kernel; the batch of this number waits until it is opened."""

    def __init__(self, batch: int = 0) -> None:
        self.batch = batch
        self.bound = 0
        self.entered = threading.Event()
        self.open = threading.Event()
        self.averaged = 0  # batches

    def __call__(self, *args: Any) -> kernels.Lerp:
        lerp_, number = reference.bind(*args), self.bound
        self.bound += 1

        def gated(weights: Sequence[float]) -> None:
            if number == self.batch:
                self.entered.set()
                self.open.wait()
            lerp_(weights)
            self.averaged += 1

        return gated


# ---- the numbers --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kernel", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("staging", [256, TINY, 4096, offload.STAGING_BYTES])
def test_the_bits_are_those_of_the_update_done_at_once(
    kind: Any, kernel: str, dtype: torch.dtype, staging: int
) -> None:
    shadows, params, slots = case(dtype)
    plain = clones(shadows)
    lerp_ = reference.bind(plain, params, slots)
    behind = kind(shadows, params, slots, kernels.find(kernel), staging_bytes=staging)
    for weights in WEIGHTS:
        lerp_(weights)
        behind(weights)
        behind.await_reads()
        for param in params[: len(params) // 3]:
            param.add_(1.0)
    behind.flush()
    assert same(shadows, plain)
    behind.close()


@BOTH
def test_dtypes_may_be_mixed_and_every_piece_starts_on_64_bytes(kind: Any) -> None:
    dtypes = (torch.bfloat16, torch.float64, torch.float16, torch.float32, torch.float64)
    params = [torch.full((3, 7), 0.5, dtype=dtype) for dtype in dtypes]
    shadows = [torch.zeros(3, 7, dtype=torch.float64) for _ in params]
    seen: list[Tensor] = []

    def bind(*args: Any) -> kernels.Lerp:
        seen.extend(args[1] if kind is HostOffload else args[0])
        return foreach.bind(*args)

    behind = kind(shadows, params, [0] * 5, bind)
    behind([0.5])
    behind.flush()
    assert all(torch.equal(shadow, torch.full_like(shadow, 0.25)) for shadow in shadows)
    assert len(seen) == 5
    assert all(piece.data_ptr() % 64 == 0 for piece in seen)
    behind.close()


@BOTH
def test_nothing_to_average_is_no_error(kind: Any) -> None:
    for tensors in ([], [torch.zeros(0, 4)]):
        behind = kind(tensors, tensors, [0] * len(tensors), foreach.bind)
        behind([0.5])
        behind.await_reads()
        behind.flush()
        assert behind.nbytes == 0
        behind.close()


@BOTH
def test_the_caller_may_be_in_inference_mode(kind: Any) -> None:
    args = case()
    plain = expected_after(args, WEIGHTS[0])
    with torch.inference_mode():
        behind = kind(*args, foreach.bind, staging_bytes=TINY)
        behind(WEIGHTS[0])
        behind.await_reads()
        behind.flush()
    assert same(args[0], plain)
    behind(WEIGHTS[1])  # nothing of it was made for inference only
    behind.flush()


@BOTH
def test_the_weights_are_those_at_the_call(kind: Any) -> None:
    args = case(averages=1)
    plain = expected_after(args, [0.25])
    gate, weights = Gate(), [0.25]
    behind = kind(*args, gate)
    if kind is DeviceOffload:
        gate.open.set()
    behind(weights)
    weights[0] = 1.0
    gate.open.set()
    behind.flush()
    assert same(args[0], plain)


# ---- the order ----------------------------------------------------------------------------------


def test_parameters_may_be_overwritten_once_copied() -> None:
    args = case()
    plain = expected_after(args, WEIGHTS[3])
    probe = Gate(-1)
    HostOffload(*args, probe, staging_bytes=TINY)
    assert probe.bound > 3
    gate = Gate(probe.bound - 1)
    behind = HostOffload(*args, gate, staging_bytes=TINY)
    behind(WEIGHTS[3])
    behind.await_reads()
    assert gate.averaged < probe.bound  # the update still runs
    for param in args[1]:
        param.fill_(7.0)
    gate.open.set()
    behind.flush()
    assert same(args[0], plain)


def test_the_copies_are_done_before_await_reads_returns() -> None:
    """The first batches keep the worker: the last ones are not copied yet."""
    args = case()
    gate = Gate(0)
    behind = HostOffload(*args, gate, staging_bytes=TINY)
    behind(WEIGHTS[3])
    gate.entered.wait()
    assert behind._update is not None
    assert not behind._update.reads_issued.is_set()
    gate.open.set()
    behind.await_reads()
    assert gate.averaged >= gate.bound - 2  # two buffers: the last two batches may lie in them
    behind.flush()


def test_the_second_call_waits_for_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case()
    plain = expected_after(args, WEIGHTS[0])
    reference.bind(plain, args[1], args[2])(WEIGHTS[1])
    gate = Gate()
    behind = HostOffload(*args, gate, staging_bytes=TINY)
    behind(WEIGHTS[0])  # returns, though the kernel does not
    assert gate.averaged == 0
    flush = HostOffload.flush

    def flushed(self: HostOffload) -> None:
        gate.open.set()
        flush(self)
        assert gate.averaged == gate.bound

    with monkeypatch.context() as patch:
        patch.setattr(HostOffload, "flush", flushed)
        behind(WEIGHTS[1])
    assert gate.averaged >= gate.bound
    behind.flush()
    assert gate.averaged == 2 * gate.bound
    assert same(args[0], plain)


def test_streams_and_buffers_are_used_in_the_order_that_keeps_them_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU is asked for, and when; here it only notes it."""
    log: list[tuple[str, int]] = []

    class Noted(staging.CopyStreams):
        def begin(self) -> None:
            log.append(("begin", -1))

        def mark(self, buffer: int) -> None:
            log.append(("copied", buffer))

        def wait(self, buffer: int) -> None:
            log.append(("wait", buffer))

        def block_current_stream(self) -> None:
            log.append(("hold back", -1))

    monkeypatch.setattr(offload, "CopyStreams", Noted)
    params = [torch.zeros(128) for _ in range(4)]  # one buffer each

    def noting(*args: Any) -> kernels.Lerp:
        return lambda weights: log.append(("average", -1))

    behind = HostOffload(params, params, [0] * 4, noting, staging_bytes=TINY)
    behind([0.5])
    behind.await_reads()
    behind.flush()
    log.remove(("hold back", -1))  # by this thread, in its own time
    average = ("average", -1)
    assert log == [
        ("begin", -1),
        *(("copied", 0), ("copied", 1)),
        *(("wait", 0), average, ("copied", 0)),
        *(("wait", 1), average, ("copied", 1)),
        *(("wait", 0), average, ("wait", 1), average),
    ]


def test_what_travels_is_ordered_after_the_caller_and_before_what_it_does_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU is asked for, on every device; here it only notes it."""
    log: list[str] = []

    class Noted(staging.CopyStreams):
        def begin(self) -> None:
            log.append("begin")

        def block_current_stream(self) -> None:
            log.append("hold back")

        def finish(self) -> None:
            log.append("finish")

    monkeypatch.setattr(offload, "CopyStreams", Noted)

    def noting(*args: Any) -> kernels.Lerp:
        return lambda weights: log.append("average")

    params = [torch.zeros(64), torch.zeros(64)]
    behind = DeviceOffload(params, params, [0] * 2, noting, staging_bytes=TINY)
    behind([0.5])
    behind.await_reads()
    behind.flush()
    averages = ["average"] * len(behind._batches)
    assert averages
    assert log == ["begin", *averages, "hold back", "finish"]


@pytest.mark.parametrize("number", range(12))
def test_an_interrupted_update_is_carried_on_with(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts after each of the operations of a batch, whole or half done."""
    args = case(torch.bfloat16)
    plain = expected_after(args, WEIGHTS[3])
    left = number

    def interrupt() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt

    def bind(*pairs: Any) -> kernels.Lerp:
        lerp_ = foreach.bind(*pairs)

        def lerp_and_interrupt(weights: Sequence[float]) -> None:
            lerp_(weights)
            interrupt()

        return lerp_and_interrupt

    class CopyStreams(staging.CopyStreams):
        def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
            super().copy(targets[:1], sources[:1])
            interrupt()
            super().copy(targets, sources)
            interrupt()

    monkeypatch.setattr(offload, "CopyStreams", CopyStreams)
    behind = DeviceOffload(*args, bind, staging_bytes=TINY)
    weights = list(WEIGHTS[3])
    with pytest.raises(KeyboardInterrupt):
        behind(weights)
    assert not same(args[0], plain)
    weights[:] = [1.0, 1.0, 1.0]
    behind.flush()
    assert same(args[0], plain)


def test_a_flush_that_is_interrupted_may_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    args = case()
    plain = expected_after(args, WEIGHTS[3])
    gate = Gate()
    behind = HostOffload(*args, gate)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    behind(WEIGHTS[3])
    assert behind._update is not None
    with monkeypatch.context() as patch:
        patch.setattr(behind._update.done, "wait", Interrupted().wait)
        with pytest.raises(KeyboardInterrupt):
            behind.flush()
    gate.open.set()
    behind.flush()
    assert same(args[0], plain)


def test_an_update_is_made_once_wherever_its_start_is_interrupted() -> None:
    class Interrupting:
        """A queue that raises before or after it took an update."""

        def __init__(self, queue: Any, taken: bool) -> None:
            self.queue, self.taken = queue, taken

        def put(self, update: Any) -> None:
            if self.taken:
                self.queue.put(update)
            raise KeyboardInterrupt

    for taken in (False, True):
        args = case()
        plain = expected_after(args, WEIGHTS[3])
        behind = HostOffload(*args, reference.bind)
        queue = behind._work.queue
        behind._work.queue = Interrupting(queue, taken)  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            behind(WEIGHTS[3])
        behind._work.queue = queue
        behind.flush()
        queue.put(behind._update)  # it may stand there twice
        behind([0.0, 0.0, 0.0])
        behind.flush()
        assert same(args[0], plain)


# ---- memory -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("staging", [256, TINY, 5000])
def test_the_staging_is_bounded(kind: Any, staging: int) -> None:
    args = case(torch.bfloat16)

    def no_kernel(*_: Any) -> kernels.Lerp:
        return lambda weights: None

    made: list[Any] = []

    def make() -> None:
        made.append(kind(*args, no_kernel, staging_bytes=staging))

    grown = meters.allocated_at_first(make)
    assert 0 < grown <= staging
    assert made[0].nbytes == grown


@BOTH
def test_the_staging_is_no_larger_than_the_parameters_need(kind: Any) -> None:
    params = [torch.zeros(32), torch.zeros(64)]
    behind = kind(clones(params), params, [0, 0], foreach.bind)
    assert behind.nbytes == 4 * (32 + 64)


def test_a_chunk_fills_its_buffer_together_with_the_converted_parameter() -> None:
    shadows, params = [torch.zeros(64)], [torch.zeros(64, dtype=torch.bfloat16)]
    behind = DeviceOffload(shadows, params, [0], foreach.bind, staging_bytes=2 * 512)
    assert len(behind._batches) == 1
    assert behind.nbytes == 2 * 4 * 64


@BOTH
def test_a_staging_that_holds_nothing_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="staging_bytes: got 255, expected 256 or more"):
        kind([], [], [], foreach.bind, staging_bytes=255)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of all copies between host and device."""
    sizes: list[int] = []

    class Counting(staging.CopyStreams):
        def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
            sizes.extend(target.nbytes for target in targets)
            super().copy(targets, sources)

    monkeypatch.setattr(offload, "CopyStreams", Counting)
    return sizes


def test_a_parameter_is_copied_once_for_all_of_its_averages(copied: list[int]) -> None:
    for averages in (1, 2):
        shadows, params, slots = case(torch.bfloat16, averages)
        copied.clear()
        views = [p.as_strided(p.shape, p.stride()) for p in params]  # other objects, same memory
        behind = HostOffload(shadows, views, slots, foreach.bind, staging_bytes=TINY)
        behind([0.5] * averages)
        behind.flush()
        assert sum(copied) == 2 * sum(p.numel() for p in params) // averages


def test_of_what_travels_only_averages_that_move_are_copied(copied: list[int]) -> None:
    shadows, params, slots = case(averages=2)
    numel = sum(p.numel() for p in params) // 2
    behind = DeviceOffload(shadows, params, slots, foreach.bind, staging_bytes=4 << 10)
    behind([0.5, 0.5])
    both = sum(copied)
    assert both == 2 * 2 * 4 * numel  # there and back, two averages
    copied.clear()
    behind([0.5, 0.0])
    assert both / 2 <= sum(copied) <= both / 2 + 2 * 4 * (1 << 10)  # and what shares its batch


@BOTH
def test_an_update_that_moves_nothing_copies_nothing(kind: Any, copied: list[int]) -> None:
    behind = kind(*case(), foreach.bind)
    behind([0.0, 0.0, 0.0])
    behind.await_reads()
    behind.flush()
    assert copied == []


def allocated_by(behind: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that an update after the first allocates, by the caller and by the worker."""
    average = offload._average
    in_worker: list[int] = []

    def metered(*args: Any) -> None:
        in_worker.append(meters.allocated_at_first(lambda: average(*args)))

    def update() -> None:
        behind([0.1, 0.2, 0.3])
        behind.await_reads()
        behind.flush()

    in_caller = meters.allocated(update)
    with monkeypatch.context() as patch:
        # The meter sees the thread that it is used in, and two at a time would crash.
        patch.setattr(offload, "_average", metered)
        update()
    assert len(in_worker) == (type(behind) is HostOffload)
    return in_caller + sum(in_worker)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_update_after_the_first_allocates_nothing(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = kind(*case(dtype), foreach.bind, staging_bytes=TINY)
    assert allocated_by(behind, monkeypatch) == 0


@BOTH
def test_the_meter_sees_what_a_kernel_allocates(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*args: Any) -> kernels.Lerp:
        def lerp_(weights: Sequence[float]) -> None:
            torch.zeros(1000)

        return lerp_

    assert allocated_by(kind(*case(), planted), monkeypatch) >= 4000


def test_a_kernel_needs_no_scratch_for_what_travels() -> None:
    """The conversion is in the bounded buffers, not in the kernel, once for every batch."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def bind(*args: Any) -> kernels.Lerp:
        pairs.extend(zip(args[0], args[1], strict=True))
        return foreach.bind(*args)

    for dtype in (torch.float32, torch.bfloat16):
        DeviceOffload(*case(dtype), bind, staging_bytes=TINY)
    assert len(pairs) > 20
    assert all(a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs)


# ---- what goes wrong ----------------------------------------------------------------------------


def failing(*_: Any) -> kernels.Lerp:
    def lerp_(weights: Sequence[float]) -> None:
        raise MemoryError("no room")

    return lerp_


CALLS: dict[str, Callable[[Any], None]] = {
    "update": lambda behind: behind([0.5]),
    "await_reads": lambda behind: behind.await_reads(),
    "flush": lambda behind: behind.flush(),
}


@pytest.mark.parametrize("first", sorted(CALLS))
def test_an_error_of_the_worker_surfaces_at_the_next_call_and_stays(first: str) -> None:
    args = [torch.zeros(3)], [torch.ones(3)], [0]
    behind = HostOffload(*args, failing)
    behind([0.5])
    assert behind._update is not None
    behind._update.done.wait()
    for call in (CALLS[first], *CALLS.values()):
        with pytest.raises(RuntimeError, match="failed: MemoryError: no room; they may") as caught:
            call(behind)
        assert isinstance(caught.value.__cause__, MemoryError)
    behind.close()  # what comes after it must be able to
    with pytest.raises(RuntimeError, match="no room"):
        behind.flush()


def test_an_error_of_this_update_is_not_missed_by_await_reads_and_flush() -> None:
    for call in (CALLS["await_reads"], CALLS["flush"]):
        behind = HostOffload(
            [torch.zeros(900)], [torch.ones(900)], [0], failing, staging_bytes=TINY
        )
        behind([0.5])
        with pytest.raises(RuntimeError, match="no room"):
            call(behind)


def test_after_an_error_no_update_is_made() -> None:
    shadow = torch.zeros(3)
    behind = HostOffload([shadow], [torch.ones(3)], [0], foreach.bind)
    behind._work.error = MemoryError("no room")
    update = offload._Update((0.5,))
    behind._work.queue.put(update)
    update.done.wait()
    assert torch.equal(shadow, torch.zeros(3))


def test_an_error_of_what_travels_surfaces_at_once_and_stays() -> None:
    def once(*args: Any) -> kernels.Lerp:
        lerp_, failures = reference.bind(*args), [failing()]

        def fails_at_first(weights: Sequence[float]) -> None:
            (failures.pop() if failures else lerp_)(weights)

        return fails_at_first

    behind = DeviceOffload([torch.zeros(3)], [torch.ones(3)], [0], once)
    for call in (CALLS["update"], *CALLS.values()):
        with pytest.raises(RuntimeError, match="failed: MemoryError: no room; they may") as caught:
            call(behind)
        assert isinstance(caught.value.__cause__, MemoryError)
    behind.close()


# ---- the end ------------------------------------------------------------------------------------


@BOTH
def test_close_ends_the_update_and_refuses_another_one(kind: Any) -> None:
    args = case()
    plain = expected_after(args, WEIGHTS[3])
    before = threading.active_count()
    behind = kind(*args, foreach.bind, staging_bytes=TINY)
    behind(WEIGHTS[3])
    behind.close()
    behind.close()
    assert threading.active_count() == before
    assert same(args[0], plain)
    behind.await_reads()
    behind.flush()
    with pytest.raises(RuntimeError, match=r"after close\(\); build a new EMA"):
        behind(WEIGHTS[3])


@BOTH
def test_close_frees_the_staging(kind: Any) -> None:
    staging: list[weakref.ref[Tensor]] = []

    def bind(*args: Any) -> kernels.Lerp:
        staging.extend(weakref.ref(t) for t in args[1 if kind is HostOffload else 0])
        return reference.bind(*args)

    behind = kind(*case(), bind, staging_bytes=TINY)
    behind(WEIGHTS[3])
    behind.close()
    gc.collect()
    assert staging
    assert not any(ref() is not None for ref in staging)


def test_collecting_the_object_ends_its_thread_and_frees_the_parameters() -> None:
    param = torch.ones(3)
    freed = weakref.ref(param)
    behind = HostOffload([torch.zeros(3)], [param], [0], foreach.bind)
    behind([0.5])
    behind.flush()
    thread = behind._end.peek()[2][1]  # type: ignore[index]
    assert thread.is_alive()
    del behind, param
    gc.collect()
    assert not thread.is_alive()
    assert freed() is None


def test_an_object_that_is_collected_in_the_middle_gives_its_update_up() -> None:
    args = case()
    gate = Gate(0)
    behind = HostOffload(*args, gate, staging_bytes=TINY)
    work = behind._work

    behind(WEIGHTS[3])
    gate.entered.wait()
    thread = behind._end.peek()[2][1]  # type: ignore[index]
    join = thread.join

    def opened(timeout: float | None = None) -> None:
        assert work.given_up  # before the kernel goes on
        gate.open.set()
        join(timeout)

    thread.join = opened
    del behind
    gc.collect()
    assert not thread.is_alive()
    assert gate.averaged == 1


PROGRAM = """
import os, sys, threading
import torch
from shardema.update import offload

going, gate = threading.Event(), threading.Event()

def bind(shadows, params, slots, roundings):
    def lerp_(weights):
        going.set()
        gate.wait()
        for shadow, param in zip(shadows, params):
            for _ in range(20):
                shadow.lerp_(param, weights[0])
    return lerp_

params = [torch.zeros(1 << 16) for _ in range(100)]
shadows = [p.clone() for p in params]
behind = offload.HostOffload(shadows, params, [0] * 100, bind, staging_bytes=1 << 19)
behind([0.5])
going.wait()
"""


def ends(program: str) -> tuple[int, str, str]:
    """How a program with an update in flight ends; raises if it hangs."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout, done.stderr


def test_a_process_exits_with_an_update_in_flight() -> None:
    assert ends("gate.set(); print('last line'); sys.exit(3)") == (3, "last line\n", "")


def test_a_process_exits_though_the_worker_does_not_stop() -> None:
    assert ends("offload._PATIENCE = 0.1; sys.exit(3)") == (3, "", "")


FORK = """
def in_child(leave):
    for call in (behind.flush, behind.await_reads, lambda: behind([0.5])):
        try:
            call()
        except RuntimeError as error:
            assert "the process that this one was forked from" in str(error)
        else:
            os._exit(1)
    leave()
    sys.exit(0)

def leave_by_del():
    global behind
    del behind

for leave in (lambda: None, behind.close, leave_by_del):
    child = os.fork()
    if child == 0:
        in_child(leave)
    assert os.waitpid(child, 0)[1] == 0
gate.set()
behind.flush()
if os.fork() == 0:
    behind.flush()  # nothing is missing
    try:
        behind([0.5])
    except RuntimeError:
        sys.exit(0)
    os._exit(1)
assert os.wait()[1] == 0
behind([0.5])
behind.flush()
print("parent done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_neither_hangs_nor_updates() -> None:
    assert ends(FORK) == (0, "parent done\n", "")


# ---- on a GPU -----------------------------------------------------------------------------------


def test_the_thread_chooses_the_gpu_of_the_weights_before_its_first_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a counting fake of `torch.cuda.set_device`: a context of the driver is not seen here."""
    seen: list[object] = []

    class Copies(staging.CopyStreams):
        """Of a CPU, but in a thread as if they were of the third GPU."""

        def make_current(self) -> None:
            there = object.__new__(staging.CopyStreams)
            there.device, there.streams = torch.device("cuda", 2), [object()]
            there.make_current()

        def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
            seen.append("copy")
            super().copy(targets, sources)

    monkeypatch.setattr(offload, "CopyStreams", Copies)

    def chosen(device: torch.device) -> None:
        seen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    behind = HostOffload(*case(), foreach.bind)
    behind(WEIGHTS[0])
    behind.flush()
    behind.close()
    assert seen[:2] == [("shardema-offload", torch.device("cuda", 2)), "copy"]
    seen.clear()
    staging.CopyStreams(torch.device("cpu"), streams=1).make_current()
    assert seen == []  # of a CPU there is nothing to choose


# the same on a CPU, without streams: so that what is not run on a GPU is at least run
DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
            ],
        ),
    ],
)


@BOTH
@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nbytes", [TINY, offload.STAGING_BYTES])
def test_the_streams_keep_the_order(
    kind: Any, device: str, dtype: torch.dtype, nbytes: int
) -> None:
    on_a_gpu = device == "cuda"
    shadows, params, slots = case(dtype)
    on_device = [torch.empty_like(p, device=device) for p in params[: len(params) // 3]]
    pinned = []
    for shadow in shadows:
        flat = staging.zeros(shadow.numel(), shadow.dtype, pinned=on_a_gpu)
        pinned.append(flat.as_strided(shadow.shape, shadow.stride()).copy_(shadow))
    behind = kind(pinned, on_device * 3, slots, foreach.bind, staging_bytes=nbytes)
    for weights in WEIGHTS:
        if on_a_gpu:  # what follows is not there yet when the update is called
            torch.cuda._sleep(10_000_000)
        for target, param in zip(on_device, params, strict=False):
            target.copy_(param.to(device), non_blocking=True)
        behind(weights)
        behind.await_reads()
        for target in on_device:
            target.fill_(7.0)
        behind.flush()
        plain = clones(shadows)
        where = "cpu" if kind is HostOffload else device
        moved = [shadow.to(where) for shadow in plain]
        reference.bind(moved, [p.to(where) for p in params], slots)(weights)
        shadows = [shadow.cpu() for shadow in moved]
        assert same(pinned, shadows)
    behind.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@BOTH
def test_on_a_gpu_an_update_after_the_first_allocates_nothing(kind: Any) -> None:
    params = [torch.ones(1000, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    shadows = [staging.zeros(1000, torch.float32, pinned=True) for _ in params]
    behind = kind(shadows, params, [0, 0, 0], foreach.bind, staging_bytes=TINY)

    def update() -> None:
        behind([0.5])
        behind.await_reads()
        behind.flush()

    assert meters.allocated_on_gpu(update) == 0
