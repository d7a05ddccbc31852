"""Boxes: flat ranges, cuts and stretches are exact for every shape and range."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from shardema.shards.boxes import (
    Box,
    check_covered,
    contiguous_runs,
    flat_boxes,
    split_box,
    whole,
    without_overlaps,
)
from shardema.shards.shard import Shard
from shardema.shards.strides import aligned_parts, memory_order, overlaps

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    n = math.prod(shape)
    start = draw(st.integers(0, n))
    return shape, start, draw(st.integers(0, n - start))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = draw(shapes)
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    pairs = zip(shape, offsets, strict=True)
    return shape, Box(offsets, tuple(draw(st.integers(1, n - o)) for n, o in pairs))


@given(ranges())
def test_flat_boxes_hold_the_range_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, numel = case
    full = torch.arange(math.prod(shape)).view(shape)
    found = flat_boxes(shape, start, numel)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    elements = [i for box in found for i in box.view(full).reshape(-1).tolist()]
    assert elements == list(range(start, start + numel))


@given(boxes())
def test_runs_are_the_contiguous_stretches(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    numel, starts = contiguous_runs(shape, box)
    flat = [start + i for start in starts for i in range(numel)]
    assert flat == box.view(torch.arange(math.prod(shape)).view(shape)).reshape(-1).tolist()


@given(shapes, st.data())
def test_boxes_without_overlaps_are_held_by_the_same_ranks(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    n = math.prod(shape)
    cuts = [sorted(data.draw(st.lists(st.integers(0, n), max_size=4))) for _ in range(3)]
    held: dict[Box, tuple[int, ...]] = {}  # three replicas, each cut in its own way by its ranks
    for copy, cut in enumerate(cuts):
        for part, (start, stop) in enumerate(itertools.pairwise([0, *cut, n])):
            for box in flat_boxes(shape, start, stop - start):
                held[box] = (*held.get(box, ()), 10 * copy + part)

    def ranks_of(pairs: list[tuple[Box, tuple[int, ...]]]) -> list[list[int]]:
        places = torch.arange(n).view(shape)
        found: list[list[int]] = [[] for _ in range(n)]
        for box, ranks in pairs:
            for place in box.view(places).flatten().tolist():
                found[place] += ranks
        return [sorted(ranks) for ranks in found]

    parts = without_overlaps(list(held.items()))
    check_covered("w", shape, [box for box, _ in parts])
    assert ranks_of(parts) == ranks_of(list(held.items()))


def test_what_a_rank_holds_twice_stays_an_overlap() -> None:
    twice = [(Box((0,), (3,)), (0,)), (Box((2,), (2,)), (0,))]
    assert without_overlaps(twice) == twice


@given(boxes(), st.integers(1, 9))
def test_a_split_box_is_whole_and_small(case: tuple[tuple[int, ...], Box], most: int) -> None:
    shape, box = case
    full = torch.arange(math.prod(shape)).view(shape)
    parts = list(split_box(box, most))
    assert max(part.numel for part in parts) <= most
    elements = [i for part in parts for i in part.view(full).reshape(-1).tolist()]
    assert elements == box.view(full).reshape(-1).tolist()


@given(boxes(), st.data())
def test_an_intersection_holds_the_common_elements(
    case: tuple[tuple[int, ...], Box], data: st.DataObject
) -> None:
    shape, box = case
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    pairs = zip(shape, offsets, strict=True)
    other = Box(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in pairs))
    full = torch.arange(math.prod(shape)).view(shape)
    mine, theirs = (set(b.view(full).reshape(-1).tolist()) for b in (box, other))
    common = box.intersect(other)
    assert (set() if common is None else set(common.view(full).reshape(-1).tolist())) == (
        mine & theirs
    )


@given(st.permutations([0, 1, 2, 3]))
@settings(max_examples=24)
def test_a_flat_range_of_any_memory_order_finds_its_elements(order: list[int]) -> None:
    stored = torch.arange(2 * 3 * 4 * 5).view([(2, 3, 4, 5)[d] for d in order])
    inverse = sorted(range(4), key=order.__getitem__)
    full = stored.permute(inverse)  # [2, 3, 4, 5] in some memory order
    kept = memory_order(full.shape, full.stride())
    assert (kept or (0, 1, 2, 3)) == tuple(order)
    start, numel = 17, 61
    sizes = tuple(full.shape[d] for d in order)
    placed = []
    for box in flat_boxes(sizes, start, numel):
        offsets = tuple(box.offsets[i] for i in inverse)
        placed.append(Box(offsets, tuple(box.sizes[i] for i in inverse)))
    flat = full.permute(order).reshape(-1)[start : start + numel]
    shard = Shard("w", flat, tuple(full.shape), tuple(placed), order=kept)
    for box, values in shard.local_boxes():
        assert torch.equal(values, box.view(full))


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        ([Box((0, 0), (2, 3)), Box((2, 0), (1, 3))], "hold 9 elements, expected 12"),
        ([Box((0, 0), (3, 3)), Box((2, 0), (1, 3))], "overlap"),
        ([Box((0, 0), (4, 3))], None),
        ([Box((0, 0), (4, 1)), Box((0, 1), (2, 2)), Box((2, 1), (2, 2))], None),
        ([Box((0, 0), (4, 2)), Box((0, 1), (4, 1))], "overlap"),
        ([Box((0, 0), (4, 2)), Box((1, 2), (4, 1))], "leave out a part .* or reach beyond it"),
        ([Box((0, 0), (1, 4)), Box((1, 1), (2, 2)), Box((3, 0), (1, 4))], "leave out|reach beyond"),
        ([Box((0, 0), (1, 4)), Box((1, 1), (1, 2)), Box((2, 0), (2, 3))], "reach beyond it"),
        ([Box((row, col), (1, 1)) for row in range(4) for col in range(3)], None),
    ],
)
def test_coverage_finds_holes_and_overlaps(held: list[Box], fault: str | None) -> None:
    if fault is None:
        check_covered("w", (4, 3), sorted(held))
        return
    with pytest.raises(ValueError, match=fault):
        check_covered("w", (4, 3), sorted(held))


def test_coverage_is_told_of_tens_of_thousands_of_boxes() -> None:
    n = 20_000
    for shape, boxes in (
        ((1, n), [Box((0, i), (1, 1)) for i in range(n)]),
        ((400, 100), [Box((2 * i, j), (2, 1)) for i in range(200) for j in range(100)]),
        ((2,) * 12, [Box(at, (1,) * 12) for at in itertools.product((0, 1), repeat=12)]),
    ):
        check_covered("w", shape, boxes)
        with pytest.raises(ValueError, match="overlap"):
            check_covered("w", shape, [*boxes[:-1], boxes[0]])


def test_coverage_of_boxes_in_many_dims_needs_no_more_memory_than_they_do() -> None:
    """In 8 dims a box has 256 corners: of a thousand boxes these would be 60 MB."""
    rng = random.Random(0)
    sizes = (32,) * 6 + (16,) * 2
    boxes = [Box(tuple(rng.randrange(64 - n) for n in sizes), sizes) for _ in range(1024)]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"overlap|leave out"):
            check_covered("w", (64,) * 8, boxes)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.data())
def test_coverage_agrees_with_counting(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    numel = math.prod(shape)
    cuts = sorted(data.draw(st.sets(st.integers(1, numel), max_size=4)) | {numel})
    boxes = [
        box
        for start, stop in zip([0, *cuts], cuts, strict=False)
        for box in flat_boxes(shape, start, stop - start)
    ]
    for _ in range(data.draw(st.integers(0, 2))):  # moved or turned
        number = data.draw(st.integers(0, len(boxes) - 1))
        offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        sizes = tuple(data.draw(st.permutations(boxes[number].sizes)))
        boxes[number] = Box(offsets, sizes)
    held: dict[tuple[int, ...], int] = {}
    for box in boxes:
        for at in itertools.product(
            *(range(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        ):
            held[at] = held.get(at, 0) + 1
    once = dict.fromkeys(itertools.product(*map(range, shape)), 1)
    try:
        check_covered("w", shape, boxes)
        told = True
    except ValueError:
        told = False
    assert told == (held == once)


def test_strides_that_share_memory_are_found() -> None:
    assert overlaps(torch.zeros(3).expand(4, 3))
    assert overlaps(torch.zeros(9).as_strided((4, 3), (2, 1)))
    assert not overlaps(torch.zeros(4, 3).t())
    assert not overlaps(torch.zeros(4, 6)[:, ::2])
    with pytest.raises(ValueError, match="not dense"):
        memory_order((4, 3), (6, 2))


@pytest.mark.parametrize("kind", ["row-major", "transposed", "gaps"])
def test_aligned_parts_pair_the_same_elements(kind: str) -> None:
    a = torch.arange(35.0).view(5, 7)
    b = torch.empty(5, 7)
    if kind == "transposed":
        a, b = a.t(), torch.empty(5, 7).t()
    if kind == "gaps":
        a, b = a[:, ::2], torch.empty(5, 4)
    for mine, theirs in aligned_parts(a, b, 6):
        assert mine.numel() <= 6
        theirs.copy_(mine)
    assert torch.equal(a, b)
    assert whole(()) == (Box((), ()),)
    assert whole((0, 3)) == ()
