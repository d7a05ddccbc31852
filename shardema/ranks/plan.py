"""The plan: which rank holds which boxes of which tensor; made once and used by every gather.

::

    shards of a rank     -Told->      what it tells the others: a digest of the tensors' facts, and
                                       the different layouts of its tensors
    Told of all ranks   -make_plan->  Plan      which rank holds which box of which tensor
    Plan, local values   -Contents->   what is gathered, exported or saved, and in what dtype

Facts are equal on most ranks, so they are sent only by the first rank of each digest. Tensors have
few layouts where they are sharded by rows, and most have none where they are parts of a flat one.
"""

from __future__ import annotations

import contextlib
import gc
import math
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from shardema.errors import ArgumentError, abbreviate
from shardema.ranks.agree import Ranks
from shardema.shards.boxes import Box, Dims, check_covered, without_overlaps
from shardema.shards.shard import Role, Shard

_KEPT = 4  # plans that are kept for further objects of the same ranks
_Holders = tuple[tuple[Box, tuple[int, ...]], ...]


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
    holders: _Holders
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
    facts = [(shard.fqn, facts_of(shard, averaged, dropped)) for shard in shards]
    with _uncollected():
        told = tuple(ranks.all_gather(Told.of([s.boxes for s in shards], facts)))
        by_digest = _all_facts(facts, [one.digest for one in told], ranks)
        known = ranks.plans
        plan: Plan | None = known.get(told)
        if plan is None:  # what else is exchanged does not depend on it
            items = _merged(by_digest, told, ranks)
            plan = known[told] = Plan(tuple(items), _share_writing(items, ranks.size))
        while len(known) > _KEPT:
            del known[next(iter(known))]
    return plan


_Facts = Sequence[tuple[str, tuple[Any, ...]]]  # the fqn of each tensor, and its `facts_of`
_Layout = tuple[tuple[Dims, Dims], ...]  # the boxes that a rank holds of a tensor


class Told(NamedTuple):
    """What a rank tells of its shards: short if its tensors have few shapes, or it holds few.

    Attributes:
        digest: of its `_Facts`, which are the same on most ranks.
        numbers: for each of its tensors, that of its layout; compressed.
        layouts: the different ones of its tensors.
    """

    digest: bytes
    numbers: bytes
    layouts: tuple[_Layout, ...]

    @classmethod
    def of(cls, held: Sequence[Sequence[Box]], facts: _Facts) -> Told:
        """From the boxes that the rank holds of each of its tensors."""
        number: dict[_Layout, int] = {}
        layouts = (tuple((box.offsets, box.sizes) for box in boxes) for boxes in held)
        numbers = np.array([number.setdefault(one, len(number)) for one in layouts], np.uint32)
        digest = xxhash.xxh3_128_digest(repr(facts).encode())
        return cls(digest, zlib.compress(numbers.tobytes()), tuple(number))


def _merged(by_digest: Mapping[bytes, _Facts], told: Sequence[Told], ranks: Ranks) -> list[Item]:
    """One item for each fqn, from what all ranks told."""
    known = _agreed(by_digest, [one.digest for one in told], ranks)
    place = {fqn: index for index, fqn in enumerate(known)}
    places = {
        digest: np.array([place[fqn] for fqn, _ in theirs], np.int64)
        for digest, theirs in by_digest.items()
    }
    number: dict[_Layout, int] = {(): 0}  # of all ranks
    held = np.zeros((len(known), len(told)), np.uint32)  # the layout of each tensor on each rank
    for index, (digest, numbers, layouts) in enumerate(told):
        own = np.array([number.setdefault(one, len(number)) for one in layouts], np.uint32)
        held[places[digest], index] = own[np.frombuffer(zlib.decompress(numbers), np.uint32)]
    layout = list(number)
    made: dict[Any, _Holders] = {}  # layers are held alike
    items = []
    for (fqn, theirs), column in zip(known.items(), held, strict=True):
        key = theirs[0], column.tobytes()
        if key not in made:
            made[key] = _holders(theirs[0], [layout[one] for one in column.tolist()])
            check_covered(fqn, theirs[0], [box for box, _ in made[key]])
        items.append(Item(*(fqn, *theirs, made[key])))
    return items


