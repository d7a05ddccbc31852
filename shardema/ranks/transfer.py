"""Gathers full tensors in bounded memory.

::

    Contents  -buckets->  buckets   boxes in the order of the tensors, at most 256 MiB
    bucket    -stream->   chunks    each owner sends its part, the leader receives

A rank sends only boxes that it owns; one of several replicas of a box is the owner. The leader
needs memory for its result and one bucket, the other ranks for one bucket.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from shardema.ranks.agree import Ranks
from shardema.ranks.messages import is_shared
from shardema.ranks.plan import Contents, Item, refuse_opaque
from shardema.shards.boxes import Box, split_box, whole

BUCKET_BYTES = 256 << 20
_ALIGN = 16  # bytes; alignment of the parts of a bucket, enough for any dtype


@dataclass(frozen=True, slots=True)
class TransferChunk:
    """A box of an item that is sent at once: ``owner`` is the index of the rank that sends it."""

    item: int
    box: Box
    owner: int


def buckets(contents: Contents, limit: int) -> Iterator[list[TransferChunk]]:
    """The boxes of the chosen items, in order, in groups of at most ``limit`` bytes."""
    plan = contents.plan
    bucket: list[TransferChunk] = []
    used = 0
    for index, item in zip(contents.chosen, contents.items, strict=True):
        itemsize = contents.dtype(item).itemsize
        for (box, _), owner in zip(item.holders, plan.readers(index), strict=True):
            for part in split_box(box, max(1, limit // itemsize)):
                size = -(-part.numel * itemsize // _ALIGN) * _ALIGN
                if bucket and used + size > limit:
                    yield bucket
                    bucket, used = [], 0
                bucket.append(TransferChunk(index, part, owner))
                used += size
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Prepared:
    """A stream whose buffers are allocated."""

    transfer: _Transfer
    groups: list[list[TransferChunk]]


def prepare(contents: Contents, *, limit: int, all_ranks: bool = False) -> Prepared:
    """Allocates the buffers for `stream`. Local, so that errors come before any transfer.

    Args:
        limit: bytes of a bucket.
        all_ranks: send the tensors to all ranks, not to the leader only.

    Raises:
        RankError: the process group is broken.
    """
    contents.ranks.check_whole("gathering")
    groups = list(buckets(contents, limit))
    transfer = _Transfer(contents, all_ranks)
    transfer.reserve(groups)
    return Prepared(transfer, groups)


def stream(prepared: Prepared, op: str) -> Generator[tuple[TransferChunk, Tensor]]:
    """Sends the items to the leader, bucket by bucket. Collective over the ranks.

    Every rank must exhaust or close the generator: a consumer that stops early still takes part in
    the remaining transfers, and so does a rank that fails. Before the last bucket is yielded the
    ranks agree that all of them have completed the transfers.

    Yields:
        A chunk and its values ``[*chunk.box.sizes]`` on the CPU, valid until the next iteration;
        only on ranks that receive.
    """
    chunks = _chunks(prepared, op)
    next(chunks)  # started, since closing a generator that never ran would transfer nothing
    return chunks


def _chunks(prepared: Prepared, op: str) -> Generator[tuple[TransferChunk, Tensor]]:
    """The generator of `stream`, after a dummy first item."""
    transfer, ranks = prepared.transfer, prepared.transfer.ranks
    failed: BaseException | None = None

    def finish() -> None:
        if failed is not None and not isinstance(failed, GeneratorExit):
            raise failed

    try:
        yield TransferChunk(-1, Box((), ()), -1), torch.empty(0)
    except BaseException as error:  # the consumer stopped; the transfers are still completed
        failed = error
    for number, bucket in enumerate(prepared.groups, 1):
        parts: list[Tensor] = []
        try:
            parts = transfer.move(bucket, op)
        except BaseException as error:
            if is_shared(error):
                raise
            failed = failed or error
        if number == len(prepared.groups):
            ranks.agree(f"{op} (finishing)", finish)
        if failed is None and transfer.receives:
            try:
                for chunk, part in zip(bucket, parts, strict=True):
                    transfer.beat()
                    yield chunk, part
            except BaseException as error:
                failed = error
    if not prepared.groups:
        ranks.agree(f"{op} (finishing)")
    if failed is not None:
        raise failed


class Iteration:
    """An open iteration over full tensors; the other ranks wait in its transfers.

    Attributes:
        ended_by: the call that ended it before its last tensor.
    """

    def __init__(self, arriving: Generator[tuple[TransferChunk, Tensor]]) -> None:
        self.ended_by: str = ""
        self._arriving = arriving
        _iterations.add(self)

    def end(self, op: str) -> None:
        """Completes the remaining transfers."""
        _iterations.discard(self)
        self.ended_by = self.ended_by or op
        self._arriving.close()


_iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()  # of all averages of the process


def end_iterations(op: str) -> None:
    """Ends all open iterations: the other ranks may wait in their transfers."""
    for iteration in list(_iterations):
        iteration.end(op)


class _Transfer:
    """Transfers buckets one after the other, through one buffer per device."""

    def __init__(self, contents: Contents, all_ranks: bool) -> None:
        self._contents = contents
        self.ranks: Ranks = contents.ranks
        self._all_ranks = all_ranks
        self._beat_at = time.monotonic() + self.ranks.timeout / 4
        self._buffers: dict[torch.device, Tensor] = {}
        # receives what was transferred on a device
        self._host = torch.tensor([], dtype=torch.uint8, device="cpu")
        self.receives: bool = all_ranks or self.ranks.leader

    def reserve(self, groups: Sequence[list[TransferChunk]]) -> None:
        """Allocates a buffer for each device, of the size of its largest bucket."""
        sizes: dict[torch.device, int] = {}
        for bucket in groups:
            device = self._home(bucket)
            _, spans = self._layout(bucket)
            size = sum(spans[owner][1] for owner in self._owners(spans))
            sizes[device] = max(size, sizes.get(device, 0))
        for device, size in sizes.items():
            self._buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
        on_device = [size for device, size in sizes.items() if device.type != "cpu"]
        if self.receives and on_device:
            self._host = torch.empty(max(on_device), dtype=torch.uint8, device="cpu")

    def beat(self) -> None:
        """Signals that this rank is alive, if the time between two transfers is long."""
        if self.ranks.size > 1 and time.monotonic() > self._beat_at:
            self.ranks.beat()
            self._beat_at = time.monotonic() + self.ranks.timeout / 4

    def move(self, bucket: list[TransferChunk], op: str) -> list[Tensor]:
        """Transfers a bucket; returns its chunks in order, on ranks that receive.

        A rank that fails to fill its part still sends it, and raises afterwards.
        """
        places, spans = self._layout(bucket)
        device = self._home(bucket)
        owners = self._owners(spans)
        first = min((spans[o][0] for o in owners), default=0)
        size = sum(spans[o][1] for o in owners)
        buffer = self._buffers[device][:size]
        # a sender's buffer has its own span only, so offsets are relative to that
        slots = {o: buffer[spans[o][0] - first :][: spans[o][1]] for o in owners}
        failed: BaseException | None = None
        try:
            for chunk, place in zip(bucket, places, strict=True):
                if chunk.owner == self.ranks.index:
                    values = self._contents.holdings(chunk.item, chunk.box)
                    self._view(buffer, place - first, chunk).copy_(values)
        except BaseException as error:
            failed = error
        if self.ranks.size > 1 and self._is_exchanged(bucket):
            if not self._all_ranks:
                self.ranks.join(op, device)
            if self.receives or owners:
                self.ranks.transfer(op, lambda: self._exchange(slots), device)
        if failed is not None:
            raise failed
        if not self.receives:
            return []
        arrived = buffer if device.type == "cpu" else self._host[:size].copy_(buffer)
        return [self._view(arrived, place, p) for p, place in zip(bucket, places, strict=True)]

    def _is_exchanged(self, bucket: Sequence[TransferChunk]) -> bool:
        """Whether any rank sends a part of a bucket to another one; equal on all ranks."""
        return self._all_ranks or any(chunk.owner != 0 for chunk in bucket)

    def _exchange(self, slots: Mapping[int, Tensor]) -> None:
        """Sends and receives the parts of a bucket, each in its owner's slot.

        In one batch, which goes through the communicator of the whole group: NCCL makes another
        one, of 100 MB, for each pair of ranks that sends otherwise.
        """
        ranks, group = self.ranks, self.ranks.group()
        if self._all_ranks:
            for owner, slot in slots.items():
                dist.broadcast(slot, src=ranks.ranks[owner], group=group)
            return
        if ranks.leader:
            parts = [
                dist.P2POp(dist.irecv, slot, ranks.ranks[owner], group)
                for owner, slot in slots.items()
                if owner != ranks.index
            ]
        else:
            parts = [dist.P2POp(dist.isend, slots[ranks.index], ranks.ranks[0], group)]
        for work in dist.batch_isend_irecv(parts):
            work.wait()

    def _layout(self, bucket: list[TransferChunk]) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """First byte of each chunk, and the span (first byte, bytes) of each owner."""
        sizes: dict[int, int] = {}
        within = []
        for chunk in bucket:
            within.append(sizes.get(chunk.owner, 0))
            sizes[chunk.owner] = within[-1] + -(-self._nbytes(chunk) // _ALIGN) * _ALIGN
        spans: dict[int, tuple[int, int]] = {}
        start = 0
        for owner, size in sizes.items():
            spans[owner] = (start, size)
            start += size
        pairs = zip(bucket, within, strict=True)
        return [spans[chunk.owner][0] + offset for chunk, offset in pairs], spans

    def _owners(self, spans: dict[int, tuple[int, int]]) -> list[int]:
        """Owners whose span of a bucket is in this rank's buffer: all, or itself."""
        return [owner for owner in spans if self.receives or owner == self.ranks.index]

    def _nbytes(self, chunk: TransferChunk) -> int:
        return chunk.box.numel * self._dtype(chunk).itemsize

    def _dtype(self, chunk: TransferChunk) -> torch.dtype:
        return self._contents.dtype(self._contents.plan.items[chunk.item])

    def _view(self, buffer: Tensor, start: int, chunk: TransferChunk) -> Tensor:
        raw = buffer[start : start + self._nbytes(chunk)]
        return raw.view(self._dtype(chunk)).view(chunk.box.sizes)

    def _home(self, bucket: list[TransferChunk]) -> torch.device:
        """The device on which a bucket is transferred; from the plan, so equal on all ranks."""
        if self.ranks.size == 1:
            return torch.device("cpu")
        kinds = {self._contents.plan.items[chunk.item].device for chunk in bucket} - {"cpu"}
        return self.ranks.transport(kinds.pop() if kinds else "cpu")


