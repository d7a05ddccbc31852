"""Boxes, that is blocks of a full tensor: split, intersected, checked to cover it once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardema.errors import ArgumentError

Dims = tuple[int, ...]


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

    def without(self, other: Box) -> Iterator[Box]:
        """The elements that are not in ``other``, as at most two boxes for each dim."""
        common = self.intersect(other)
        if common is None:
            yield self
            return
        offsets, sizes = list(self.offsets), list(self.sizes)
        for dim, (start, size) in enumerate(zip(common.offsets, common.sizes, strict=True)):
            end = offsets[dim] + sizes[dim]
            for first, last in ((offsets[dim], start), (start + size, end)):
                if first < last:
                    part = (*offsets[:dim], first, *offsets[dim + 1 :])
                    yield Box(part, (*sizes[:dim], last - first, *sizes[dim + 1 :]))
            offsets[dim], sizes[dim] = start, size

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


def contiguous_runs(shape: Dims, box: Box) -> tuple[int, list[int]]:
    """``box`` as runs that are contiguous in the row-major full tensor.

    Returns ``(numel, starts)``: every run has ``numel`` elements, ``starts`` are the indices of
    their first elements in the flat full tensor, in row-major order of the box.
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


Held = tuple[Box, tuple[int, ...]]  # a box, and the indices of the ranks that hold it


def without_overlaps(held: Sequence[Held]) -> list[Held]:
    """The same elements of the same ranks in boxes that do not overlap, sorted.

    Ranks may hold the same elements in other cuts. What one rank holds twice is left as it is.
    """
    parts: list[Held] = []
    for box, ranks in held:
        rest, settled = [box], list[Held]()
        for other, others in parts:
            common = [c for piece in rest if (c := piece.intersect(other)) is not None]
            if not common or set(ranks) & set(others):
                settled.append((other, others))
                continue
            left = [other]
            for c in common:
                left = [piece for whole in left for piece in whole.without(c)]
                settled.append((c, tuple(sorted((*others, *ranks)))))
            settled += [(piece, others) for piece in left]
            rest = [piece for whole in rest for piece in whole.without(other)]
        parts = settled + [(piece, ranks) for piece in rest]
    return sorted(parts)


Span = tuple[int, int]  # of one dim: first index and end


_PRIME = (1 << 61) - 1


def check_covered(fqn: str, shape: Dims, boxes: Sequence[Box]) -> None:
    """Raises ValueError unless ``boxes`` hold each element of the tensor exactly once."""
    numel = math.prod(shape)
    held = sum(box.numel for box in boxes)
    if held != numel:
        raise ArgumentError(
            f"{fqn}: the ranks together hold {held} elements, expected {numel} for shape "
            f"{tuple(shape)}; pass group= with the ranks that share the model, all of them"
        )
    full, spans = _joined(shape, boxes)
    place = _first_clash(full, spans) if numel else None
    if place is None and all(_inside(box, shape) for box in boxes):
        return
    clash = [
        box
        for box, span in zip(boxes, spans, strict=True)
        if place and all(a <= at < b for at, (a, b) in zip(place, span, strict=True))
    ]
    if len(clash) > 1:
        raise ArgumentError(
            f"{fqn}: {clash[0]} and {clash[1]} are held by different ranks and overlap; pass "
            "group= with the ranks that share the model"
        )
    raise ArgumentError(
        f"{fqn}: the ranks hold boxes that leave out a part of shape {tuple(shape)}, or reach "
        "beyond it; pass group= with the ranks that share the model, all of them"
    )


def _inside(box: Box, shape: Dims) -> bool:
    return all(o + n <= size for o, n, size in zip(box.offsets, box.sizes, shape, strict=True))


def _joined(shape: Dims, boxes: Sequence[Box]) -> tuple[list[int], list[list[Span]]]:
    """The sizes of the tensor and the spans of the boxes, in as few dims as possible.

    A dim that all boxes fill is omitted. A dim is joined with the previous one if each box fills it
    or is a single row in the previous one: flat ranges become spans of one dim.
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
    """The first index that is not held exactly once; None if there is none.

    A box is represented by its corners, with sign plus where it begins and minus where it ends in
    each dim, as an interval by its two ends. The signed corners of boxes add up to those of the
    tensor if and only if the boxes cover it exactly once.

    As a product over the dims, a box is a polynomial of its two ends in each dim. Random numbers in
    place of the ends tell whether such a sum is zero, without listing corners: a box has 2^dims.
    """
    number: dict[tuple[int, int], int] = {}  # by dim and end

    def rest(dim: int, box: Sequence[Span]) -> int:
        """What the box is in the dims after ``dim``."""
        product = 1
        for d in range(dim + 1, len(full)):
            first, last = (number.setdefault((d, end), secrets.randbits(61)) for end in box[d])
            product = product * (first - last) % _PRIME
        return product

    place: list[int] = []
    terms = [(-1, [(0, size) for size in full]), *((1, list(span)) for span in spans)]
    for dim in range(len(full)):
        sums: dict[int, int] = {}
        for weight, box in terms:
            part = weight * rest(dim, box)
            start, stop = box[dim]
            sums[start] = sums.get(start, 0) + part
            sums[stop] = sums.get(stop, 0) - part
        at = min((end for end, total in sums.items() if total % _PRIME), default=None)
        if at is None:
            return None
        place.append(at)
        terms = [(w if at == box[dim][0] else -w, box) for w, box in terms if at in box[dim]]
    return tuple(place) if sum(weight for weight, _ in terms) else None
