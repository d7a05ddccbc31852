"""What one rank holds of a tensor, and where it sits in the full tensor.

The words of the whole library:

* ``fqn``    clean, fully qualified name: what the unwrapped model calls the tensor
* ``shape``  always the full shape; ``local`` is what this rank holds of it
* ``Box``    offsets and sizes of a block inside the full tensor
* ``Shard``  ``local`` and the boxes that its elements fill, in order
* ``shadow`` the averaged twin of a shard: the same boxes, other storage
* ``axis``   of a mesh; ``dim`` of a tensor

::

    full [4, 6]            rank 0: one box            rank 1 of a flat layout: three boxes
    . . . . . .            Box((0, 0), (2, 6))        Box((1, 4), (1, 2))
    . . . . x x                                       Box((2, 0), (1, 6))
    x x x x x x                                       Box((3, 0), (1, 3))
    x x x . . .
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

Role = Literal["parameter", "frozen", "buffer"]
Dims = tuple[int, ...]

REPLACED = -1  # what `Shard.address` gives when the model holds another tensor now


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A block of a full tensor: ``offsets`` and ``sizes``, one number per dim."""

    offsets: Dims
    sizes: Dims

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def view(self, full: Tensor) -> Tensor:
        """The part of ``full`` inside this box, as a view: ``[*sizes]``."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            full = full.narrow(dim, offset, size)
        return full

    def intersect(self, other: Box) -> Box | None:
        """The common part in coordinates of the full tensor, None if it is empty."""
        pairs = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        offsets, sizes = [], []
        for a, n, b, m in pairs:
            start, stop = max(a, b), min(a + n, b + m)
            if stop <= start:
                return None
            offsets.append(start)
            sizes.append(stop - start)
        return Box(tuple(offsets), tuple(sizes))

    def relative_to(self, origin: Dims) -> Box:
        """This box with ``origin`` as the zero of its coordinates."""
        return Box(tuple(o - z for o, z in zip(self.offsets, origin, strict=True)), self.sizes)

    def shifted(self, origin: Dims) -> Box:
        """This box, whose coordinates count from ``origin``, in coordinates of the full tensor."""
        return Box(tuple(o + z for o, z in zip(self.offsets, origin, strict=True)), self.sizes)


def whole(shape: Sequence[int]) -> tuple[Box, ...]:
    """The one box that is the full tensor; none if the tensor is empty."""
    return (Box((0,) * len(shape), tuple(shape)),) if math.prod(shape) else ()


def flat_boxes(shape: Dims, start: int, numel: int) -> tuple[Box, ...]:
    """The row-major range ``[start, start + numel)`` of a tensor as boxes, in order.

    At most ``2 * len(shape) - 1`` boxes: the range enters and leaves each dim once.

    >>> flat_boxes((4, 6), 10, 11)  # doctest: +NORMALIZE_WHITESPACE
    (Box(offsets=(1, 4), sizes=(1, 2)), Box(offsets=(2, 0), sizes=(1, 6)),
     Box(offsets=(3, 0), sizes=(1, 3)))
    """
    if numel == 0:
        return ()
    if not shape:
        return (Box((), ()),)
    row = math.prod(shape[1:])
    stop = start + numel
    first, last = start // row, stop // row  # rows that the range starts in and stops in

    def part(index: int, begin: int, end: int) -> list[Box]:
        inner = flat_boxes(shape[1:], begin, end - begin)
        return [Box((index, *box.offsets), (1, *box.sizes)) for box in inner]

    if first == last:
        return tuple(part(first, start - first * row, stop - first * row))
    boxes: list[Box] = []
    if start % row:
        boxes += part(first, start % row, row)
        first += 1
    if last > first:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first, *zeros), (last - first, *shape[1:])))
    if stop % row:
        boxes += part(last, 0, stop % row)
    return tuple(boxes)


def split_box(box: Box, max_numel: int) -> Iterator[Box]:
    """``box`` cut into boxes of at most ``max_numel`` elements, in row-major order."""
    if box.numel <= max_numel:
        yield box
        return
    dim = next(d for d, size in enumerate(box.sizes) if size > 1)
    rows = max(1, max_numel // (box.numel // box.sizes[dim]))
    for begin in range(0, box.sizes[dim], rows):
        size = min(rows, box.sizes[dim] - begin)
        offsets = (*box.offsets[:dim], box.offsets[dim] + begin, *box.offsets[dim + 1 :])
        sizes = (*box.sizes[:dim], size, *box.sizes[dim + 1 :])
        yield from split_box(Box(offsets, sizes), max_numel)


def runs(shape: Dims, box: Box) -> tuple[int, list[int]]:
    """``box`` as stretches that are contiguous in the row-major full tensor.

    Returns ``(numel, starts)``: every stretch has ``numel`` elements, ``starts`` are their first
    elements in the flat full tensor, in row-major order of the box.
    """
    numel, inner, dim = 1, 1, len(shape)
    while dim > 0:  # grow over the trailing dims while the box fills them
        dim -= 1
        numel *= box.sizes[dim]
        if box.sizes[dim] != shape[dim]:
            break
    starts = [0]
    for d in reversed(range(len(shape))):
        if d < dim:
            rows = range(box.offsets[d], box.offsets[d] + box.sizes[d])
            starts = [row * inner + s for row in rows for s in starts]
        else:
            starts = [box.offsets[d] * inner + s for s in starts]
        inner *= shape[d]
    return numel, starts


Span = tuple[int, int]  # of one dim: first and last-plus-one
_MAX_CUT = 8  # dims that boxes are cut in, after those that they run through were joined


def check_covered(fqn: str, shape: Dims, boxes: Sequence[Box]) -> None:
    """Raises ValueError unless ``boxes`` hold each element of the tensor exactly once."""
    numel = math.prod(shape)
    held = sum(box.numel for box in boxes)
    if held != numel:
        raise ValueError(
            f"{fqn}: the ranks together hold {held} elements, expected {numel} for shape "
            f"{tuple(shape)}; pass group= with the ranks that share the model, all of them"
        )
    full, spans = _joined(shape, boxes)
    if len(full) > _MAX_CUT:
        raise ValueError(
            f"{fqn}: boxes that are cut in {len(full)} dims, expected {_MAX_CUT} or less"
        )
    place = _first_clash(full, spans) if numel else None
    if place is None and all(_inside(box, shape) for box in boxes):
        return
    clash = [
        box
        for box, span in zip(boxes, spans, strict=True)
        if place and all(a <= at < b for at, (a, b) in zip(place, span, strict=True))
    ]
    if len(clash) > 1:
        raise ValueError(
            f"{fqn}: {clash[0]} and {clash[1]} are held by different ranks and overlap; pass "
            "group= with the ranks that share the model"
        )
    raise ValueError(
        f"{fqn}: the ranks hold boxes that leave out a part of shape {tuple(shape)}, or reach "
        "beyond it; pass group= with the ranks that share the model, all of them"
    )


def _inside(box: Box, shape: Dims) -> bool:
    return all(o + n <= size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True))


def _joined(shape: Dims, boxes: Sequence[Box]) -> tuple[list[int], list[list[Span]]]:
    """The sizes of the tensor and the spans of the boxes, in as few dims as tell all.

    A dim that all boxes fill tells nothing. One that each box fills, or is a single row in the dim
    before, is joined with that: flat ranges become spans of one dim.
    """
    full: list[int] = []
    spans: list[list[Span]] = [[] for _ in boxes]
    for dim, size in enumerate(shape):
        parts = [(box.offsets[dim], box.offsets[dim] + box.sizes[dim]) for box in boxes]
        if all(part == (0, size) for part in parts):
            continue
        pairs = list(zip(spans, parts, strict=True))
        if full and all(part == (0, size) or _rows(span[-1]) == 1 for span, part in pairs):
            full[-1] *= size
            for span, (start, stop) in pairs:
                first, last = span[-1][0], span[-1][1] - 1
                span[-1] = (first * size + start, last * size + stop)
        else:
            full.append(size)
            for span, part in pairs:
                span.append(part)
    return full, spans


def _rows(span: Span) -> int:
    return span[1] - span[0]


def _first_clash(full: Sequence[int], spans: Sequence[Sequence[Span]]) -> Dims | None:
    """The first place that is not held exactly once; None if there is none.

    A box is told by its corners, a plus where it begins and a minus where it ends in each dim, as
    a stretch is by its two ends. The corners of boxes that fill the tensor once add up to those
    of the tensor, and no others do.
    """
    corners: dict[Dims, int] = {}
    for weight, box in [(-1, [(0, size) for size in full]), *((1, span) for span in spans)]:
        found: list[tuple[Dims, int]] = [((), weight)]
        for start, stop in box:
            begins = [((*corner, start), sign) for corner, sign in found]
            found = begins + [((*corner, stop), -sign) for corner, sign in found]
        for corner, sign in found:
            corners[corner] = corners.get(corner, 0) + sign
    return min((corner for corner, count in corners.items() if count), default=None)


@dataclass(frozen=True, eq=False)
class Loan:
    """Storage that is away, on a disk, but for the time that it is asked for.

    Args:
        hold: ``hold(write)`` brings it back for the length of a ``with`` block, as a flat tensor;
            with ``write=True`` what the block wrote is kept.
    """

    hold: Callable[[bool], AbstractContextManager[Tensor]]


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """What this rank holds of one tensor of the model.

    Args:
        fqn: clean, fully qualified name.
        local: the live storage on this rank: what the optimizer steps. With one box it has the
            box's sizes (any dense stride) or is flat; with several boxes it is a contiguous 1-D
            tensor that holds them one after the other, or has ``corners``. Empty if ``boxes`` is.
        shape: the full shape.
        boxes: where the elements of ``local`` sit in the full tensor, in order.
        role: ``"parameter"`` (trainable), ``"frozen"`` or ``"buffer"``.
        aliases: further names of the same tensor (tied weights).
        order: the dims of the full tensor from slowest to fastest in a flat ``local``; row-major
            if empty. FSDP1 flattens a channels_last weight in the order of its memory.
        address: gives the address of the live storage now, `REPLACED` if the model holds another
            tensor under this name; tells `update` when to read the model again.
        weights: what the forward computes with, where that is another tensor than ``local``: the
            16-bit copy of an fp32 master, laid out alike. None where ``local`` is it.
        reads_weights: the average is of ``weights``, not of ``local``.
        away: where ``local`` is lent and where it starts in the loan; ``local`` itself is then a
            stand-in of the same size without values. See `present`.
        replicas: the groups of ranks that are declared to hold the same ``local``: DDP's group,
            the replicated axes of a mesh.
        corners: where each box begins inside ``local``, which has the dims of the full tensor
            then; empty where the boxes lie one after the other.
        opaque: the class of a tensor that keeps its values in a form of its own (quantised
            weights); ``local`` is that tensor itself, of which nothing is read. Empty elsewhere.
    """

    fqn: str
    local: Tensor
    shape: Dims
    boxes: tuple[Box, ...]
    role: Role = "parameter"
    aliases: tuple[str, ...] = ()
    order: Dims = ()
    address: Callable[[], int] = field(default=lambda: 0, repr=False)
    weights: Tensor | None = None
    reads_weights: bool = False
    away: tuple[Loan, int] | None = field(default=None, repr=False)
    replicas: tuple[dist.ProcessGroup, ...] = field(default=(), repr=False)
    corners: tuple[Dims, ...] = ()
    opaque: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor; tied ones have several."""
        return (self.fqn, *self.aliases)

    @property
    def own(self) -> Tensor:
        """The model's own tensor: what its forward computes with."""
        return self.local if self.weights is None else self.weights

    @property
    def source(self) -> Tensor:
        """What is averaged."""
        return self.own if self.reads_weights else self.local

    def pieces(self, local: Tensor | None = None) -> Iterator[tuple[Box, Tensor]]:
        """Each box with the view of ``local`` that fills it, ``[*box.sizes]``.

        ``local`` may be any tensor laid out like this shard's (its shadow, a staging buffer).
        """
        local = self.local if local is None else local
        if self.corners:
            for box, corner in zip(self.boxes, self.corners, strict=True):
                yield box, Box(corner, box.sizes).view(local)
            return
        if len(self.boxes) == 1 and tuple(local.shape) == self.boxes[0].sizes and not self.order:
            yield self.boxes[0], local
            return
        start = 0
        for box in self.boxes:
            flat = local.narrow(0, start, box.numel)
            start += box.numel
            if self.order:
                stored = flat.view([box.sizes[dim] for dim in self.order])
                inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
                yield box, stored.permute(inverse)
            else:
                yield box, flat.view(box.sizes)
        assert start == local.numel(), (self.fqn, start, local.numel())


