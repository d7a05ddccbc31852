"""Slices of replicated tensors: each replica averages one, and the slices are gathered again.

::

    a tensor on 3 replicas, in memory   [0 1 2 3 4 5 6]     on each of them
    slices                              [0 1 2] [3 4 5] [6]
    slice_of   shard -> shard           a flat local, and the boxes of its elements
    AllGatherSlices  tensor -> tensor   every slice, on all replicas

A slice is a `Shard`, and is averaged, gathered, saved and exported as one. With several groups (a
mesh that replicates along two axes) the slice of the first group is sliced by the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from shardema.ranks.agree import Ranks, all_gather_rows, device_for
from shardema.shards.boxes import Box, Dims, flat_boxes
from shardema.shards.shard import Shard
from shardema.shards.strides import dense_like, memory_order

BUCKET_BYTES = 64 << 20


def sliced(shard: Shard) -> bool:
    """Whether the shard has replicas and can be cut into slices.

    Buffers are not sliced, as they may differ between replicas.
    """
    dense = shard.local.stride() == dense_like(shard.local)  # else a slice is not contiguous
    divisible = dense and shard.role != "buffer" and not shard.corners and not shard.opaque
    replicas = shard.replicas if divisible else ()
    return any(dist.get_world_size(group) > 1 for group in replicas)


def slice_of(shard: Shard) -> Shard:
    """This replica's slice of ``shard``; the shard itself if it is not sliced."""
    if not sliced(shard):
        return shard
    start, stop = _span(shard.local.numel(), shard.replicas)[-1]
    order = shard.order
    if shard.local.dim() and len(shard.boxes) == 1 and shard.local.shape == shard.boxes[0].sizes:
        order = order or memory_order(shard.local.shape, shard.local.stride())
    boxes = tuple(_boxes_between(shard.boxes, order, start, stop))
    weights = None if shard.weights is None else flat(shard.weights)[start:stop]
    local = flat(shard.local)[start:stop]
    return replace(shard, local=local, weights=weights, boxes=boxes, order=order, replicas=())


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory: ``[numel]``, a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _span(numel: int, groups: Sequence[dist.ProcessGroup]) -> list[tuple[int, int]]:
    """[start, stop) of all elements, then of this rank's slice in each group in turn."""
    spans = [(0, numel)]
    for group in groups:
        begin, end = spans[-1]
        size = _size(end - begin, dist.get_world_size(group))
        start = min(begin + dist.get_rank(group) * size, end)
        spans.append((start, min(start + size, end)))
    return spans


