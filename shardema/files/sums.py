"""Reads stored tensors and their weighted sums, a piece at a time.

::

    in step      [piece of A] [piece of B] [piece of C]  -> piece of the sum, [next piece of A] ...
    one by one   [all of C] [all of A] [all of B]        -> the sum

Sources that lie alike in their files are read in step: a piece is still in the cache of the core
that has read it when it is verified and added. Others are added one after the other. Both add the
same numbers in the same order, so the result depends neither on the way nor on the parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from shardema.files import consolidated, manifest
from shardema.files.blending import Blend, Source, Stored, Value, dtype_of, shape_of
from shardema.files.consolidated import Place
from shardema.files.dcp import Chunks, load_chunks
from shardema.files.manifest import BLOCK, Manifest, ReadRequest
from shardema.shards.boxes import Box, Dims, split_box, whole
from shardema.shards.strides import raw_bytes

PIECE = 512 << 10  # bytes of a source, small enough to stay in a cache
_MOST_FILES = 256  # that a thread keeps open; a process may often have 1024
_ALIGNED = 64  # bytes, of the tensors in a `Room`

Boxes = Mapping[str, Sequence[Box]]  # by name of the tensor
Targets = Mapping[str, Sequence[tuple[Box, Tensor]]]  # each box with its tensor
Found = tuple[str, Box, Tensor]  # name, box, its values


class Room:
    """Memory for tensors, which the next part uses again: fresh memory costs as much as the sums.

    Not for several threads.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        # for what is read
        self.block: memoryview = raw_bytes(torch.empty(BLOCK, dtype=torch.uint8, device="cpu"))
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


def read(values: Mapping[str, Value], boxes: Boxes, room: Room) -> Iterator[Found]:
    """The values in these boxes; of a `Blend` in float32, or float64 if a source is.

    They count once the iteration has ended: a block may be found damaged after a part of it was
    given out.

    Yields:
        A name, a box inside one of ``boxes``, its values, which are valid until the next iteration.

    Raises:
        CheckpointError: a source is missing, cut short or damaged.
    """
    for name, box, found in _values(values, boxes, room):
        for wanted in boxes[name]:
            common = wanted.intersect(box)
            if common is not None:
                yield name, common, common.relative_to(box.offsets).view(found)


def fill(values: Mapping[str, Value], targets: Targets, room: Room) -> None:
    """Sets the targets, tensors of any dtype on any device; after an error they may be anything.

    Raises:
        CheckpointError: a source is missing, cut short or damaged.
    """
    boxes = {name: [box for box, _ in places] for name, places in targets.items()}
    for name, box, found in _values(values, boxes, room):
        for place, target in targets[name]:
            _put(place, box, found, target)


def _put(place: Box, box: Box, values: Tensor, target: Tensor) -> None:
    common = place.intersect(box)
    if common is not None:
        part = common.relative_to(box.offsets).view(values)
        common.relative_to(place.offsets).view(target).copy_(part)


def _values(values: Mapping[str, Value], boxes: Boxes, room: Room) -> Iterator[Found]:
    """Boxes that cover the wanted ones and may extend beyond."""
    plain: dict[str, Source] = {}
    groups: dict[tuple[torch.dtype, tuple[float, ...]], dict[str, Blend]] = {}
    for name in boxes:
        value = values[name]
        if isinstance(value, Blend):
            dtype = torch.promote_types(value.dtype, torch.float32)
            key = dtype, tuple(c for c, _ in value.sources)
            groups.setdefault(key, {})[name] = value
        else:
            plain[name] = value
    yield from _Reader(plain, boxes).boxes(room)
    for (dtype, coefficients), blends in groups.items():
        readers = [
            _Reader({name: blend.sources[number][1] for name, blend in blends.items()}, boxes)
            for number in range(len(coefficients))
        ]
        room.clear()
        blocks = readers[-1].blocks
        alike = all(reader.blocks == blocks for reader in readers[:-1])
        if blocks and alike and len(readers) <= _MOST_FILES:
            yield from _in_step(coefficients, readers, dtype, room)
        else:
            wanted = {name: boxes[name] for name in blends}
            yield from _one_by_one(coefficients, readers, wanted, dtype, room)