def present(shards: Sequence[Shard], *, write: bool = False) -> Iterator[list[Shard]]:
    """The shards in groups; while a group is at hand, the ``local`` of each is really there.

    Args:
        write: what is written into ``local`` is to be kept.
    """
    here: list[Shard] = []
    lent: dict[Loan, list[tuple[Shard, int]]] = {}
    for shard in shards:
        if shard.away is None:
            here.append(shard)
        else:
            lent.setdefault(shard.away[0], []).append((shard, shard.away[1]))
    if here:
        yield here
    for loan, group in lent.items():
        with loan.hold(write) as flat:
            yield [
                replace(s, local=flat.narrow(0, start, s.local.numel()), away=None)
                for s, start in group
            ]


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> Dims:
    """Dims from slowest to fastest in memory; empty when that is row-major.

    Raises:
        ValueError: the strides overlap or leave gaps.
    """
    dims = sorted(range(len(shape)), key=lambda d: (-stride[d], d))
    expected = 1
    for dim in reversed(dims):
        if shape[dim] == 1:
            continue
        if stride[dim] != expected:
            raise ValueError(f"strides {tuple(stride)} of shape {tuple(shape)} are not dense")
        expected *= shape[dim]
    kept = [dim for dim in dims if shape[dim] != 1]
    if kept == sorted(kept):
        return ()
    ones = [dim for dim in range(len(shape)) if shape[dim] == 1]
    return tuple(ones + kept)


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements of ``tensor`` share memory (an expanded tensor, for one). Exact."""
    dims = sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda dim: dim[1])
    reach = 1
    for size, stride in dims:
        if size > 1 and stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    # The dims reach into one another, which may still leave each element alone. Two elements whose
    # first difference is in dim d are, moved along, one at index 0 of it and one further on.
    for d in range(tensor.dim()):
        rest = tensor[(0,) * d]
        if rest.shape[0] > 1 and share_memory(rest[:1], rest[1:]):
            return True
    return False


class _Layout:
    """A tensor's memory as numpy takes it, which only looks at addresses."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        start = tensor.storage_offset() * size + _ALIGNED
        self.__array_interface__ = {
            "version": 3,
            "data": (start, False),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


_ALIGNED = 1 << 12  # an address that is not null
_MOST_WORK = 1 << 20  # candidates that numpy looks at before it gives up


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common; True where that is too hard."""
    try:
        first, second = np.asarray(_Layout(a)), np.asarray(_Layout(b))
        return bool(np.shares_memory(first, second, _MOST_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def dense_like(tensor: Tensor) -> Dims:
    """The strides of a dense tensor that keeps the memory order of ``tensor``."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def aligned_parts(a: Tensor, b: Tensor, max_numel: int) -> list[tuple[Tensor, Tensor]]:
    """Two tensors of one shape as pairs of views of at most ``max_numel`` elements each.

    Flat stretches of memory where both lie alike and dense, blocks of the shape elsewhere.
    """
    n = a.numel()
    if n == 0:
        return []
    if a.stride() == b.stride() and a.stride() == dense_like(a):
        flat = [t.as_strided((n,), (1,)) for t in (a, b)]
        return list(zip(*(torch.split(t, max_numel) for t in flat), strict=True))
    boxes = [part for box in whole(a.shape) for part in split_box(box, max_numel)]
    return [(box.view(a), box.view(b)) for box in boxes]


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
