"""Averages in host memory of parameters on a device, updated in the background.

::

    HostOffload    device   params ---.              .---> params         a side stream
                   host               '-> staging ---'                    two pinned buffers
                   host                   lerp_(shadows, staging)         a worker thread

    DeviceOffload  host     shadows --.               .--> shadows        pinned
                   device             '-> chunk ------'                   two buffers, a stream each
                   device                 lerp_(chunk, params)

Both split the parameters into batches that each fill one buffer, and bind the kernel to every batch
once, so that an update plans and allocates nothing. While one buffer is averaged the other one is
copied. On a CPU the same code runs, without streams and without pinning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from shardema import kernels
from shardema.errors import CallError
from shardema.kernels.rounding import Rounding
from shardema.scopes import writable
from shardema.update.staging import (
    CopyStreams,
    DeviceBatch,
    HostBatch,
    buffer_bytes,
    buffer_sizes,
    chunk_bytes,
    chunk_numel,
    cut_pairs,
    make_device_batch,
    make_host_batch,
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
        shadows: on the CPU, of any dense strides; must not be accessed before `flush`.
        params: of the same shapes, on any devices.
        slots: for each pair, the index of its weight.
        bind: the kernel, for tensors on the CPU.
        roundings: for each pair, how its shadow is stored.
        staging_bytes: size of both buffers together, in bytes; they are pinned if a parameter is
            on a GPU, and no larger than needed.
        detach: called by the thread in each update, before it changes the first shadow.

    Raises:
        ValueError: ``staging_bytes`` is too small.
    """

    name = "host_offload"  # in `Updater.kernel_names`

    def __init__(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        bind: kernels.Bind,
        roundings: Sequence[Rounding | None] = (),
        *,
        staging_bytes: int = STAGING_BYTES,
        detach: Callable[[], None] = lambda: None,
    ) -> None:
        limit = buffer_bytes(staging_bytes)
        with writable():
            pieces = cut_pairs(shadows, params, slots, lambda _, p: limit // p.itemsize, roundings)
            packed = pack(pieces, lambda piece: piece.param.nbytes, limit)
            pinned = any(param.device.type == "cuda" for param in params)
            sizes = buffer_sizes(packed, lambda piece: piece.param.nbytes)
            staging = [zeros(size, torch.uint8, pinned=pinned) for size in sizes]
            self._copies = {p.param.device: CopyStreams(p.param.device, streams=1) for p in pieces}
            batches = [
                make_host_batch(
                    batch, k % 2, staging[k % 2], self._copies[batch[0][1].param.device], bind
                )
                for k, batch in enumerate(packed)
            ]
        self.nbytes: int = sum(sizes)
        self._update: _Update | None = None
        self._work = _Work(batches, detach)
        # the thread has no reference to this object: else it could not be collected
        thread = threading.Thread(
            target=_serve, args=(self._work,), name="shardema-offload", daemon=True
        )
        self._end = weakref.finalize(self, _stop, self._work, thread)
        thread.start()

    def __call__(self, weights: Sequence[float]) -> None:
        """Starts an update and returns; waits first for the previous one.

        Raises:
            RuntimeError: an update failed, or the object is closed.
        """
        self.flush()
        self._here()
        if not self._end.alive:
            _raise_closed()
        for copies in self._copies.values():
            copies.begin()
        # in this order: after an interrupt in between, `_wait` puts the update again
        self._update = _Update(tuple(weights))
        self._work.queue.put(self._update)

    def await_reads(self) -> None:
        """Returns when the parameters may be modified.

        On a GPU the current stream waits for the last copy; the host only until it was issued.

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
        """Ends the worker after the current update, and frees the staging buffers.

        Does not raise errors of the worker. If the object is collected, or alive when the
        interpreter exits, the current update is abandoned.
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
            self._work.queue.put(update)  # an interrupt may have come before: see __call__
        event.wait()

    def _here(self) -> None:
        if os.getpid() != self._work.pid:
            raise CallError(
                "offloaded averages are updated in the process that this one was forked from; "
                "update and read them there"
            )

    def _check(self) -> None:
        if self._work.error is not None:
            _raise_failed(self._work.error)


class DeviceOffload:
    """Updates averages in host memory on the device of the parameters.

    For a host that is too slow for `HostOffload`: shadows are copied to the device and back, and
    the host computes nothing. There is no worker thread. The next call of any method completes an
    update that was interrupted (Ctrl-C). Not thread-safe.

    Args:
        shadows: on the CPU, pinned if the parameters are on a GPU (see `zeros`); must not be
            accessed before `flush`.
        params, slots, roundings: as for `HostOffload`.
        bind: the kernel, for tensors on the parameters' device.
        staging_bytes: size of all buffers on a device together, in bytes; no larger than needed.

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
        roundings: Sequence[Rounding | None] = (),
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        limit = buffer_bytes(staging_bytes)
        how = roundings or [None] * len(shadows)
        by_device: dict[torch.device, list[int]] = {}
        for i, param in enumerate(params):
            by_device.setdefault(param.device, []).append(i)
        self._copies: list[CopyStreams] = []
        self._batches: list[DeviceBatch] = []
        self.nbytes: int = 0  # on all devices
        with writable():
            for device, mine in by_device.items():
                copies = CopyStreams(device, streams=2)
                # each pair is cut alone: every average of a parameter is copied anyway
                pieces = [
                    piece
                    for i in mine
                    for piece in cut_pairs(
                        [shadows[i]], [params[i]], [slots[i]], chunk_numel(limit, how[i]), [how[i]]
                    )
                ]
                packed = pack(pieces, chunk_bytes, limit)
                sizes = buffer_sizes(packed, chunk_bytes)
                # allocated on the streams that use them, so that freed memory is reused in order
                buffers = []
                for k, size in enumerate(sizes):
                    with copies.stream(k):
                        buffers.append(torch.empty(size, dtype=torch.uint8, device=device))
                for k, batch in enumerate(packed):
                    with copies.stream(k % 2):
                        self._batches.append(
                            make_device_batch(batch, k % 2, buffers[k % 2], copies, bind)
                        )
                self._copies.append(copies)
                self.nbytes += sum(sizes)
        self._closed = False
        self._error: Exception | None = None
        # the rest of the update: weights, the next batch, and whether it is averaged already
        self._left: tuple[Sequence[float], int, bool] = ((), len(self._batches), False)

    def __call__(self, weights: Sequence[float]) -> None:
        """Starts an update; on a GPU it returns before the update is complete.

        Raises:
            RuntimeError: this update or an earlier one failed, or the object is closed.
        """
        self._go_on()
        if self._closed:
            _raise_closed()
        for copies in self._copies:
            copies.begin()
        self._left = (tuple(weights), 0, False)
        self._go_on()

    def await_reads(self) -> None:
        """Returns when the parameters may be modified; on a GPU the current stream waits.

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
        """Waits for the current update, and frees the buffers. Does not raise errors of updates."""
        if self._error is None and not self._closed:
            with contextlib.suppress(RuntimeError):
                self.flush()
        self._closed = True
        self._batches.clear()

    def _go_on(self) -> None:
        """Completes the update. Each step is recorded after it is done, and may run twice.

        A batch that was averaged, but not recorded so, is copied to the device and averaged again;
        one that was copied back, but not recorded so, is copied back again.
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
                            batch.copy_back()
                    self._left = (weights, k + 1, False)
        except Exception as error:
            self._error = error
            _raise_failed(error)


# ---- the worker ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Update:
    """An update of the worker."""

    weights: tuple[float, ...]
    started: bool = False
    reads_issued: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Work:
    """The state that the worker thread and `HostOffload` share."""

    batches: list[HostBatch]
    detach: Callable[[], None]
    # the put of a SimpleQueue is reentrant, so a finalizer may call it
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
    """One update: the copies of a batch are issued before the previous batch is averaged."""
    if not work.batches or not any(update.weights):
        return
    work.batches[0].copies.make_current()
    work.batches[0].copy()
    for k, batch in enumerate(work.batches):
        if k + 1 < len(work.batches):
            work.batches[k + 1].copy()  # into the other buffer, after batch k - 1
        else:
            update.reads_issued.set()
        if work.given_up:
            return
        if k == 0:
            work.detach()
        batch.copies.wait(batch.buffer)
        batch.lerp_(update.weights)


def _stop(work: _Work, thread: threading.Thread) -> None:
    """Ends the thread after its current batch. Also called by the collector and at exit."""
    if os.getpid() != work.pid:
        return  # a forked child has no such thread
    work.given_up = True
    work.queue.put(None)
    # A thread that computes during interpreter shutdown may crash it, so it is joined; a hanging
    # GPU must not block the exit, hence the timeout. The collector may run in the worker itself.
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)


def _raise_failed(error: BaseException) -> NoReturn:
    raise CallError(
        f"an update of offloaded averages failed: {type(error).__name__}: {error}; they may be "
        "partly updated: ema.reset() them to the weights, or ema.load() a checkpoint (before "
        "dcp.load call ema.reset())"
    ) from error


def _raise_closed() -> NoReturn:
    raise CallError("update of offloaded averages after close(); build a new EMA")
