"""Staging buffers for copies between host and device: streams, and batches that fill a buffer.

::

    pairs  -cut_pairs->  pieces     parts of a parameter and of its averages
    pieces -pack->       batches    each fills one of two buffers
    batch  -make_host_batch->           parameters copied to the host, averaged there
           -make_device_batch->            averages copied to the device, averaged there, and back
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema import kernels
from shardema.errors import ArgumentError
from shardema.kernels import rounding
from shardema.kernels.rounding import Compensated, Rounding, Stochastic
from shardema.shards.strides import dense_like

_ALIGN = 64  # bytes


def zeros(numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A flat tensor in host memory; pinned, it can be copied to a GPU asynchronously.

    torch rounds pinned memory up to a power of two: 20 GiB use 32 GiB.
    """
    return torch.zeros(numel, dtype=dtype, device="cpu", pin_memory=pinned)


class CopyStreams:
    """Side streams for copies between the host and one device; buffers alternate between them.

    Only a GPU has streams; on other devices a copy is complete when it returns.
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
            # blocking: a waiting worker sleeps, so that its core is free for the training loop
            self._passed = [
                torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            ]

    def make_current(self) -> None:
        """Makes the device the current one of the calling thread.

        A new thread has the first GPU. It would return there from a stream of another one, and so
        create a context on it, of about 0.5 GB.
        """
        if self.streams:
            torch.cuda.set_device(self.device)

    def begin(self) -> None:
        """Side streams wait for the work queued on the caller's stream so far."""
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
        """Copies on the current stream; asynchronous if there are streams."""
        torch._foreach_copy_(targets, sources, non_blocking=bool(self.streams))

    def mark(self, buffer: int) -> None:
        """Records an event on this buffer's stream: its reads of the parameters precede it."""
        if self.streams:
            self._passed[buffer].record(self._stream(buffer))

    def wait(self, buffer: int) -> None:
        """The host waits for the last mark of this buffer."""
        if self.streams:
            self._passed[buffer].synchronize()

    def block_current_stream(self) -> None:
        """The caller's stream waits for the last mark of each buffer; the host does not."""
        if self.streams:
            for event in self._passed:
                torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """The host waits for all work queued on these streams."""
        for stream in self.streams:
            stream.synchronize()


# ---- batches ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """A part of a parameter, and the same part of each of its averages."""

    param: Tensor
    shadows: list[Tensor]
    slots: list[int]
    roundings: list[Rounding | None]


@dataclass(frozen=True, eq=False)
class HostBatch:
    """A batch of `HostOffload`: parameters are copied to ``staging``, which ``lerp_`` reads."""

    copies: CopyStreams
    buffer: int
    staging: list[Tensor]
    params: list[Tensor]
    lerp_: kernels.Lerp

    def copy(self) -> None:
        with self.copies.stream(self.buffer):
            self.copies.copy(self.staging, self.params)
            self.copies.mark(self.buffer)


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A batch of `DeviceOffload`: shadows are copied to ``chunks``, which ``lerp_`` writes.

    After all shadows come the companions of those that have any.
    """

    copies: CopyStreams
    buffer: int
    chunks: list[Tensor]
    shadows: list[Tensor]
    converted: list[Tensor]  # parameters as the kernel reads them without a scratch
    params: list[Tensor]
    slots: frozenset[int]
    lerp_: kernels.Lerp

    def average(self, weights: Sequence[float]) -> None:
        self.copies.copy(self.chunks, self.shadows)
        if self.converted:
            torch._foreach_copy_(self.converted, self.params)
        self.lerp_(weights)
        self.copies.mark(self.buffer)

    def copy_back(self) -> None:
        self.copies.copy(self.shadows, self.chunks)


_Packed = list[list[tuple[int, ParamSlice]]]  # batches of pieces, each with its start in the buffer


def buffer_bytes(staging_bytes: int) -> int:
    """Size in bytes of each of the two buffers, aligned. Raises ValueError if it is too small."""
    if staging_bytes < 4 * _ALIGN:
        raise ArgumentError(f"staging_bytes: got {staging_bytes}, expected {4 * _ALIGN} or more")
    return staging_bytes // (4 * _ALIGN) * (2 * _ALIGN)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def cut_pairs(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    numel: Callable[[Tensor, Tensor], int],
    roundings: Sequence[Rounding | None] = (),
) -> list[ParamSlice]:
    """Parts of at most ``numel(shadow, param)`` elements, device by device; none is empty."""
    how = roundings or [None] * len(shadows)
    groups: dict[object, list[int]] = {}
    for i, (shadow, param, _) in enumerate(zip(shadows, params, slots, strict=True)):
        # averages of one parameter with equal strides are cut in the same places
        by_box = isinstance(how[i], Stochastic)
        key = (param.data_ptr(), param.shape, param.stride(), shadow.stride(), by_box)
        groups.setdefault(key, []).append(i)
    pieces = []
    for group in sorted(groups.values(), key=lambda group: str(params[group[0]].device)):
        param = params[group[0]]
        size = min(numel(shadows[i], param) for i in group)
        cut = [rounding.parts(shadows[i], param, how[i], size) for i in group]
        for parts in zip(*cut, strict=True):
            cut_shadows = [shadow for shadow, _, _ in parts]
            here, stored = [slots[i] for i in group], [one for _, _, one in parts]
            pieces.append(ParamSlice(parts[0][1], cut_shadows, here, stored))
    return pieces


def pack(pieces: Iterable[ParamSlice], nbytes: Callable[[ParamSlice], int], limit: int) -> _Packed:
    """Batches of at most ``limit`` bytes, each of one device."""
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


def buffer_sizes(packed: _Packed, nbytes: Callable[[ParamSlice], int]) -> list[int]:
    """Required size in bytes of each of the two buffers."""
    ends = [batch[-1][0] + _aligned(nbytes(batch[-1][1])) for batch in packed]
    return [max(ends[k::2], default=0) for k in range(2)]


def _view(buffer: Tensor, start: int, part: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of ``buffer`` at byte ``start`` for a dense ``dtype`` copy of ``part``."""
    flat = buffer.narrow(0, start, part.numel() * dtype.itemsize).view(dtype)
    return flat.as_strided(part.shape, dense_like(part))


