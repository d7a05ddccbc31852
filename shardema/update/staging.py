"""The buffers that weights or averages travel through: streams, and batches that each fill one.

::

    pairs  -cut_pairs->  pieces     stretches of a parameter and of its averages
    pieces -pack->       batches    each fills one of two buffers
    batch  -make_staged->           parameters copied to the host, averaged there
           -make_chunk->            averages copied to the device, averaged there, and back
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema import kernels
from shardema.shards.strides import aligned_parts, dense_like

_ALIGN = 64  # bytes


def zeros(numel: int, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """A flat tensor in host memory; pinned, it can travel to a GPU behind the host's back.

    torch rounds a pinned block up to a power of two: 20 GiB take 32.
    """
    return torch.zeros(numel, dtype=dtype, device="cpu", pin_memory=pinned)


class CopyStreams:
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

    def block_current_stream(self) -> None:
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
class ParamSlice:
    """A part of a parameter, and the same part of each of its averages."""

    param: Tensor
    shadows: list[Tensor]
    slots: list[int]


@dataclass(frozen=True, eq=False)
class Staged:
    """A batch of `HostOffload`: ``lerp_`` reads the staging."""

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
class Chunk:
    """A batch of `DeviceOffload`: ``lerp_`` writes the chunks."""

    copies: CopyStreams
    buffer: int
    chunks: list[Tensor]
    shadows: list[Tensor]
    converted: list[Tensor]  # of the parameters that are not laid out as their shadow is
    params: list[Tensor]
    slots: frozenset[int]
    lerp_: kernels.Lerp

    def average(self, weights: Sequence[float]) -> None:
        self.copies.copy(self.chunks, self.shadows)
        if self.converted:
            torch._foreach_copy_(self.converted, self.params)
        self.lerp_(weights)
        self.copies.mark(self.buffer)

    def carry_back(self) -> None:
        self.copies.copy(self.shadows, self.chunks)


_Packed = list[list[tuple[int, ParamSlice]]]  # batches of pieces, each with its start in the buffer


def half_of(staging_bytes: int) -> int:
    """Size of one of two buffers."""
    if staging_bytes < 4 * _ALIGN:
        raise ValueError(f"staging_bytes: got {staging_bytes}, expected {4 * _ALIGN} or more")
    return staging_bytes // (4 * _ALIGN) * (2 * _ALIGN)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def cut_pairs(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    numel: Callable[[Tensor, Tensor], int],
) -> list[ParamSlice]:
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
            pieces.append(ParamSlice(parts[0][1], mine, [slots[i] for i in group]))
    return pieces


def pack(pieces: Iterable[ParamSlice], nbytes: Callable[[ParamSlice], int], limit: int) -> _Packed:
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


def buffer_sizes(packed: _Packed, nbytes: Callable[[ParamSlice], int]) -> list[int]:
    """How large each of the two buffers must be."""
    ends = [batch[-1][0] + _aligned(nbytes(batch[-1][1])) for batch in packed]
    return [max(ends[k::2], default=0) for k in range(2)]


def _view(buffer: Tensor, start: int, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a ``dtype`` copy of ``part`` at byte ``start``, dense and in its memory order."""
    flat = buffer.narrow(0, start, part.numel() * dtype.itemsize).view(dtype)
    return flat.as_strided(part.shape, dense_like(part))


def make_staged(
    batch: list[tuple[int, ParamSlice]],
    k: int,
    buffer: Tensor,
    copies: CopyStreams,
    bind: kernels.Bind,
) -> Staged:
    staging = [_view(buffer, at, piece.shadows[0], piece.param.dtype) for at, piece in batch]
    read = [(s, piece) for s, (_, piece) in zip(staging, batch, strict=True)]
    lerp_ = bind(
        [shadow for _, piece in batch for shadow in piece.shadows],
        [s for s, piece in read for _ in piece.shadows],
        [slot for _, piece in batch for slot in piece.slots],
    )
    return Staged(copies, k, staging, [piece.param for _, piece in batch], lerp_)


def _alike(piece: ParamSlice) -> bool:
    """Whether the parameter has the strides of its chunk: every kernel accepts it as it is."""
    shadow = piece.shadows[0]
    return shadow.dtype == piece.param.dtype and dense_like(shadow) == piece.param.stride()


def chunk_bytes(piece: ParamSlice) -> int:
    """Of the chunk and, after it, of the converted parameter.

    Not left to the kernel: it would take scratch for each batch anew.
    """
    size = _aligned(piece.shadows[0].nbytes)
    return size if _alike(piece) else 2 * size


def make_chunk(
    batch: list[tuple[int, ParamSlice]],
    k: int,
    buffer: Tensor,
    copies: CopyStreams,
    bind: kernels.Bind,
) -> Chunk:
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
    return Chunk(copies, k, chunks, shadows, converted, params, frozenset(slots), lerp_)
