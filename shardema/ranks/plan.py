"""The plan: which rank holds which boxes of which tensor; made once and used by every gather.

::

    shards of all ranks  -make_plan->  Plan      which rank holds which box of which tensor
    Plan, local values   -Contents->   what is gathered, exported or saved, and in what dtype
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shardema.errors import abbreviate
from shardema.ranks.agree import Ranks
from shardema.shards.boxes import Box, Dims, check_covered, without_overlaps
from shardema.shards.shard import Role, Shard


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the model as all ranks together hold it.

    Attributes:
        dtype: of the model's own tensor; an average of it may have another.
        device: device type of its storage, or of its average's.
        averaged: whether it is averaged.
        file_name: its name in an export.
        opaque: the class of a tensor that has no values to gather; see `Shard`. Else empty.
        holders: each distinct box with the indices of the ranks that hold it, ascending. Where
            ranks hold the same elements in other cuts, a box is a part of what they hold.
        stem: of its file in an export, ``<stem>.safetensors``; empty if it is not exported.
    """

    fqn: str
    shape: Dims
    dtype: torch.dtype
    device: str
    role: Role
    averaged: bool
    aliases: tuple[str, ...]
    file_name: str
    opaque: str
    holders: tuple[tuple[Box, tuple[int, ...]], ...]
    stem: str = "model"


@dataclass(frozen=True)
class Plan:
    """Every tensor of the model and which rank holds which part; the same on all ranks.

    Attributes:
        items: in the order of the unwrapped model's state_dict.
        writers: for each item, the index of the rank that writes each of its boxes; the work is
            divided between replicas.
    """

    items: tuple[Item, ...]
    writers: tuple[tuple[int, ...], ...] = field(repr=False)

    def readers(self, index: int) -> list[int]:
        """For each box of item ``index`` the index of the rank that sends it: the first holder."""
        return [holders[0] for _, holders in self.items[index].holders]


class Holdings:
    """This rank's values of any box that it holds.

    Args:
        plan: the plan that ``shards`` are part of.
        shards: this rank's shards.
        shadows: by fqn, tensors that replace a shard's own tensor.
    """

    def __init__(self, plan: Plan, shards: Sequence[Shard], shadows: Mapping[str, Tensor]) -> None:
        by_fqn = {
            s.fqn: list(s.local_boxes(shadows.get(s.fqn, s.own))) for s in shards if not s.opaque
        }
        self._boxes = [by_fqn.get(item.fqn, []) for item in plan.items]

    def __call__(self, index: int, box: Box) -> Tensor:
        """Values of ``box`` of item ``index``, a view ``[*box.sizes]``."""
        for held, values in self._boxes[index]:
            if held.intersect(box) == box:
                return box.relative_to(held.offsets).view(values)
        raise AssertionError((index, box))


@dataclass(frozen=True)
class Contents:
    """Tensors to gather or to write: which ones, this rank's values, and their dtype.

    Attributes:
        plan: which rank holds which boxes.
        chosen: indices of the plan's items, in the order of the result.
        holdings: returns this rank's values of a box of item ``index``, ``[*box.sizes]``.
        dtype: returns the dtype that an item is sent and written in.
        ranks: the ranks that gather or write together.
        name: of the average; None for the model's own tensors.
        companions: returns the lost bits of a box, of which a save makes one float64 with its
            value; None if there are none.
    """

    plan: Plan
    chosen: Sequence[int]
    holdings: Callable[[int, Box], Tensor]
    dtype: Callable[[Item], torch.dtype]
    ranks: Ranks
    name: str | None = None
    companions: Callable[[int, Box], Tensor | None] = lambda index, box: None

    @property
    def items(self) -> Iterator[Item]:
        """The chosen items."""
        return (self.plan.items[index] for index in self.chosen)

    def only(self, chosen: Sequence[int]) -> Contents:
        """The same with other chosen items."""
        return replace(self, chosen=chosen)

    def loads(self) -> list[int]:
        """Bytes of the chosen items that each of the ranks writes."""
        loads = [0] * self.ranks.size
        for index, item in zip(self.chosen, self.items, strict=True):
            itemsize = self.dtype(item).itemsize
            boxes = (box for box, _ in item.holders)
            for box, writer in zip(boxes, self.plan.writers[index], strict=True):
                loads[writer] += box.numel * itemsize
        return loads