def make_host_batch(
    batch: list[tuple[int, ParamSlice]],
    k: int,
    buffer: Tensor,
    copies: CopyStreams,
    bind: kernels.Bind,
) -> HostBatch:
    staging = [_view(buffer, at, piece.shadows[0], piece.param.dtype) for at, piece in batch]
    read = [(s, piece) for s, (_, piece) in zip(staging, batch, strict=True)]
    lerp_ = bind(
        [shadow for _, piece in batch for shadow in piece.shadows],
        [s for s, piece in read for _ in piece.shadows],
        [slot for _, piece in batch for slot in piece.slots],
        [stored for _, piece in batch for stored in piece.roundings],
    )
    return HostBatch(copies, k, staging, [piece.param for _, piece in batch], lerp_)


def _converted(piece: ParamSlice) -> torch.dtype | None:
    """The dtype that a parameter is converted to on the device; None if it is read as it is.

    A kernel would allocate scratch for every batch to convert it. With a rounding it is never
    rounded to the dtype of the shadow.
    """
    shadow, param = piece.shadows[0], piece.param
    dtype = shadow.dtype if piece.roundings[0] is None else param.dtype
    alike = dtype == param.dtype and dense_like(shadow) == param.stride()
    return None if alike else dtype


def chunk_bytes(piece: ParamSlice) -> int:
    """Bytes of the chunk and, after it, of the converted parameter and of the companion, if any."""
    shadow, dtype, stored = piece.shadows[0], _converted(piece), piece.roundings[0]
    converted = 0 if dtype is None else _aligned(shadow.numel() * dtype.itemsize)
    lost = _aligned(stored.companion.nbytes) if isinstance(stored, Compensated) else 0
    return _aligned(shadow.nbytes) + converted + lost


def chunk_numel(limit: int, stored: Rounding | None) -> Callable[[Tensor, Tensor], int]:
    """A function: the elements of a pair whose chunks have at most ``limit`` bytes."""
    if stored is None:
        return lambda shadow, _: limit // 2 // shadow.itemsize
    return lambda shadow, param: limit // 3 // max(shadow.itemsize, param.itemsize)


def make_device_batch(
    batch: list[tuple[int, ParamSlice]],
    k: int,
    buffer: Tensor,
    copies: CopyStreams,
    bind: kernels.Bind,
) -> DeviceBatch:
    shadows = [piece.shadows[0] for _, piece in batch]
    slots = [piece.slots[0] for _, piece in batch]
    chunks, sources, converted, params = [], [], [], []
    roundings, lost = [], []
    for at, piece in batch:
        shadow, source, stored = piece.shadows[0], piece.param, piece.roundings[0]
        chunks.append(_view(buffer, at, shadow, shadow.dtype))
        at += _aligned(shadow.nbytes)
        dtype = _converted(piece)
        if dtype is not None:
            params.append(source)
            source = _view(buffer, at, shadow, dtype)
            converted.append(source)
            at += _aligned(source.nbytes)
        sources.append(source)
        if isinstance(stored, Compensated):
            lost.append(stored.companion)
            stored = Compensated(_view(buffer, at, shadow, torch.int16))
        roundings.append(stored)
    lerp_ = bind(list(chunks), sources, slots, roundings)
    shadows += lost
    chunks += [one.companion for one in roundings if isinstance(one, Compensated)]
    return DeviceBatch(copies, k, chunks, shadows, converted, params, frozenset(slots), lerp_)
