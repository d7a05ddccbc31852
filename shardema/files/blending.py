"""Weighted sums of stored tensors: what they are made of, and the parts to compute them in.

::

    checkpoint A   [block][block] ...     c_A \\
    checkpoint B   [block][block] ...     c_B  > one part of the result, in float32
    HF folder C    [bytes ......] ...     c_C /

A part of the result (`parts_of`) is what a few blocks of the last source hold. Sources written by
as many ranks have the same blocks, so each is read and verified once. No tensor and no file is in
memory whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema.files.arrangement import StoredFile
from shardema.files.consolidated import Place
from shardema.files.dcp import Chunks
from shardema.files.manifest import BLOCK, Manifest
from shardema.shards.boxes import Box, Dims, flat_boxes, split_box, whole

PART_BLOCKS = 2  # of the last source, in a part: what a processor's cache holds


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensor ``number`` of a checkpoint."""

    manifest: Manifest
    number: int

    @property
    def dtype(self) -> torch.dtype:
        return self.manifest.tensors[self.number].dtype

    @property
    def exported_dtype(self) -> torch.dtype:
        return self.manifest.exported_dtype(self.manifest.tensors[self.number])

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
        return _widest(dtype_of(source) for _, source in self.sources)

    @property
    def exported_dtype(self) -> torch.dtype:
        return _widest(exported_dtype_of(source) for _, source in self.sources)

    @property
    def shape(self) -> Dims:
        return shape_of(self.sources[0][1])


Value = Source | Blend


def dtype_of(value: Value) -> torch.dtype:
    """The dtype of the tensor."""
    return value.entry.dtype if isinstance(value, Place) else value.dtype


def exported_dtype_of(value: Value) -> torch.dtype:
    """The dtype of the tensor outside of checkpoints: float32 of a compensated average."""
    return value.exported_dtype if isinstance(value, Stored | Blend) else dtype_of(value)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


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