def assemble(
    contents: Contents, arriving: Iterator[tuple[TransferChunk, Tensor]]
) -> Iterator[tuple[Item, Tensor]]:
    """Full tensors ``[*shape]`` on the CPU, one at a time, from the chunks of `stream`."""
    chunks = iter(arriving)
    for index, item in zip(contents.chosen, contents.items, strict=True):
        missing = sum(box.numel for box, _ in item.holders)
        full: Tensor | None = None
        while missing:
            chunk, values = next(chunks)
            assert chunk.item == index, (chunk, item.fqn)
            if full is None:
                full = torch.empty(item.shape, dtype=values.dtype, device="cpu")
            chunk.box.view(full).copy_(values)
            missing -= chunk.box.numel
        if full is None:
            full = torch.empty(item.shape, dtype=contents.dtype(item), device="cpu")
        yield item, full


def with_apart(
    contents: Contents, full: Iterator[tuple[Item, Tensor]], own: Mapping[str, Tensor]
) -> Iterator[tuple[Item, Tensor]]:
    """``full``, with copies of the model's ``own`` tensors for the items of `apart`."""
    for item in contents.items:
        yield (item, _copied(own[item.fqn])) if item.opaque else next(full)


def _copied(tensor: Tensor) -> Tensor:
    """A copy in host memory; the tensor itself if its class does not support that."""
    try:
        return tensor.to("cpu", copy=True)
    except Exception:  # third-party classes raise NotImplementedError, KeyError, AssertionError
        return tensor


def apart(op: str, contents: Contents, all_ranks: bool) -> list[int]:
    """The opaque ones of the items, which are returned as they are by ranks that hold them whole.

    Args:
        all_ranks: all ranks return them, not the leader only.

    Raises:
        ValueError: a rank that returns them does not hold them whole.
    """
    plan = contents.plan
    opaque = [index for index in contents.chosen if plan.items[index].opaque]
    taking = range(contents.ranks.size) if all_ranks else range(1)
    cut = [
        index
        for index in opaque
        if [box for box, who in plan.items[index].holders if set(taking) <= set(who)]
        != list(whole(plan.items[index].shape))
    ]
    refuse_opaque(
        op,
        plan,
        cut,
        "and the ranks hold parts of it; save the averages with ema.save(folder), and write them "
        "with `shardema export --partial`",
    )
    return opaque
