"""Weighted sums of stored tensors, computed in parts: no tensor and no file is in memory whole.

::

    checkpoint A   [block][block] ...     c_A \\
    checkpoint B   [block][block] ...     c_B  > one part of the result, in float32
    HF folder C    [bytes ......] ...     c_C /

A part of the result (`parts_of`) is what a few blocks of the last source hold. Sources written by
as many ranks have the same blocks, so each is read and verified once. Every element is summed in
the order of the sources, so the result does not depend on the parts, nor on who computes which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema.files import consolidated, manifest
from shardema.files.consolidated import Place
from shardema.files.dcp import Chunks, load_chunks
from shardema.files.manifest import BLOCK, Manifest, StoredFile
from shardema.shards.boxes import Box, Dims, flat_boxes, split_box, whole

PART_BLOCKS = 1  # of the last source, in a part: what a processor's cache holds
_ALIGNED = 64  # bytes, of the tensors in a `Room`
_READ = 1 << 20  # elements of a safetensors file that are read at a time


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensor ``number`` of a checkpoint."""

    manifest: Manifest
    number: int

    @property
    def dtype(self) -> torch.dtype:
        return self.manifest.tensors[self.number].dtype

    @property
    def shape(self) -> Dims:
        return self.manifest.tensors[self.number].shape


Source = Stored | Place | Chunks | Tensor


@dataclass(frozen=True)
class Blend:
    """``sum_i c_i source_i``, in the widest dtype of the sources.

    Attributes:
        sources: of one shape, each with its coefficient; two or more.
    """

    sources: tuple[tuple[float, Source], ...]

    @property
    def dtype(self) -> torch.dtype:
        found = dtype_of(self.sources[0][1])
        for _, source in self.sources[1:]:
            found = torch.promote_types(found, dtype_of(source))
        return found

    @property
    def shape(self) -> Dims:
        return shape_of(self.sources[0][1])


Value = Source | Blend
Targets = Mapping[str, Sequence[tuple[Box, Tensor]]]  # by name; each box with its tensor


def dtype_of(value: Value) -> torch.dtype:
    """The dtype of the tensor."""
    return value.entry.dtype if isinstance(value, Place) else value.dtype


def shape_of(value: Value) -> Dims:
    """The shape of the full tensor."""
    return value.entry.shape if isinstance(value, Place) else tuple(value.shape)


def is_dcp(value: Value) -> bool:
    """Whether any of it is read by torch.distributed.checkpoint."""
    sources = [s for _, s in value.sources] if isinstance(value, Blend) else [value]
    return any(isinstance(source, Chunks) for source in sources)


def nbytes_of(values: Iterable[Value]) -> int:
    """Bytes that are read for these tensors."""
    total = 0
    for value in values:
        for source in [s for _, s in value.sources] if isinstance(value, Blend) else [value]:
            total += math.prod(shape_of(source)) * dtype_of(source).itemsize
    return total


# ---- parts of a result --------------------------------------------------------------------------


def parts_of(values: Mapping[str, Value]) -> list[dict[str, list[Box]]]:
    """The tensors as parts to be computed one after another; each element is in one of them."""
    numbers: dict[int, tuple[Manifest, dict[int, str]]] = {}
    apart: list[str] = []
    for name, value in values.items():
        last = value.sources[-1][1] if isinstance(value, Blend) else value
        if isinstance(last, Stored):
            numbers.setdefault(id(last.manifest), (last.manifest, {}))[1][last.number] = name
        else:
            apart.append(name)
    found: list[dict[str, list[Box]]] = []
    for stored, names in numbers.values():
        for file in stored.files:
            found += _parts_of_file(stored, file, names)
    found += _parts_by_size({name: values[name] for name in apart})
    return found