def _size(numel: int, count: int) -> int:
    return -(-numel // count)


def _boxes_between(boxes: Sequence[Box], order: Dims, start: int, stop: int) -> Iterator[Box]:
    """Boxes of the elements [start, stop) of ``boxes``, which are stored one after the other."""
    first = 0
    for box in boxes:
        begin, end = max(start, first), min(stop, first + box.numel)
        if begin < end:
            dims = order or tuple(range(len(box.sizes)))
            stored = flat_boxes(tuple(box.sizes[d] for d in dims), begin - first, end - begin)
            inverse = sorted(range(len(dims)), key=dims.__getitem__)
            for part in stored:
                offsets = tuple(part.offsets[i] for i in inverse)
                yield Box(offsets, tuple(part.sizes[i] for i in inverse)).shifted(box.offsets)
        first += box.numel


@dataclass(frozen=True)
class _Region:
    """A contiguous range that all ranks of a group hold; on each rank its own slice is current."""

    values: Tensor  # [numel]
    size: int  # elements of a slice; the last ones may be shorter

    def part(self, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a rank's slice, fewer if the slice ends before."""
        end = min((rank + 1) * self.size, self.values.numel())
        begin = min(rank * self.size + start, end)
        return self.values[begin : min(rank * self.size + stop, end)]


class AllGatherSlices:
    """All-gathers slices in place: after a call every replica holds all of them.

    Args:
        pairs: whole dense tensors, each with the groups whose ranks hold it (`Shard.replicas`). In
            the same order on all ranks.
        ranks: the ranks of all groups together.

    The constructor allocates all buffers, so that no call runs out of memory on one rank only: a
    send and a receive buffer for each device, of at most `BUCKET_BYTES` each.
    """

    def __init__(
        self, pairs: Sequence[tuple[Tensor, Sequence[dist.ProcessGroup]]], ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._steps: list[_Step] = []
        depth = max((len(groups) for _, groups in pairs), default=0)
        for level in reversed(range(depth)):  # the last slicing is undone first
            by_key: dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], list[_Region]] = {}
            for tensor, groups in pairs:
                if len(groups) <= level or dist.get_world_size(groups[level]) == 1:
                    continue
                begin, end = _span(tensor.numel(), groups[:level])[-1]
                size = _size(end - begin, dist.get_world_size(groups[level]))
                if size:
                    key = (groups[level], tensor.dtype, _travels(groups[level], tensor, ranks))
                    by_key.setdefault(key, []).append(_Region(flat(tensor)[begin:end], size))
            for (group, dtype, device), regions in by_key.items():
                limit = max(1, BUCKET_BYTES // (dtype.itemsize * dist.get_world_size(group)))
                buckets = list(_buckets(regions, limit))
                width = max(sum(stop - start for _, start, stop in bucket) for bucket in buckets)
                self._steps.append(_Step(group, dtype, device, buckets, width))
        self._send: dict[torch.device, Tensor] = {}
        self._receive: dict[torch.device, Tensor] = {}
        for device in {step.device for step in self._steps}:
            here = [step for step in self._steps if step.device == device]
            own = max(step.width * step.dtype.itemsize for step in here)
            all_of = max(
                step.width * step.dtype.itemsize * dist.get_world_size(step.group) for step in here
            )
            self._send[device] = torch.zeros(own, dtype=torch.uint8, device=device)
            self._receive[device] = torch.empty(all_of, dtype=torch.uint8, device=device)

    def __call__(self, op: str) -> None:
        """Gathers the slices. Collective over the groups.

        Raises:
            RankError: a rank did not make the call.
        """
        for step in self._steps:
            for bucket in step.buckets:
                self._gather(op, step, bucket)

    def _gather(self, op: str, step: _Step, bucket: Sequence[tuple[_Region, int, int]]) -> None:
        group, dtype, device = step.group, step.dtype, step.device
        count, rank = dist.get_world_size(group), dist.get_rank(group)
        places, used = [], 0
        for _, start, stop in bucket:
            places.append(used)
            used += stop - start
        sent = self._send[device][: used * dtype.itemsize]
        came = self._receive[device][: count * used * dtype.itemsize]
        slices, rows = sent.view(dtype), came.view(dtype)
        own = [region.part(rank, start, stop) for region, start, stop in bucket]
        slots = [slices[at : at + part.numel()] for at, part in zip(places, own, strict=True)]
        torch._foreach_copy_(slots, own)
        # as bytes: not every process-group backend supports every dtype
        self._ranks.transfer(op, lambda: all_gather_rows(came, sent, group), device)
        parts, values = [], []
        for other in (other for other in range(count) if other != rank):
            for (region, start, stop), at in zip(bucket, places, strict=True):
                parts.append(region.part(other, start, stop))
                begin = other * used + at
                values.append(rows[begin : begin + parts[-1].numel()])
        torch._foreach_copy_(parts, values)


def _travels(group: dist.ProcessGroup, tensor: Tensor, ranks: Ranks) -> torch.device:
    """The device of the transfer: the tensor's, or the group's for host tensors under NCCL."""
    device = device_for(group, tensor.device.type, ranks.device)
    return tensor.device if device.type == tensor.device.type else device


@dataclass(frozen=True)
class _Step:
    """Regions of one dtype that one group exchanges, in buckets."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    device: torch.device  # of the transfer; the regions may be on another one
    buckets: list[list[tuple[_Region, int, int]]]
    width: int  # elements of a rank's part of the largest bucket


def _buckets(regions: Sequence[_Region], limit: int) -> Iterator[list[tuple[_Region, int, int]]]:
    """Parts [start, stop) of slices, in buckets of at most ``limit`` elements."""
    bucket: list[tuple[_Region, int, int]] = []
    used = 0
    for region in regions:
        start = 0
        while start < region.size:
            stop = min(region.size, start + limit - used)
            bucket.append((region, start, stop))
            used += stop - start
            start = stop
            if used == limit:
                yield bucket
                bucket, used = [], 0
    if bucket:
        yield bucket
