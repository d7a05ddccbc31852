"""Each replica averages its slice of what all of them hold, and the slices are put together again.

::

    a tensor on 3 replicas, in memory   [0 1 2 3 4 5 6]     on each of them
    slices                              [0 1 2] [3 4 5] [6]
    slice_of   shard -> shard           a flat local, and the boxes of its elements
    spread     tensor -> tensor         each slice as its replica has it, on all of them

A slice is a shard like any other: it is averaged, gathered, saved and exported as one. With several
groups (a mesh that replicates along two axes) the slice of the first is sliced by the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from shardema.shard import Box, Dims, Shard, dense_like, flat_boxes, memory_order

BUCKET_BYTES = 64 << 20


def sliced(shard: Shard) -> bool:
    """Whether other ranks are declared to hold the same, and it can be cut into slices.

    Buffers may differ between replicas.
    """
    dense = shard.local.stride() == dense_like(shard.local)  # else a slice is no stretch of memory
    cut = dense and shard.role != "buffer" and not shard.corners and not shard.opaque
    replicas = shard.replicas if cut else ()
    return any(dist.get_world_size(group) > 1 for group in replicas)


def slice_of(shard: Shard) -> Shard:
    """This replica's part of ``shard``; the shard itself where it has no replicas."""
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
    """First and last element of all, of this rank's slice by the first group, by the second..."""
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
    """Boxes of the elements [start, stop) of those that ``boxes`` hold one after the other."""
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
    """A stretch of memory that the ranks of a group hold, each of them up to date in its slice."""

    values: Tensor  # [numel]
    size: int  # elements of a slice; the last ones may be shorter

    def part(self, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a rank's slice, fewer where it ends."""
        end = min((rank + 1) * self.size, self.values.numel())
        begin = min(rank * self.size + start, end)
        return self.values[begin : min(rank * self.size + stop, end)]


def spread(pairs: Sequence[tuple[Tensor, Sequence[dist.ProcessGroup]]]) -> None:
    """Brings each replica's slice to the others. Collective over the groups.

    Args:
        pairs: whole dense tensors, and the groups whose ranks hold them: `Shard.replicas`.

    The order of the pairs must be the same on all ranks. Needs two buffers of `BUCKET_BYTES` at
    most, one of them times the ranks of a group.
    """
    depth = max((len(groups) for _, groups in pairs), default=0)
    for level in reversed(range(depth)):  # what was sliced last is put together first
        alike: dict[tuple[dist.ProcessGroup, torch.dtype, torch.device], list[_Region]] = {}
        for tensor, groups in pairs:
            if len(groups) <= level or dist.get_world_size(groups[level]) == 1:
                continue
            begin, end = _span(tensor.numel(), groups[:level])[-1]
            size = _size(end - begin, dist.get_world_size(groups[level]))
            if size:
                key = (groups[level], tensor.dtype, tensor.device)
                alike.setdefault(key, []).append(_Region(flat(tensor)[begin:end], size))
        for (group, dtype, device), regions in alike.items():
            _gather(regions, group, dtype, device)


def _gather(
    regions: Sequence[_Region], group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device
) -> None:
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    kinds = sorted(kind.type for kind in group._device_types)
    if device.type not in kinds:  # weights in host memory, ranks that only GPUs connect
        device = torch.device(kinds[0], torch.accelerator.current_device_index())
    limit = max(1, BUCKET_BYTES // (dtype.itemsize * count))
    buckets = list(_buckets(regions, limit))
    width = max(sum(stop - start for _, start, stop in bucket) for bucket in buckets)
    mine = torch.zeros(width, dtype=dtype, device=device)
    theirs = torch.empty(count * width, dtype=dtype, device=device)
    for bucket in buckets:
        places, used = [], 0
        for _, start, stop in bucket:
            places.append(used)
            used += stop - start
        own = [region.part(rank, start, stop) for region, start, stop in bucket]
        slots = [mine[at : at + part.numel()] for at, part in zip(places, own, strict=True)]
        torch._foreach_copy_(slots, own)
        rows = theirs[: count * used]
        # as bytes: not every dtype travels by every backend
        dist.all_gather_into_tensor(
            rows.view(torch.uint8), mine[:used].view(torch.uint8), group=group
        )
        parts, values = [], []
        for other in (other for other in range(count) if other != rank):
            for (region, start, stop), at in zip(bucket, places, strict=True):
                parts.append(region.part(other, start, stop))
                begin = other * used + at
                values.append(rows[begin : begin + parts[-1].numel()])
        torch._foreach_copy_(parts, values)


def _buckets(regions: Sequence[_Region], limit: int) -> Iterator[list[tuple[_Region, int, int]]]:
    """Parts [start, stop) of slices, in groups of at most ``limit`` elements."""
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