def _parts_of_file(
    stored: Manifest, file: StoredFile, names: Mapping[int, str]
) -> Iterator[dict[str, list[Box]]]:
    """What each few blocks of a file hold of the named tensors."""
    step = PART_BLOCKS * BLOCK
    part: dict[str, list[Box]] = {}
    limit = step
    for held in file.boxes:
        name, itemsize = names.get(held.tensor), stored.tensors[held.tensor].dtype.itemsize
        start, stop = held.start, held.start + held.box.numel * itemsize
        while start < stop:
            if start >= limit:
                if part:
                    yield part
                part, limit = {}, (start // step + 1) * step
            end = min(stop, limit)
            if name is not None:
                first, count = (start - held.start) // itemsize, (end - start) // itemsize
                boxes = flat_boxes(held.box.sizes, first, count)
                part.setdefault(name, []).extend(box.shifted(held.box.offsets) for box in boxes)
            start = end
    if part:
        yield part


def _parts_by_size(values: Mapping[str, Value]) -> Iterator[dict[str, list[Box]]]:
    """Parts of tensors that no checkpoint of ours holds; those of DCP are read whole."""
    limit = PART_BLOCKS * BLOCK
    part: dict[str, list[Box]] = {}
    used = 0
    for name, value in values.items():
        cut = math.inf if is_dcp(value) else limit // 4
        for full in whole(shape_of(value)):
            for box in split_box(full, min(full.numel, int(min(cut, 1 << 62)))):
                nbytes = box.numel * dtype_of(value).itemsize
                if part and used + nbytes > limit:
                    yield part
                    part, used = {}, 0
                part.setdefault(name, []).append(box)
                used += nbytes
    if part:
        yield part


# ---- their values -------------------------------------------------------------------------------


class Room:
    """Memory for tensors, which the next part uses again: fresh memory costs as much as the sums.

    Not for several threads.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.block = bytearray(BLOCK)  # for `manifest.parts`
        self._used = 0  # bytes that the tensors since `clear` take, also those in fresh memory

    def clear(self) -> None:
        """The tensors are no longer needed. As much as they took is kept."""
        if self._used > self._memory.numel():
            self._memory = torch.empty(self._used, dtype=torch.uint8, device="cpu")
        self._used = 0

    def empty(self, sizes: Dims, dtype: torch.dtype) -> Tensor:
        """A tensor whose values are not set, valid until `clear`."""
        nbytes, start = math.prod(sizes) * dtype.itemsize, self._used
        self._used += -(-nbytes // _ALIGNED) * _ALIGNED
        if self._used > self._memory.numel():
            return torch.empty(sizes, dtype=dtype, device="cpu")
        return self._memory[start : start + nbytes].view(dtype).view(sizes)


def read(values: Mapping[str, Value], part: Mapping[str, Sequence[Box]], room: Room) -> Targets:
    """The values of a part; of a `Blend` in float32, or float64 if a source is.

    Args:
        room: is cleared, and then has the values.
    """
    room.clear()
    found = {
        name: [(box, room.empty(box.sizes, _wide(values[name]))) for box in boxes]
        for name, boxes in part.items()
    }
    fill(values, found, room)
    return found


def fill(values: Mapping[str, Value], targets: Targets, room: Room) -> None:
    """Sets the targets; those of a `Blend` are float32 or float64 tensors on any device.

    Args:
        room: for the sums.

    Raises:
        CheckpointError: a source is missing, cut short or damaged.
    """
    plain: dict[str, Source] = {}
    blends: dict[str, Blend] = {}
    for name in targets:
        value = values[name]
        if isinstance(value, Blend):
            blends[name] = value
        else:
            plain[name] = value
    for name, box, stored in _stored(plain, _boxes(targets, plain), room):
        for place, target in targets[name]:
            _put(place, box, stored, target)
    _fill_blends(blends, {name: targets[name] for name in blends}, room)


def _boxes(targets: Targets, names: Mapping[str, object]) -> dict[str, list[Box]]:
    return {name: [box for box, _ in targets[name]] for name in names}


def _wide(value: Value) -> torch.dtype:
    """The dtype in which values are summed; that of what is only copied."""
    if not isinstance(value, Blend):
        return dtype_of(value)
    return torch.promote_types(value.dtype, torch.float32)


def _fill_blends(blends: Mapping[str, Blend], targets: Targets, room: Room) -> None:
    """Sums the differences from the last source, which are small: so float32 loses nothing."""
    rest = {
        name: [(box, room.empty(box.sizes, _wide(blends[name])).zero_()) for box, _ in boxes]
        for name, boxes in targets.items()
    }
    base = {
        name: [(box, _host(target, _wide(blends[name]), room)) for box, target in boxes]
        for name, boxes in targets.items()
    }
    scratch = room.empty((BLOCK,), torch.uint8)
    boxes = _boxes(targets, blends)
    last = {name: blend.sources[-1][1] for name, blend in blends.items()}
    for name, box, stored in _stored(last, boxes, room):
        for place, target in base[name]:
            _put(place, box, stored, target)
    for number in range(max((len(b.sources) for b in blends.values()), default=1) - 1):
        there = {n: b.sources[number] for n, b in blends.items() if number < len(b.sources) - 1}
        sources = {name: source for name, (_, source) in there.items()}
        wanted = {name: boxes[name] for name in sources}
        for name, box, stored in _stored(sources, wanted, room):
            for (place, first), (_, total) in zip(base[name], rest[name], strict=True):
                _add(place, box, stored, first, total, there[name][0], scratch)
    for name, blend in blends.items():
        scale = math.fsum(c for c, _ in blend.sources)
        for (_, target), (_, first), (_, total) in zip(
            targets[name], base[name], rest[name], strict=True
        ):
            if abs(scale - 1) > 1e-12:  # else the last source has what the others leave
                first.mul_(scale)
            first.add_(total)
            if first is not target:
                target.copy_(first)


def _host(target: Tensor, dtype: torch.dtype, room: Room) -> Tensor:
    """The target itself if sums can be made in it, else a tensor of its size in host memory."""
    if target.device.type == "cpu" and target.dtype == dtype:
        return target
    return room.empty(tuple(target.shape), dtype)


def _put(place: Box, box: Box, values: Tensor, target: Tensor) -> None:
    common = place.intersect(box)
    if common is not None:
        part = common.relative_to(box.offsets).view(values)
        common.relative_to(place.offsets).view(target).copy_(part)


def _add(
    place: Box,
    box: Box,
    values: Tensor,
    base: Tensor,
    total: Tensor,
    coefficient: float,
    scratch: Tensor,
) -> None:
    """``total += coefficient (values - base)`` where the boxes overlap."""
    overlap = place.intersect(box)
    if overlap is None:
        return
    room = scratch.view(total.dtype)
    for common in split_box(overlap, room.numel()):
        inner = common.relative_to(place.offsets)
        found = common.relative_to(box.offsets).view(values)
        change = room[: common.numel].view(common.sizes)
        if found.dtype == change.dtype:
            torch.sub(found, inner.view(base), out=change)
        else:
            change.copy_(found).sub_(inner.view(base))
        inner.view(total).add_(change, alpha=coefficient)


def _stored(
    sources: Mapping[str, Source], boxes: Mapping[str, Sequence[Box]], room: Room
) -> Iterator[tuple[str, Box, Tensor]]:
    """Values as they are stored, in boxes that cover the wanted ones and may extend beyond."""
    groups: dict[int, tuple[Manifest, dict[int, str]]] = {}
    folders: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, Stored):
            groups.setdefault(id(source.manifest), (source.manifest, {}))[1][source.number] = name
        elif isinstance(source, Chunks):
            folders.setdefault(source.folder, {})[source.key] = name
        else:
            yield from _one_by_one(name, source, boxes[name])
    for stored, names in groups.values():
        wanted = {number: list(boxes[name]) for number, name in names.items()}
        requests = manifest.read_requests(stored, wanted)
        for number, box, values in manifest.parts(stored, requests, room.block):
            yield names[number], box, values
    for folder, keys in folders.items():
        full = {
            key: torch.empty(shape_of(sources[name]), dtype=dtype_of(sources[name]), device="cpu")
            for key, name in keys.items()
        }
        load_chunks(folder, dict(full))
        for key, name in keys.items():
            for box in whole(shape_of(sources[name])):
                yield name, box, full[key]


def _one_by_one(
    name: str, source: Place | Tensor, boxes: Sequence[Box]
) -> Iterator[tuple[str, Box, Tensor]]:
    for box in boxes:
        if isinstance(source, Tensor):
            yield name, box, box.view(source).detach().cpu()
            continue
        for part in split_box(box, _READ):
            values = torch.empty(part.sizes, dtype=source.entry.dtype, device="cpu")
            consolidated.read_into(values, source, part)
            yield name, part, values
