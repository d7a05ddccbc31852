"""Which file of a checkpoint holds which box of which tensor, without an object for each of them.

::

    file 0   head | box 0 as tensor 7 | box 0 as tensor 3 | box 1 as tensor 5
    file 1   the same, of other boxes

    Order        tensors 7 3 5, boxes 0 0 1     one for all files that hold alike
    StoredFile   its order, and its different boxes: two here
    Arrangement  the files by tensor; the boxes are compared as arrays

Ranks hold alike where tensors are sharded by rows, and tensors of one shape in the same boxes: a
thousand files of a thousand tensors have a few orders, and a few different boxes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardema.ranks.messages import array_of, text_of
from shardema.shards.boxes import Box

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """What files hold, one after the other.

    Attributes:
        tensors: the number of each one's tensor.
        boxes: which of the different boxes of a file each one is.
        itemsizes: of each one's tensor, in bytes.
    """

    tensors: tuple[int, ...]
    boxes: tuple[int, ...]
    itemsizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def widest_first(self) -> bool:
        """Whether no element is wider than one before it."""
        pairs = zip(self.itemsizes, self.itemsizes[1:], strict=False)
        return all(before >= after for before, after in pairs)

    @cached_property
    def itemsizes_of_box(self) -> tuple[int, ...]:
        """For each of the different boxes, the bytes of an element in all tensors that have it."""
        sums = [0] * (1 + max(self.boxes, default=-1))
        for box, itemsize in zip(self.boxes, self.itemsizes, strict=True):
            sums[box] += itemsize
        return tuple(sums)


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of tensor number ``tensor``; ``start`` is its first byte in the file."""

    tensor: int
    box: Box
    start: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One safetensors file of a checkpoint.

    Attributes:
        size: bytes in all; ``head`` those before the first value.
        blocks: the checksum of each block.
        order: what it holds.
        different: its different boxes.
    """

    name: str
    size: int
    head: int
    blocks: tuple[str, ...]
    order: Order
    different: tuple[Box, ...]

    @property
    def end(self) -> int:
        """The byte after the last value, if ``different`` are the boxes of ``order``."""
        pairs = zip(self.different, self.order.itemsizes_of_box, strict=True)
        return self.head + sum(box.numel * itemsize for box, itemsize in pairs)

    def starts(self) -> _Ints:
        """The first byte of each box, in the order; ``end`` must be an int64."""
        numels = np.array([box.numel for box in self.different], np.int64)
        nbytes = numels[list(self.order.boxes)] * np.array(self.order.itemsizes, np.int64)
        found: _Ints = self.head + np.cumsum(nbytes) - nbytes
        return found

    @property
    def boxes(self) -> tuple[StoredBox, ...]:
        """What it holds, an object for each box."""
        held = zip(self.order.tensors, self.order.boxes, self.starts().tolist(), strict=True)
        return tuple(StoredBox(tensor, self.different[k], start) for tensor, k, start in held)


class Pieces:
    """Makes the orders of files, one for all files that hold alike.

    Args:
        itemsizes: of each tensor, in bytes.
    """

    def __init__(self, itemsizes: Sequence[int]) -> None:
        self._itemsizes = itemsizes
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Order] = {}
        self._unpacked: dict[str, Order] = {}

    def order(self, tensors: tuple[int, ...], boxes: tuple[int, ...]) -> Order:
        key = tensors, boxes
        if key not in self._known:
            self._known[key] = Order(*key, tuple(self._itemsizes[number] for number in tensors))
        return self._known[key]

    def of(self, listed: Sequence[tuple[int, Box]]) -> tuple[Order, tuple[Box, ...]]:
        """The order and the different boxes of a file, from all that it holds."""
        place: dict[Box, int] = {}
        boxes = tuple(place.setdefault(box, len(place)) for _, box in listed)
        return self.order(tuple(tensor for tensor, _ in listed), boxes), tuple(place)

    def unpacked(self, text: str) -> Order:
        """The order of which `packed` made this."""
        if text not in self._unpacked:
            tensors, boxes = array_of(text, np.uint32).reshape(2, -1).tolist()
            self._unpacked[text] = self.order(tuple(tensors), tuple(boxes))
        return self._unpacked[text]


def packed(listed: Sequence[tuple[int, Box]]) -> tuple[str, list[Box]]:
    """The order of a file as a short text, and its different boxes, for `Pieces.unpacked`."""
    place: dict[Box, int] = {}
    boxes = [place.setdefault(box, len(place)) for _, box in listed]
    return text_of([*(tensor for tensor, _ in listed), *boxes], np.uint32), list(place)


class _Cuts(NamedTuple):
    """The boxes in which the files hold a tensor; tensors that are cut alike share them.

    Attributes:
        files: the number of each one's file.
        places: which of the tensor's places in the orders each one is at.
        low: first index of each one in each dim, ``[boxes, dims]``; ``high`` the end.
    """

    files: list[int]
    places: list[int]
    boxes: list[Box]
    low: _Ints
    high: _Ints


Alike = tuple[tuple[int, int], ...]  # places of a tensor: numbers of an order and of a box


@dataclass(frozen=True)
class Arrangement:
    """The files of a checkpoint by the tensors that they hold."""

    files: Sequence[StoredFile]
    _cuts: dict[tuple[Alike, int], _Cuts] = field(default_factory=dict)
    _starts: dict[int, _Ints] = field(default_factory=dict)

    @cached_property
    def orders(self) -> list[tuple[Order, list[int]]]:
        """The different orders, each with the numbers of its files."""
        found: dict[int, tuple[Order, list[int]]] = {}  # by identity: an order is long
        for number, file in enumerate(self.files):
            found.setdefault(id(file.order), (file.order, []))[1].append(number)
        return list(found.values())

    @cached_property
    def _places(self) -> dict[int, list[tuple[int, int, int]]]:
        """By tensor its places: numbers of the order, of the box, and in the order."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        for number, (order, _) in enumerate(self.orders):
            for at, (tensor, box) in enumerate(zip(order.tensors, order.boxes, strict=True)):
                found.setdefault(tensor, []).append((number, box, at))
        return found

    def alike(self, tensor: int) -> Alike:
        """Equal for tensors that the files hold in the same boxes."""
        return tuple((order, box) for order, box, _ in self._places.get(tensor, ()))

    def boxes(self, tensor: int, dims: int) -> list[Box]:
        """The boxes in which the files hold a tensor of so many dims."""
        return self._of(tensor, dims).boxes

    def overlapping(self, tensor: int, box: Box) -> Iterator[tuple[int, StoredBox]]:
        """What the files hold of a box of a tensor, with the number of the file."""
        cuts, places = self._of(tensor, len(box.sizes)), self._places.get(tensor, [])
        low = np.array(box.offsets, np.int64)
        high = low + np.array(box.sizes, np.int64)
        for i in np.flatnonzero(((cuts.low < high) & (cuts.high > low)).all(1)).tolist():
            number = cuts.files[i]
            if number not in self._starts:
                self._starts[number] = self.files[number].starts()
            start = int(self._starts[number][places[cuts.places[i]][2]])
            yield number, StoredBox(tensor, cuts.boxes[i], start)

    def _of(self, tensor: int, dims: int) -> _Cuts:
        key = self.alike(tensor), dims
        if key not in self._cuts:
            held = [
                (number, place, self.files[number].different[box])
                for place, (order, box) in enumerate(key[0])
                for number in self.orders[order][1]
            ]
            boxes = [box for _, _, box in held]
            low = np.array([box.offsets for box in boxes], np.int64).reshape(len(boxes), dims)
            sizes = np.array([box.sizes for box in boxes], np.int64).reshape(len(boxes), dims)
            files, places = [number for number, _, _ in held], [place for _, place, _ in held]
            self._cuts[key] = _Cuts(files, places, boxes, low, low + sizes)
        return self._cuts[key]