def make_plan(
    shards: Sequence[Shard],
    averaged: Container[str],
    ranks: Ranks,
    dropped: Container[str] = (),
) -> Plan:
    """Exchanges what every rank holds. Collective over ``ranks``.

    Args:
        shards: this rank's shards.
        averaged: fqns of the averaged tensors.
        dropped: names of tied tensors that an export does not use, if there is another.

    Raises:
        ValueError: ranks disagree about a tensor, or some part of it is held by no rank or twice.
    """
    same: dict[Any, Any] = {}  # equal boxes are one object, so they are pickled once
    mine = []
    for shard in shards:
        boxes = tuple((box.offsets, box.sizes) for box in shard.boxes)
        mine.append((shard.fqn, facts_of(shard, averaged, dropped), same.setdefault(boxes, boxes)))
    with _uncollected():
        items = _merged(ranks.all_gather(mine), ranks)
    return Plan(tuple(items), _share_writing(items, ranks.size))


def _merged(everything: Sequence[Any], ranks: Ranks) -> list[Item]:
    """One item for each fqn, from the shards of every rank."""
    merged: dict[str, dict[str, Any]] = {}
    for index, theirs in enumerate(everything):
        for fqn, facts, boxes in theirs:
            entry = merged.get(fqn)
            if entry is None:
                entry = merged[fqn] = {"facts": facts, "first": index, "boxes": {}}
            elif entry["facts"] != facts:
                raise ValueError(_disagreement(fqn, entry, facts, index, ranks))
            held = entry["boxes"]
            for box in boxes:
                if box in held:
                    held[box].append(index)
                else:
                    held[box] = [index]
    items = []
    known: dict[Any, tuple[tuple[Box, tuple[int, ...]], ...]] = {}  # layers have equal shapes
    for fqn, entry in merged.items():
        shape = entry["facts"][0]
        layout = tuple(sorted((box, tuple(who)) for box, who in entry["boxes"].items()))
        holders = known.get((shape, layout))
        if holders is None:
            holders = tuple((Box(*box), who) for box, who in layout)
            if sum(box.numel for box, _ in holders) > math.prod(shape):
                holders = tuple(without_overlaps(holders))  # replicas that are cut in other ways
            check_covered(fqn, shape, [box for box, _ in holders])
            known[shape, layout] = holders
        items.append(Item(*(fqn, *entry["facts"], holders)))
    return items


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Disables garbage collection inside the block: millions of objects are created, all in use."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def facts_of(shard: Shard, averaged: Container[str], dropped: Container[str]) -> tuple[Any, ...]:
    """What all ranks must agree on about a tensor: the fields of `Item` from ``shape`` on."""
    names = (shard.fqn, *shard.aliases)
    file_name = next((name for name in names if name not in dropped), shard.fqn)
    is_averaged = shard.fqn in averaged
    return (
        shard.shape,
        shard.own.dtype,
        (shard.source if is_averaged else shard.own).device.type,
        shard.role,
        is_averaged,
        shard.aliases,
        file_name,
        shard.opaque,
    )


def _disagreement(
    fqn: str, entry: dict[str, Any], facts: tuple[Any, ...], index: int, ranks: Ranks
) -> str:
    words = ("shape", "dtype", "device", "role", "averaged", "tied names", "file name", "class")
    pairs = zip(words, facts, entry["facts"], strict=True)
    word, got, expected = next(pair for pair in pairs if pair[1] != pair[2])
    if word == "averaged" and facts[3] == "buffer":
        return (
            f"{fqn}: this buffer is finite on some ranks only (rank {ranks.ranks[index]}: {got}, "
            f"rank {ranks.ranks[entry['first']]}: {expected}), and averaged there; give it "
            f'buffers={{"{fqn}": "copy"}}'
        )
    return (
        f"{fqn}: rank {ranks.ranks[index]} has {word} {got}, rank {ranks.ranks[entry['first']]} "
        f"has {expected}; the ranks do not share one model: pass group= with those that do"
    )


def _share_writing(items: Sequence[Item], size: int) -> tuple[tuple[int, ...], ...]:
    """The writer of each box: the holder with the least to write; for buffers the first one.

    Buffers may differ between replicas (BatchNorm under DDP); the first rank's are saved.
    """
    load = [0] * size
    writers = []
    for item in items:
        chosen = []
        for box, holders in item.holders:
            alone = len(holders) == 1 or item.role == "buffer"
            best = holders[0] if alone else min(holders, key=load.__getitem__)
            load[best] += box.numel * item.dtype.itemsize
            chosen.append(best)
        writers.append(tuple(chosen))
    return tuple(writers)


def refuse_opaque(op: str, plan: Plan, chosen: Sequence[int], remedy: str) -> None:
    """Raises ValueError if a chosen item has no values to gather."""
    odd = [plan.items[index] for index in chosen if plan.items[index].opaque]
    if odd:
        raise ValueError(
            f"{op}: {abbreviate([item.fqn for item in odd])}: {odd[0].opaque} is a tensor "
            "subclass that stores its values in its own format, which cannot be split; "
            f"{remedy}"
        )