def _all_facts(facts: _Facts, digests: Sequence[bytes], ranks: Ranks) -> dict[bytes, _Facts]:
    """The different facts by their digests, in the order of the ranks that have them first."""
    if len(set(digests)) == 1:
        return {digests[0]: facts}
    first = digests.index(digests[ranks.index]) == ranks.index
    listed = ranks.all_gather(facts if first else None)
    return {
        digest: theirs for digest, theirs in zip(digests, listed, strict=True) if theirs is not None
    }


def _agreed(
    by_digest: Mapping[bytes, _Facts], digests: Sequence[bytes], ranks: Ranks
) -> dict[str, tuple[Any, ...]]:
    """What the ranks that have a tensor agree on, by fqn."""
    agreed: dict[str, tuple[Any, ...]] = {}
    first: dict[str, int] = {}
    for digest, theirs in by_digest.items():
        index = digests.index(digest)
        for fqn, facts in theirs:
            if agreed.setdefault(fqn, facts) != facts:
                raise ArgumentError(
                    _disagreement(fqn, agreed[fqn], first[fqn], facts, index, ranks)
                )
            first.setdefault(fqn, index)
    return agreed


def _holders(shape: Dims, layouts: Sequence[_Layout]) -> _Holders:
    """Each distinct box of a tensor and the ranks that hold it, from the layout of each rank."""
    ranks_of: dict[tuple[Dims, Dims], list[int]] = {}
    for index, layout in enumerate(layouts):
        for box in layout:
            ranks_of.setdefault(box, []).append(index)
    holders = tuple((Box(*box), tuple(who)) for box, who in sorted(ranks_of.items()))
    if sum(box.numel for box, _ in holders) > math.prod(shape):
        return tuple(without_overlaps(holders))  # replicas that are cut in other ways
    return holders


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
    fqn: str, known: tuple[Any, ...], first: int, facts: tuple[Any, ...], index: int, ranks: Ranks
) -> str:
    words = ("shape", "dtype", "device", "role", "averaged", "tied names", "file name", "class")
    pairs = zip(words, facts, known, strict=True)
    word, got, expected = next(pair for pair in pairs if pair[1] != pair[2])
    if word == "averaged" and facts[3] == "buffer":
        return (
            f"{fqn}: this buffer is finite on some ranks only (rank {ranks.ranks[index]}: {got}, "
            f"rank {ranks.ranks[first]}: {expected}), and averaged there; give it "
            f'buffers={{"{fqn}": "copy"}}'
        )
    return (
        f"{fqn}: rank {ranks.ranks[index]} has {word} {got}, rank {ranks.ranks[first]} "
        f"has {expected}; the ranks do not share one model: pass group= with those that do"
    )


def _share_writing(items: Sequence[Item], size: int) -> tuple[tuple[int, ...], ...]:
    """The writer of each box: the holder with the least to write; for buffers the first one.

    Buffers may differ between replicas (BatchNorm under DDP); the first rank's are saved.
    """
    load = [0] * size
    writers = []
    known: dict[int, tuple[tuple[int, ...], list[int], bool]] = {}  # layers have the same holders
    for item in items:
        if id(item.holders) not in known:
            first = tuple(who[0] for _, who in item.holders)
            numels = [box.numel for box, _ in item.holders]
            known[id(item.holders)] = first, numels, all(len(w) == 1 for _, w in item.holders)
        chosen, numels, alone = known[id(item.holders)]
        if not alone and item.role != "buffer":
            chosen = _least_loaded(item, load)
        for writer, numel in zip(chosen, numels, strict=True):
            load[writer] += numel * item.dtype.itemsize
        writers.append(chosen)
    return tuple(writers)


def _least_loaded(item: Item, load: Sequence[int]) -> tuple[int, ...]:
    """For each box of an item the holder with the least to write."""
    added = dict[int, int]()
    chosen = []
    for box, holders in item.holders:
        best = min(holders, key=lambda index: load[index] + added.get(index, 0))
        added[best] = added.get(best, 0) + box.numel * item.dtype.itemsize
        chosen.append(best)
    return tuple(chosen)


def refuse_opaque(op: str, plan: Plan, chosen: Sequence[int], remedy: str) -> None:
    """Raises ValueError if a chosen item has no values to gather."""
    odd = [plan.items[index] for index in chosen if plan.items[index].opaque]
    if odd:
        raise ArgumentError(
            f"{op}: {abbreviate([item.fqn for item in odd])}: {odd[0].opaque} stores its values "
            f"in its own format, which cannot be split; {remedy}"
        )
