"""Averages in host memory of parameters on a device, updated behind the training step.

::

    HostOffload    device   params ---.              .---> params         a side stream
                   host               '-> staging ---'                    two pinned buffers
                   host                   lerp_(shadows, staging)         a worker thread

    DeviceOffload  host     shadows --.               .--> shadows        pinned
                   device             '-> chunk ------'                   two buffers, a stream each
                   device                 lerp_(chunk, params)

Both cut the parameters into batches that each fill one buffer, and bind the kernel to every batch
once, so that an update has nothing left to plan or to allocate. While one buffer is averaged the
other one is copied. On a CPU the same code runs, without streams and without pinning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from shardema import kernels
from shardema.scopes import writable
from shardema.update.staging import (
    Chunk,
    CopyStreams,
    Staged,
    buffer_sizes,
    chunk_bytes,
    cut_pairs,
    half_of,
    make_chunk,
    make_staged,
    pack,
    zeros,
)

STAGING_BYTES = 512 << 20  # both buffers together

_PATIENCE = 10.0  # seconds that the end of a process waits for a worker that does not stop


class HostOffload:
    """Updates averages in host memory on a worker thread, at most one update behind the step.

    A parameter that is listed several times, once for each of its averages, is copied once. Not
    thread-safe.

    Args:
        shadows: on the CPU, of any dense strides; nobody else may touch them before `flush`.
        params: of the same shapes, on any devices.
        slots: index of each pair's weight.
        bind: the kernel, for tensors on the CPU.
        staging_bytes: size of the two buffers together; they are pinned if a parameter is on a
            GPU, and no larger than needed.

    Raises:
        ValueError: ``staging_bytes`` is too small.
    """

    name = "host_offload"  # beside the names of kernels

    def __init__(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        bind: kernels.Bind,
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        limit = half_of(staging_bytes)
        with writable():
            pieces = cut_pairs(shadows, params, slots, lambda _, p: limit // p.itemsize)
            packed = pack(pieces, lambda piece: piece.param.nbytes, limit)
            pinned = any(param.device.type == "cuda" for param in params)
            sizes = buffer_sizes(packed, lambda piece: piece.param.nbytes)
            staging = [zeros(size, torch.uint8, pinned=pinned) for size in sizes]
            self._copies = {p.param.device: CopyStreams(p.param.device, streams=1) for p in pieces}
            batches = [
                make_staged(
                    batch, k % 2, staging[k % 2], self._copies[batch[0][1].param.device], bind
                )
                for k, batch in enumerate(packed)
            ]
        self.nbytes = sum(sizes)
        self._update: _Update | None = None
        self._work = _Work(batches)
        # the thread knows the work, never this object: else it could not be collected
        thread = threading.Thread(
            target=_serve, args=(self._work,), name="shardema-offload", daemon=True
        )
        self._end = weakref.finalize(self, _stop, self._work, thread)
        thread.start()

    def __call__(self, weights: Sequence[float]) -> None:
        """Starts an update and returns; waits for the update before, if that one still runs.

        Raises:
            RuntimeError: an update failed, or the object is closed.
        """
        self.flush()
        self._here()
        if not self._end.alive:
            _raise_closed()
        for copies in self._copies.values():
            copies.begin()
        # In this order: an interrupt in between leaves an update that `flush` puts once more.
        self._update = _Update(tuple(weights))
        self._work.queue.put(self._update)

    def await_reads(self) -> None:
        """Returns when the parameters may be changed.

        On a GPU the current stream waits for the last copy; the host only until that was issued.

        Raises:
            RuntimeError: an update failed.
        """
        if self._update is not None:
            self._wait(self._update, self._update.reads_issued)
        self._check()
        for copies in self._copies.values():
            copies.block_current_stream()

    def flush(self) -> None:
        """Returns when the averages are up to date. After an interrupt it may be called again.

        Raises:
            RuntimeError: an update failed.
        """
        if self._update is not None:
            self._wait(self._update, self._update.done)
        self._check()

    def close(self) -> None:
        """Ends the worker, once the update that runs is done, and frees the staging.

        Raises nothing that the worker raised. An object that is collected, or alive when the
        interpreter exits, gives that update up.
        """
        if self._end.alive and self._update is not None and os.getpid() == self._work.pid:
            self._wait(self._update, self._update.done)
        self._end()
        self._work.batches.clear()

    def _wait(self, update: _Update, event: threading.Event) -> None:
        if event.is_set():
            return
        self._here()
        if not update.started:
            self._work.queue.put(update)  # once more: see __call__
        event.wait()

    def _here(self) -> None:
        if os.getpid() != self._work.pid:
            raise RuntimeError(
                "offloaded averages are updated in the process that this one was forked from; "
                "update and read them there"
            )

    def _check(self) -> None:
        if self._work.error is not None:
            _raise_failed(self._work.error)


class DeviceOffload:
    """Updates averages in host memory on the device of the parameters.

    For a host that is too slow for `HostOffload`: shadows are copied both ways, and the host
    computes nothing. There is no worker thread. The next call of any method completes an update
    that was interrupted (Ctrl-C). Not thread-safe.

    Args:
        shadows: on the CPU, pinned where the parameters are on a GPU (see `zeros`); nobody else
            may touch them before `flush`.
        params, slots: as for `HostOffload`.
        bind: the kernel, for tensors on the parameters' device.
        staging_bytes: size of all buffers on a device together; no larger than needed.

    Raises:
        ValueError: ``staging_bytes`` is too small.
    """

    name = "device_offload"

    def __init__(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        bind: kernels.Bind,
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        limit = half_of(staging_bytes)
        by_device: dict[torch.device, list[int]] = {}
        for i, param in enumerate(params):
            by_device.setdefault(param.device, []).append(i)
        self._copies: list[CopyStreams] = []
        self._batches: list[Chunk] = []
        self.nbytes = 0  # on all devices
        with writable():
            for device, mine in by_device.items():
                copies = CopyStreams(device, streams=2)
                # one pair a piece: nothing is saved by keeping the averages of one together
                pieces = [
                    piece
                    for i in mine
                    for piece in cut_pairs(
                        [shadows[i]], [params[i]], [slots[i]], lambda s, _: limit // 2 // s.itemsize
                    )
                ]
                packed = pack(pieces, chunk_bytes, limit)
                sizes = buffer_sizes(packed, chunk_bytes)
                # on the streams that use it: what is freed too early is then used again in order
                buffers = []
                for k, size in enumerate(sizes):
                    with copies.stream(k):
                        buffers.append(torch.empty(size, dtype=torch.uint8, device=device))
                for k, batch in enumerate(packed):
                    with copies.stream(k % 2):
                        self._batches.append(make_chunk(batch, k % 2, buffers[k % 2], copies, bind))
                self._copies.append(copies)
                self.nbytes += sum(sizes)
        self._closed = False
        self._error: Exception | None = None
        # what is left of the update: weights, the batch, and whether that is averaged already
        self._left: tuple[Sequence[float], int, bool] = ((), len(self._batches), False)

    def __call__(self, weights: Sequence[float]) -> None:
        """Starts an update; on a GPU it returns before that is done.

        Raises:
            RuntimeError: this update or one before failed, or the object is closed.
        """
        self._go_on()
        if self._closed:
            _raise_closed()
        for copies in self._copies:
            copies.begin()
        self._left = (tuple(weights), 0, False)
        self._go_on()

    def await_reads(self) -> None:
        """Returns when the parameters may be changed; on a GPU the current stream waits.

        Raises:
            RuntimeError: an update failed.
        """
        self._go_on()
        for copies in self._copies:
            copies.block_current_stream()

    def flush(self) -> None:
        """Returns when the averages are up to date. After an interrupt it may be called again.

        Raises:
            RuntimeError: an update failed.
        """
        self._go_on()
        try:
            for copies in self._copies:
                copies.finish()
        except Exception as error:
            self._error = error
            _raise_failed(error)

    def close(self) -> None:
        """Waits for the update that runs, and frees the buffers. Raises no error of an update."""
        if self._error is None and not self._closed:
            with contextlib.suppress(RuntimeError):
                self.flush()
        self._closed = True
        self._batches.clear()

    def _go_on(self) -> None:
        """Does what is left. What is done is noted after it, and doing it twice does no harm.

        A batch that is averaged in its chunk, and not noted so, is brought in again; one that was
        carried back, and not noted so, is carried back again.
        """
        if self._error is not None:
            _raise_failed(self._error)
        try:
            with writable():
                while self._left[1] < len(self._batches):
                    weights, k, averaged = self._left
                    batch = self._batches[k]
                    if any(weights[slot] for slot in batch.slots):
                        with batch.copies.stream(batch.buffer):
                            if not averaged:
                                batch.average(weights)
                                self._left = (weights, k, True)
                            batch.carry_back()
                    self._left = (weights, k + 1, False)
        except Exception as error:
            self._error = error
            _raise_failed(error)


# ---- the worker ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Update:
    """One update on its way."""

    weights: tuple[float, ...]
    started: bool = False
    reads_issued: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Work:
    """What the worker thread shares with the object that it works for."""

    batches: list[Staged]
    # a SimpleQueue may be put into from a finalizer, whatever that interrupts
    queue: queue.SimpleQueue[_Update | None] = field(default_factory=queue.SimpleQueue)
    pid: int = field(default_factory=os.getpid)
    given_up: bool = False
    error: BaseException | None = None


def _serve(work: _Work) -> None:
    """The worker thread. After an error it starts no update: the averages may be half updated."""
    with writable():
        while (update := work.queue.get()) is not None:
            if update.started:  # put twice
                continue
            update.started = True
            try:
                if work.error is None:
                    _average(work, update)
            except BaseException as error:  # whatever it is, the caller must see it
                work.error = error
            finally:
                update.reads_issued.set()
                update.done.set()


def _average(work: _Work, update: _Update) -> None:
    """One update. The copies of a batch are issued before the batch ahead of it is averaged."""
    if not work.batches or not any(update.weights):
        return
    work.batches[0].copy()
    for k, batch in enumerate(work.batches):
        if k + 1 < len(work.batches):
            work.batches[k + 1].copy()  # into the other buffer, which batch k - 1 has left
        else:
            update.reads_issued.set()
        if work.given_up:
            return
        batch.copies.wait(batch.buffer)
        batch.lerp_(update.weights)


def _stop(work: _Work, thread: threading.Thread) -> None:
    """Ends the thread, after the batch that it is at. Runs at a collection and at exit too."""
    if os.getpid() != work.pid:
        return  # a forked child has no such thread
    work.given_up = True
    work.queue.put(None)
    # A thread that computes while the interpreter goes may crash it; one that waits for a GPU that
    # hangs must not hang the exit. The collector may run in the worker itself.
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)


def _raise_failed(error: BaseException) -> NoReturn:
    raise RuntimeError(
        f"an update of offloaded averages failed: {type(error).__name__}: {error}; they may be "
        "half updated: ema.reset() them to the weights, or ema.load() a checkpoint (before "
        "dcp.load call ema.reset())"
    ) from error


def _raise_closed() -> NoReturn:
    raise RuntimeError("an update of offloaded averages after close(); build a new object")
