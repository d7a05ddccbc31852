"""What the ranks tell each other of their shards, and the plan that each makes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, cast

import pytest
import torch

from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Plan, make_plan
from shardema.shards.boxes import Box, flat_boxes, whole
from shardema.shards.shard import Shard

ROWS = (4, 12)  # of a tensor


class Exchange:
    """Stands for the ranks, each a thread, and keeps what they tell."""

    def __init__(self, size: int) -> None:
        self.barrier = Barrier(size)
        self.told: list[list[Any]] = []
        self.slots: list[Any] = [None] * size

    def of(self, index: int) -> Ranks:
        return cast(Ranks, _Rank(self, index))


class _Rank:
    def __init__(self, exchange: Exchange, index: int) -> None:
        self._exchange, self.index = exchange, index
        self.size = len(exchange.slots)
        self.ranks = tuple(range(self.size))
        self.plans: dict[Any, Plan] = {}

    def all_gather(self, mine: Any) -> list[Any]:
        self._exchange.slots[self.index] = mine
        if self._exchange.barrier.wait() == 0:
            self._exchange.told.append(list(self._exchange.slots))
        self._exchange.barrier.wait()
        return self._exchange.told[-1]


def planned(shards: Sequence[Sequence[Shard]]) -> tuple[list[Plan], list[list[Any]]]:
    """The plan of each rank from the shards of each, and what they told in each exchange."""
    exchange = Exchange(len(shards))

    def work(index: int) -> Plan:
        return make_plan(shards[index], {s.fqn for s in shards[index]}, exchange.of(index))

    with ThreadPoolExecutor(len(shards)) as pool:
        plans = list(pool.map(work, range(len(shards))))
    return plans, exchange.told


def test_a_second_object_takes_the_plan_that_its_ranks_made_for_the_first() -> None:
    """Also where some of the ranks have it no longer, or tell other facts than others."""
    exchange = Exchange(3)
    ranks = [exchange.of(index) for index in range(3)]

    def work(one: tuple[Ranks, list[Shard]]) -> Plan:
        return make_plan(one[1], {s.fqn for s in one[1]}, one[0])

    def plan_of(shards: Sequence[list[Shard]]) -> list[Plan]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(work, zip(ranks, shards, strict=True)))

    fewer = by_rows(5, 3)
    for held in fewer[1:]:
        held.append(shard("of two", [Box((held[0].boxes[0].offsets[0] - 1,), (1,))], (2,)))
    for shards in (by_rows(5, 3), fewer):
        first = plan_of(shards)
        ranks[1].plans.clear()
        second = plan_of(shards)
        assert second == first
        assert [a is b for a, b in zip(first, second, strict=True)] == [True, False, True]
    for count in range(6, 10):
        plan_of(by_rows(count, 3))
    assert {len(one.plans) for one in ranks} == {4}
    third = plan_of(fewer)
    assert third == second
    assert not any(a is b for a, b in zip(second, third, strict=True))


def shard(fqn: str, boxes: Sequence[Box], shape: tuple[int, ...] = ROWS) -> Shard:
    return Shard(fqn, torch.empty(sum(box.numel for box in boxes)), shape, tuple(boxes))


def by_rows(count: int, size: int) -> list[list[Shard]]:
    """Tensors whose rows are divided among the ranks."""
    return [
        [shard(f"w{i}", [Box((rank, 0), (1, ROWS[1]))], (size, ROWS[1])) for i in range(count)]
        for rank in range(size)
    ]


def flat(count: int, size: int) -> list[list[Shard]]:
    """Tensors one after the other, in one flat one that is divided among the ranks."""
    numel = ROWS[0] * ROWS[1]
    each = -(-count * numel // size)

    def held(index: int, rank: int) -> tuple[Box, ...]:
        start = max(rank * each, index * numel) - index * numel
        stop = min((rank + 1) * each, (index + 1) * numel) - index * numel
        return flat_boxes(ROWS, start, max(0, stop - start))

    return [[shard(f"w{i}", held(i, rank)) for i in range(count)] for rank in range(size)]


def drawn(seed: int, size: int) -> list[list[Shard]]:
    """Tensors of all kinds, some of which are on some ranks only."""
    draw = random.Random(seed)
    shards: list[list[Shard]] = [[] for _ in range(size)]
    for index, kind in enumerate(draw.choices(("rows", "whole", "one", "some", "empty"), k=9)):
        fqn, shape = f"{kind}{index}", (size * draw.randint(1, 2), 3)
        some = sorted(draw.sample(range(size), draw.randint(1, size)))
        for rank, theirs in enumerate(shards):
            rows = shape[0] // size
            boxes = {
                "rows": [Box((rank * rows, 0), (rows, 3))],
                "one": list(whole(shape)) * (rank == some[0]),
                "empty": [],
            }.get(kind, list(whole(shape)))
            if kind != "some" or rank in some:
                theirs.append(shard(fqn, boxes, (0, 3) if kind == "empty" else shape))
    return shards


def expected(shards: Sequence[Sequence[Shard]]) -> dict[str, dict[Box, tuple[int, ...]]]:
    """The holders of each box of each tensor, one by one."""
    found: dict[str, dict[Box, tuple[int, ...]]] = {}
    for rank, theirs in enumerate(shards):
        for one in theirs:
            holders = found.setdefault(one.fqn, {})
            for box in one.boxes:
                holders[box] = (*holders.get(box, ()), rank)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_all_ranks_make_the_same_plan_of_any_layouts(seed: int) -> None:
    shards = drawn(seed, size=2 + seed % 3)
    plans, told = planned(shards)
    assert all(plan == plans[0] for plan in plans)
    found = {item.fqn: dict(item.holders) for item in plans[0].items}
    assert found == expected(shards)
    assert list(found) == list(expected(shards))
    assert len(told) == 1 + any(len(theirs) != len(shards[0]) for theirs in shards)


def test_every_box_is_written_by_the_holder_with_the_least_to_write() -> None:
    everywhere = [[shard(f"w{i}", whole(ROWS)) for i in range(4)] for _ in range(2)]
    plans, _ = planned(everywhere)
    assert plans[0].writers == ((0,), (1,), (0,), (1,))


def test_what_a_rank_tells_does_not_grow_with_tensors_of_one_layout() -> None:
    _, (few,) = planned(by_rows(4, 2))
    _, (many,) = planned(by_rows(400, 2))
    for one, other in zip(few, many, strict=True):
        assert one.layouts == other.layouts
        assert len(other.numbers) < len(one.numbers) + 16


def test_ranks_list_the_tensors_that_they_hold_of_a_flat_one() -> None:
    shards = flat(60, 4)
    plans, (told,) = planned(shards)
    assert {item.fqn: dict(item.holders) for item in plans[0].items} == expected(shards)
    assert sum(len(one.layouts) for one in told) <= 4 * 4  # where a rank begins, ends, and between


def test_facts_that_differ_are_named_with_the_first_ranks_that_differ() -> None:
    shards = by_rows(3, 3)
    odd = shards[2][1]
    shards[2][1] = Shard(odd.fqn, odd.local.double(), odd.shape, odd.boxes)
    with pytest.raises(
        ValueError, match=r"^w1: rank 2 has dtype torch.float64, rank 0 has torch.float32"
    ):
        planned(shards)
