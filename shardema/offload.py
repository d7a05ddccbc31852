"""Averages in host memory of parameters on a device, updated behind the training step.

::

    Background    device   params ---.              .---> params         a side stream
                  host               '-> staging ---'                    two pinned buffers
                  host                   lerp_(shadows, staging)         a worker thread

    Travelling    host     shadows --.               .--> shadows        pinned
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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from shardema import kernels
from shardema.shadows import writable
from shardema.shard import aligned_parts, dense_like

STAGING_BYTES = 512 << 20  # both buffers together

_ALIGN = 64  # bytes
_PATIENCE = 10.0  # seconds that the end of a process waits for a worker that does not stop


def zeros(numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A flat tensor in host memory; pinned, it can travel to a GPU behind the host's back.

    torch rounds a pinned block up to a power of two: 20 GiB take 32.
    """
    return torch.zeros(numel, dtype=dtype, device="cpu", pin_memory=pinned)


class Background:
    """Averages that lie in host memory, kept by a worker thread: at most one update behind.

    A parameter that stands among ``params`` several times, once for each of its averages, is
    copied once. To be used from one thread at a time.

    Args:
        shadows: on the CPU, of any dense strides; nobody else may touch them before `flush`.
        params: of the same shapes, on any devices.
        slots: which of the weights each pair moves by.
        bind: the kernel, for tensors on the CPU.
        staging_bytes: size of the two buffers together; they are pinned if a parameter lies on a
            GPU, and no larger than needed.

    Raises:
        ValueError: ``staging_bytes`` is too small.
    """

    def __init__(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        bind: kernels.Bind,
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        limit = _half(staging_bytes)
        with writable():
            pieces = _pieces(shadows, params, slots, lambda _, p: limit // p.itemsize)
            packed = _packed(pieces, lambda piece: piece.param.nbytes, limit)
            pinned = any(param.device.type == "cuda" for param in params)
            sizes = _sizes(packed, lambda piece: piece.param.nbytes)
            staging = [zeros(size, torch.uint8, pinned=pinned) for size in sizes]
            self._lanes = {p.param.device: _Lane(p.param.device, streams=1) for p in pieces}
            batches = [
                _staged(batch, k % 2, staging[k % 2], self._lanes[batch[0][1].param.device], bind)
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
        for lane in self._lanes.values():
            lane.begin()
        # In this order: an interrupt in between leaves an update that `flush` puts once more.
        self._update = _Update(tuple(weights))
        self._work.queue.put(self._update)

    def copied(self) -> None:
        """Returns when the parameters may be changed.

        On a GPU the current stream waits for the last copy; the host only until that was issued.

        Raises:
            RuntimeError: an update failed.
        """
        if self._update is not None:
            self._wait(self._update, self._update.copied)
        self._check()
        for lane in self._lanes.values():
            lane.hold_back()

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


class Travelling:
    """Averages that lie in host memory and are computed on the parameters' device.

    For a host that is too slow for `Background`: more travels, and the host computes nothing.
    There is no thread. An update that is interrupted (Ctrl-C) is carried on with by the next call
    of any method. To be used from one thread at a time.

    Args:
        shadows: on the CPU, pinned where the parameters lie on a GPU (see `zeros`); nobody else
            may touch them before `flush`.
        params, slots: as for `Background`.
        bind: the kernel, for tensors on the parameters' device.
        staging_bytes: size of all buffers on a device together; no larger than needed.

    Raises:
        ValueError: ``staging_bytes`` is too small.
    """

    def __init__(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        bind: kernels.Bind,
        *,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        limit = _half(staging_bytes)
        by_device: dict[torch.device, list[int]] = {}
        for i, param in enumerate(params):
            by_device.setdefault(param.device, []).append(i)
        self._lanes: list[_Lane] = []
        self._batches: list[_Chunk] = []
        self.nbytes = 0  # on all devices
        with writable():
            for device, mine in by_device.items():
                lane = _Lane(device, streams=2)
                # one pair a piece: nothing is saved by keeping the averages of one together
                pieces = [
                    piece
                    for i in mine
                    for piece in _pieces(
                        [shadows[i]], [params[i]], [slots[i]], lambda s, _: limit // 2 // s.itemsize
                    )
                ]
                packed = _packed(pieces, _chunk_bytes, limit)
                sizes = _sizes(packed, _chunk_bytes)
                # on the streams that use it: what is freed too early is then used again in order
                buffers = []
                for k, size in enumerate(sizes):
                    with lane.stream(k):
                        buffers.append(torch.empty(size, dtype=torch.uint8, device=device))
                for k, batch in enumerate(packed):
                    with lane.stream(k % 2):
                        self._batches.append(_chunk(batch, k % 2, buffers[k % 2], lane, bind))
                self._lanes.append(lane)
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
        for lane in self._lanes:
            lane.begin()
        self._left = (tuple(weights), 0, False)
        self._go_on()

    def copied(self) -> None:
        """Returns when the parameters may be changed; on a GPU the current stream waits.

        Raises:
            RuntimeError: an update failed.
        """
        self._go_on()
        for lane in self._lanes:
            lane.hold_back()

    def flush(self) -> None:
        """Returns when the averages are up to date. After an interrupt it may be called again.

        Raises:
            RuntimeError: an update failed.
        """
        self._go_on()
        try:
            for lane in self._lanes:
                lane.finish()
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
                        with batch.lane.stream(batch.buffer):
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
    copied: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Work:
    """What the worker thread shares with the object that it works for."""

    batches: list[_Staged]
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
                update.copied.set()
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
            update.copied.set()
        if work.given_up:
            return
        batch.lane.wait(batch.buffer)
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


# ---- streams ------------------------------------------------------------------------------------


class _Lane:
    """The way between the host and one device: side streams that the buffers take turns on.

    Only a GPU has streams; elsewhere a copy is done when it returns, and there is none to wait for.
    """

    def __init__(self, device: torch.device, streams: int) -> None:
        self.device = device
        self.streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self.streams = [
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                for _ in range(streams)
            ]
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # blocking: the worker sleeps, and leaves its core to the training loop
            self._passed = [
                torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]

    def begin(self) -> None:
        """What the caller's stream was given so far comes before what these streams are given."""
        if self.streams:
            self._ready.record(torch.cuda.current_stream(self.device))
            for stream in self.streams:
                stream.wait_event(self._ready)

    def _stream(self, buffer: int) -> torch.cuda.Stream:
        return self.streams[buffer % len(self.streams)]

    def stream(self, buffer: int) -> contextlib.AbstractContextManager[object]:
        """Inside, operations go to the stream of this buffer."""
        if self.streams:
            return torch.cuda.stream(self._stream(buffer))
        return contextlib.nullcontext()

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copies on the current stream; returns before that is done where there is a stream."""
        torch._foreach_copy_(targets, sources, non_blocking=bool(self.streams))

    def mark(self, buffer: int) -> None:
        """The stream of this buffer has read the parameters when it gets here."""
        if self.streams:
            self._passed[buffer].record(self._stream(buffer))

    def wait(self, buffer: int) -> None:
        """The host waits for the last mark of this buffer."""
        if self.streams:
            self._passed[buffer].synchronize()

    def hold_back(self) -> None:
        """The caller's stream waits for the last mark of each buffer; the host does not."""
        if self.streams:
            for event in self._passed:
                torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """The host waits for all that these streams were given."""
        for stream in self.streams:
            stream.synchronize()


# ---- batches ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """A part of a parameter, and the same part of each of its averages."""

    param: Tensor
    shadows: list[Tensor]
    slots: list[int]


@dataclass(frozen=True, eq=False)
class _Staged:
    """A batch of `Background`: ``lerp_`` reads the staging."""

    lane: _Lane
    buffer: int
    staging: list[Tensor]
    params: list[Tensor]
    lerp_: kernels.Lerp

    def copy(self) -> None:
        with self.lane.stream(self.buffer):
            self.lane.copy(self.staging, self.params)
            self.lane.mark(self.buffer)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A batch of `Travelling`: ``lerp_`` writes the chunks."""

    lane: _Lane
    buffer: int
    chunks: list[Tensor]
    shadows: list[Tensor]
    converted: list[Tensor]  # of the parameters that are not laid out as their shadow is
    params: list[Tensor]
    slots: frozenset[int]
    lerp_: kernels.Lerp

    def average(self, weights: Sequence[float]) -> None:
        self.lane.copy(self.chunks, self.shadows)
        if self.converted:
            torch._foreach_copy_(self.converted, self.params)
        self.lerp_(weights)
        self.lane.mark(self.buffer)

    def carry_back(self) -> None:
        self.lane.copy(self.shadows, self.chunks)


_Packed = list[list[tuple[int, _Piece]]]  # batches of pieces, each with its start in the buffer


def _half(staging_bytes: int) -> int:
    """Size of one of two buffers."""
    if staging_bytes < 4 * _ALIGN:
        raise ValueError(f"staging_bytes: got {staging_bytes}, expected {4 * _ALIGN} or more")
    return staging_bytes // (4 * _ALIGN) * (2 * _ALIGN)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _pieces(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    numel: Callable[[Tensor, Tensor], int],
) -> list[_Piece]:
    """Parts of at most ``numel(shadow, param)`` elements, device by device, empty ones left out."""
    groups: dict[object, list[int]] = {}
    for i, (shadow, param, _) in enumerate(zip(shadows, params, slots, strict=True)):
        # the averages of one parameter, where they are cut alike
        key = (param.data_ptr(), param.shape, param.stride(), shadow.stride())
        groups.setdefault(key, []).append(i)
    pieces = []
    for group in sorted(groups.values(), key=lambda group: str(params[group[0]].device)):
        param = params[group[0]]
        size = min(numel(shadows[i], param) for i in group)
        cut = [aligned_parts(shadows[i], param, size) for i in group]
        for parts in zip(*cut, strict=True):
            mine = [shadow for shadow, _ in parts]
            pieces.append(_Piece(parts[0][1], mine, [slots[i] for i in group]))
    return pieces


def _packed(pieces: Iterable[_Piece], nbytes: Callable[[_Piece], int], limit: int) -> _Packed:
    """Batches that each fill a buffer of ``limit`` bytes and are of one device."""
    batches: _Packed = []
    used = limit
    for piece in pieces:
        size = _aligned(nbytes(piece))
        if used + size > limit or batches[-1][0][1].param.device != piece.param.device:
            batches.append([])
            used = 0
        batches[-1].append((used, piece))
        used += size
    return batches


def _sizes(packed: _Packed, nbytes: Callable[[_Piece], int]) -> list[int]:
    """How large each of the two buffers must be."""
    ends = [batch[-1][0] + _aligned(nbytes(batch[-1][1])) for batch in packed]
    return [max(ends[k::2], default=0) for k in range(2)]


def _view(buffer: Tensor, start: int, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a ``dtype`` copy of ``part`` at byte ``start``, dense and in its memory order."""
    flat = buffer.narrow(0, start, part.numel() * dtype.itemsize).view(dtype)
    return flat.as_strided(part.shape, dense_like(part))


def _staged(
    batch: list[tuple[int, _Piece]], k: int, buffer: Tensor, lane: _Lane, bind: kernels.Bind
) -> _Staged:
    staging = [_view(buffer, at, piece.shadows[0], piece.param.dtype) for at, piece in batch]
    read = [(s, piece) for s, (_, piece) in zip(staging, batch, strict=True)]
    lerp_ = bind(
        [shadow for _, piece in batch for shadow in piece.shadows],
        [s for s, piece in read for _ in piece.shadows],
        [slot for _, piece in batch for slot in piece.slots],
    )
    return _Staged(lane, k, staging, [piece.param for _, piece in batch], lerp_)


def _alike(piece: _Piece) -> bool:
    """Whether the parameter lies as its chunk will, so that every kernel takes it as it is."""
    shadow = piece.shadows[0]
    return shadow.dtype == piece.param.dtype and dense_like(shadow) == piece.param.stride()


def _chunk_bytes(piece: _Piece) -> int:
    """Of the chunk and, after it, of the converted parameter.

    Not left to the kernel: it would take scratch for each batch anew.
    """
    size = _aligned(piece.shadows[0].nbytes)
    return size if _alike(piece) else 2 * size


def _chunk(
    batch: list[tuple[int, _Piece]], k: int, buffer: Tensor, lane: _Lane, bind: kernels.Bind
) -> _Chunk:
    shadows = [piece.shadows[0] for _, piece in batch]
    slots = [piece.slots[0] for _, piece in batch]
    chunks, sources, converted, params = [], [], [], []
    for at, piece in batch:
        shadow, source = piece.shadows[0], piece.param
        chunks.append(_view(buffer, at, shadow, shadow.dtype))
        if not _alike(piece):
            params.append(source)
            source = _view(buffer, at + _aligned(shadow.nbytes), shadow, shadow.dtype)
            converted.append(source)
        sources.append(source)
    lerp_ = bind(chunks, sources, slots)
    return _Chunk(lane, k, chunks, shadows, converted, params, frozenset(slots), lerp_)