# ---- sums ---------------------------------------------------------------------------------------

# The differences from the last source are summed, which are small: so float32 loses nothing.


def _in_step(
    coefficients: Sequence[float], readers: Sequence[_Reader], dtype: torch.dtype, room: Room
) -> Iterator[Found]:
    blocks = readers[-1].blocks
    last = readers[-1].reads(room.block[:PIECE])
    others = [reader.reads(room.block[PIECE : 2 * PIECE]) for reader in readers[:-1]]
    wide, change = (room.empty((PIECE,), dtype) for _ in range(2))
    most = max(sum(run.numel for run in runs) for runs in blocks)
    room_for_block = room.empty((most,), dtype)
    for runs in blocks:
        numels = [run.numel for run in runs]
        result = room_for_block[: sum(numels)]
        done = 0
        while done < result.numel():
            bases = _widened(next(last), wide)
            sizes = [base.numel() for base in bases]
            totals = torch.split(result[done : done + sum(sizes)].zero_(), sizes)
            for coefficient, other in zip(coefficients[:-1], others, strict=True):
                for total, values, base in zip(totals, next(other), bases, strict=True):
                    _add(total, values, base, coefficient, change[: base.numel()])
            for total, base in zip(totals, bases, strict=True):
                _finish(total, base, coefficients)
            done += sum(sizes)
        for run, values in zip(runs, torch.split(result, numels), strict=True):
            for box, part in manifest.boxes_of(run.held, run.first, values):
                yield run.name, box, part
    for rest in (last, *others):
        for _ in rest:  # the end of the last block, whose values are not needed but verified
            raise AssertionError("a source has more values than were expected")


def _widened(tensors: Sequence[Tensor], room: Tensor) -> list[Tensor]:
    """In the dtype of ``room``: those that have it, and copies of the others."""
    sizes = [one.numel() for one in tensors]
    places = torch.split(room[: sum(sizes)], sizes)
    pairs = zip(tensors, places, strict=True)
    return [one if one.dtype == room.dtype else place.copy_(one) for one, place in pairs]


def _one_by_one(
    coefficients: Sequence[float],
    readers: Sequence[_Reader],
    boxes: Boxes,
    dtype: torch.dtype,
    room: Room,
) -> Iterator[Found]:
    base, total = (
        {name: [(b, room.empty(b.sizes, dtype)) for b in held] for name, held in boxes.items()}
        for _ in range(2)
    )
    scratch = room.empty((BLOCK // dtype.itemsize,), dtype)
    for name, box, found in readers[-1].boxes(room):
        for place, target in base[name]:
            _put(place, box, found, target)
    for places in total.values():
        for _, target in places:
            target.zero_()
    for coefficient, reader in zip(coefficients[:-1], readers[:-1], strict=True):
        for name, box, found in reader.boxes(room):
            for (place, first), (_, target) in zip(base[name], total[name], strict=True):
                overlap = place.intersect(box)
                for part in split_box(overlap, scratch.numel()) if overlap else ():
                    inner = part.relative_to(place.offsets)
                    change = scratch[: part.numel].view(part.sizes)
                    values = part.relative_to(box.offsets).view(found)
                    _add(inner.view(target), values, inner.view(first), coefficient, change)
    for name, places in total.items():
        for (box, target), (_, first) in zip(places, base[name], strict=True):
            _finish(target, first, coefficients)
            yield name, box, target


def _add(total: Tensor, values: Tensor, base: Tensor, coefficient: float, change: Tensor) -> None:
    """``total += coefficient (values - base)``; ``change`` is for the difference."""
    if values.dtype == change.dtype:
        torch.sub(values, base, out=change)
    else:
        change.copy_(values).sub_(base)
    total.add_(change, alpha=coefficient)


def _finish(total: Tensor, base: Tensor, coefficients: Sequence[float]) -> None:
    """``total += sum(coefficients) base``"""
    scale = math.fsum(coefficients)
    if abs(scale - 1) > 1e-12:  # else the last source has what the others leave
        total.add_(base * scale)
    else:
        total.add_(base)


# ---- sources ------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Elements that follow each other in a file.

    Attributes:
        held: the box that they are a part of: ``numel`` elements from number ``first`` on.
        start: of the first one in the file of a checkpoint, which is read from block to block.
    """

    name: str
    held: Box
    first: int
    numel: int
    itemsize: int
    start: int = 0


class _Reader:
    """One source of each of some tensors, and the boxes that are wanted of them."""

    def __init__(self, sources: Mapping[str, Source], boxes: Boxes) -> None:
        self._sources = sources
        self._whole = [name for name, source in sources.items() if isinstance(source, Chunks)]
        self._others = [
            _Run(name, part, 0, part.numel, dtype_of(source).itemsize)
            for name, source in sources.items()
            if isinstance(source, Place | Tensor)
            for box in boxes[name]
            for part in split_box(box, BLOCK // dtype_of(source).itemsize)
        ]
        by_checkpoint: dict[int, tuple[Manifest, dict[int, str]]] = {}
        for name, source in sources.items():
            if isinstance(source, Stored):
                found = by_checkpoint.setdefault(id(source.manifest), (source.manifest, {}))
                found[1][source.number] = name
        self._stored: list[tuple[Manifest, dict[int, str], list[ReadRequest]]] = []
        for stored, names in by_checkpoint.values():
            wanted = {number: list(boxes[name]) for number, name in names.items()}
            self._stored.append((stored, names, manifest.read_requests(stored, wanted)))

    @cached_property
    def blocks(self) -> list[list[_Run]]:
        """What `reads` reads, up to a block at a time; empty if it cannot read all of it."""
        if self._whole:
            return []
        found = [[run] for run in self._others]
        for stored, names, requests in self._stored:
            for request in requests:
                for needed in request.blocks.values():
                    found.append([_run(stored, names, one) for one in needed])
        return found

    def reads(self, buffer: memoryview) -> Iterator[list[Tensor]]:
        """The elements of the runs one after the other, flat, as many at a time as are read."""
        for run in self._others:
            for _, values in self._parts(run, buffer):
                yield [values.reshape(-1)]
        for stored, _, requests in self._stored:
            for found in manifest.reads(stored, requests, buffer):
                yield [values for _, _, values in found]

    def boxes(self, room: Room) -> Iterator[Found]:
        """The values in boxes that cover the wanted ones and may extend beyond."""
        for run in self._others:
            for box, values in self._parts(run, room.block):
                yield run.name, box, values
        for stored, names, requests in self._stored:
            for number, box, values in manifest.parts(stored, requests, room.block):
                yield names[number], box, values
        yield from _loaded({name: self._sources[name] for name in self._whole})

    def _parts(self, run: _Run, buffer: memoryview) -> Iterator[tuple[Box, Tensor]]:
        source = self._sources[run.name]
        if isinstance(source, Place):
            yield from consolidated.read_parts(source, run.held, buffer)
        elif isinstance(source, Tensor):
            for part in split_box(run.held, len(buffer) // run.itemsize):
                yield part, part.view(source).detach().cpu()


def _run(stored: Manifest, names: Mapping[int, str], needed: manifest.Needed) -> _Run:
    start, stop, held = needed
    itemsize = stored.tensors[held.tensor].dtype.itemsize
    first, numel = (start - held.start) // itemsize, (stop - start) // itemsize
    return _Run(names[held.tensor], held.box, first, numel, itemsize, start)


def _loaded(sources: Mapping[str, Source]) -> Iterable[Found]:
    """The whole tensors of folders of torch.distributed.checkpoint."""
    folders: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        if isinstance(source, Chunks):
            folders.setdefault(source.folder, {})[source.key] = name
    for folder, names in folders.items():
        full = {
            key: torch.empty(shape_of(sources[name]), dtype=dtype_of(sources[name]), device="cpu")
            for key, name in names.items()
        }
        load_chunks(folder, dict(full))
        for key, name in names.items():
            for box in whole(shape_of(sources[name])):
                yield name, box, full[key]
