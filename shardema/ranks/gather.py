"""Puts the full tensors together, on demand and in bounded memory.

::

    shards of all ranks  -make_plan->  Plan      once: who holds which box of which tensor
    Plan                 -pieces_of->  buckets   boxes in the order of the tensors, at most 256 MiB
    bucket               -stream->     pieces    each owner sends its part, the leader receives

A rank sends only boxes that it owns: of several replicas of a box one is the owner. The leader
never needs more than its result plus one bucket, the others one bucket.
"""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch import distributed as dist

from shardema.errors import abbreviate
from shardema.ranks.agree import Ranks
from shardema.ranks.messages import is_told
from shardema.shards.boxes import Box, Dims, check_covered, split_box, whole
from shardema.shards.shard import Role, Shard

BUCKET_BYTES = 256 << 20
_ALIGN = 16  # bytes; a part of a bucket starts where any dtype may start


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the model as all ranks together hold it.

    Attributes:
        dtype: of the model's own tensor; an average of it may have another.
        device: type of the device that it lies on, or its average does.
        averaged: whether there are averages of it.
        file_name: of its names the one that an export writes it under.
        opaque: the class of a tensor that has no values to gather; see `Shard`. Else empty.
        holders: each distinct box with the indices of the ranks that hold it, ascending.
        stem: of the file that an export writes it to, ``<stem>.safetensors``; empty, to none.
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
    """Every tensor of the model and who holds what of it; the same on all ranks.

    Attributes:
        items: in the order of the unwrapped model's state_dict.
        writers: for each item, the rank that writes each of its boxes: replicas share the work.
    """

    items: tuple[Item, ...]
    writers: tuple[tuple[int, ...], ...] = field(repr=False)

    def readers(self, index: int) -> list[int]:
        """For each box of item ``index`` the rank that sends it: the leader, where it holds it."""
        return [holders[0] for _, holders in self.items[index].holders]

    def loads(
        self, size: int, chosen: Sequence[int], dtype: Callable[[Item], torch.dtype]
    ) -> list[int]:
        """Bytes of the chosen items that each of ``size`` ranks writes."""
        loads = [0] * size
        for index in chosen:
            itemsize = dtype(self.items[index]).itemsize
            boxes = (box for box, _ in self.items[index].holders)
            for box, writer in zip(boxes, self.writers[index], strict=True):
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
        averaged: the fqns that there are averages of.
        dropped: names of tied tensors that an export does not use, if there is another.

    Raises:
        ValueError: ranks disagree about a tensor, or some part of it is held by nobody or twice.
    """
    same: dict[Any, Any] = {}  # equal boxes are one object, so they are sent and unpacked once
    mine = []
    for shard in shards:
        boxes = tuple((box.offsets, box.sizes) for box in shard.boxes)
        mine.append((shard.fqn, facts_of(shard, averaged, dropped), same.setdefault(boxes, boxes)))
    with _uncollected():
        items = _merged(ranks.all_gather(mine), ranks)
    return Plan(tuple(items), _share_writing(items, ranks.size))


def _merged(everything: Sequence[Any], ranks: Ranks) -> list[Item]:
    """One item for each name, from what every rank said that it holds."""
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
    known: dict[Any, tuple[tuple[Box, tuple[int, ...]], ...]] = {}  # layers are alike
    for fqn, entry in merged.items():
        shape = entry["facts"][0]
        layout = tuple(sorted((box, tuple(who)) for box, who in entry["boxes"].items()))
        holders = known.get((shape, layout))
        if holders is None:
            holders = tuple((Box(*box), who) for box, who in layout)
            check_covered(fqn, shape, [box for box, _ in holders])
            known[shape, layout] = holders
        items.append(Item(*(fqn, *entry["facts"], holders)))
    return items


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: looking through millions of new objects takes most of the time,
    and none of them is garbage.
    """
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
        f"has {expected}; the ranks do not hold one model: pass group= with the ranks that share it"
    )


def _share_writing(items: Sequence[Item], size: int) -> tuple[tuple[int, ...], ...]:
    """The writer of each box: the least loaded of its holders; for buffers the first one.

    Buffers may differ between replicas (BatchNorm under DDP): the first rank's are the model's.
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


def replica_digests(
    plan: Plan, local: Callable[[int, Box], Tensor], ranks: Ranks
) -> dict[str, str]:
    """What this rank holds of supposed replicas, in a word that the ranks compare. Local.

    Args:
        local: this rank's values of a box of item ``index``.

    Returns:
        A digest for each set of ranks that hold boxes together, this rank among them.
    """
    digests: dict[str, xxhash.xxh3_128] = {}
    for index, _, box, holders in _replicated(plan):
        if ranks.index in holders:
            key = _set_of(holders)
            _hash_into(digests.setdefault(key, xxhash.xxh3_128()), local(index, box))
    return {key: digest.hexdigest() for key, digest in digests.items()}


def differing(all_words: Sequence[Mapping[str, str]]) -> list[str]:
    """The sets of ranks whose `replica_digests` are not equal."""
    seen: dict[str, set[str]] = {}
    for words in all_words:
        for key, digest in words.items():
            seen.setdefault(key, set()).add(digest)
    return [key for key, digests in seen.items() if len(digests) > 1]


def refuse_replicas(
    plan: Plan,
    local: Callable[[int, Box], Tensor],
    ranks: Ranks,
    op: str,
    suspects: Sequence[str],
) -> None:
    """Names the tensor that ranks hold different values of. Collective over ``ranks``.

    Raises:
        RuntimeError: always, if there is one.
    """

    def look() -> dict[str, str]:
        return {
            item.fqn: _digest(local(index, box))
            for index, item, box, holders in _replicated(plan)
            if ranks.index in holders and _set_of(holders) in suspects
        }

    def name_them(all_details: list[dict[str, str]]) -> None:
        for item in plan.items:
            values = {i: d[item.fqn] for i, d in enumerate(all_details) if item.fqn in d}
            odd = [i for i in values if values[i] != next(iter(values.values()))]
            if odd:
                first = ranks.ranks[next(iter(values))]
                raise RuntimeError(
                    f"{item.fqn}: ranks {[ranks.ranks[i] for i in odd]} hold other values than "
                    f"rank {first}, so they are not replicas of one model; pass group= with the "
                    "ranks that share it (expert parallel, re-indexed pipeline chunks), give the "
                    "tensors distinct names, or make the ranks equal before training"
                )

    ranks.agree(f"{op} (comparing replicas)", look, name_them)


def _set_of(holders: tuple[int, ...]) -> str:
    """A short name of a set of ranks, however many they are."""
    return xxhash.xxh3_64_hexdigest(",".join(map(str, holders)).encode())


def refuse_opaque(op: str, plan: Plan, chosen: Sequence[int], remedy: str) -> None:
    """Raises ValueError for an item among the chosen that has no values to gather."""
    odd = [plan.items[index] for index in chosen if plan.items[index].opaque]
    if odd:
        raise ValueError(
            f"{op}: {abbreviate([item.fqn for item in odd])}: {odd[0].opaque} is a tensor "
            "subclass that "
            f"keeps its values in a form of its own, which cannot be taken apart; {remedy}"
        )


def apart(op: str, plan: Plan, size: int, all_ranks: bool) -> list[int]:
    """The items that are handed out as they are, by the ranks that hold them whole.

    Args:
        size: number of ranks.
        all_ranks: all of them hand them out, not the leader only.

    Raises:
        ValueError: such a rank holds a part only, or nothing.
    """
    opaque = [index for index, item in enumerate(plan.items) if item.opaque]
    taking = range(size) if all_ranks else range(1)
    cut = [
        index
        for index in opaque
        if [box for box, who in plan.items[index].holders if set(taking) <= set(who)]
        != list(whole(plan.items[index].shape))
    ]
    refuse_opaque(
        op,
        plan,
        cut,
        "and the ranks hold parts of it; save the averages with ema.save(folder), and take them "
        "out of it with `shardema export --partial`",
    )
    return opaque


def _replicated(plan: Plan) -> Iterator[tuple[int, Item, Box, tuple[int, ...]]]:
    for index, item in enumerate(plan.items):
        if item.role != "buffer" and not item.opaque:
            for box, holders in item.holders:
                if len(holders) > 1:
                    yield index, item, box, holders


def _digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_128()
    _hash_into(digest, tensor)
    return digest.hexdigest()


def _hash_into(digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    for part in split_box(Box((0,) * tensor.dim(), tuple(tensor.shape)), 1 << 22):
        digest.update(raw_bytes(part.view(tensor).cpu()))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order; a view where it is contiguous."""
    flat = tensor.contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of an item that travels as one: ``owner`` is the index of the rank that sends it."""

    item: int
    box: Box
    owner: int


def buckets(
    plan: Plan, chosen: Sequence[int], out_dtype: Callable[[Item], torch.dtype], limit: int
) -> Iterator[list[Piece]]:
    """The boxes of the chosen items, in order, in groups of at most ``limit`` bytes."""
    bucket: list[Piece] = []
    used = 0
    for index in chosen:
        item = plan.items[index]
        itemsize = out_dtype(item).itemsize
        for (box, _), owner in zip(item.holders, plan.readers(index), strict=True):
            for part in split_box(box, max(1, limit // itemsize)):
                size = -(-part.numel * itemsize // _ALIGN) * _ALIGN
                if bucket and used + size > limit:
                    yield bucket
                    bucket, used = [], 0
                bucket.append(Piece(index, part, owner))
                used += size
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Prepared:
    """A stream that has all the memory that it needs."""

    transfer: _Transfer
    groups: list[list[Piece]]


def prepare(
    plan: Plan,
    chosen: Sequence[int],
    local: Callable[[int, Box], Tensor],
    out_dtype: Callable[[Item], torch.dtype],
    ranks: Ranks,
    *,
    limit: int,
    all_ranks: bool = False,
) -> Prepared:
    """Makes ready to `stream`. Local: what can fail does so before anybody waits in a transfer.

    Args:
        chosen: indices of the items, in the order wanted.
        local: this rank's values of a box of an item, ``[*box.sizes]``.
        out_dtype: the dtype that an item travels and arrives in.
        limit: bytes of a bucket.
        all_ranks: bring them to all ranks.

    Raises:
        RankError: the process group is broken.
    """
    ranks.check_whole("gathering")
    groups = list(buckets(plan, chosen, out_dtype, limit))
    transfer = _Transfer(plan, local, out_dtype, ranks, all_ranks)
    transfer.reserve(groups)
    return Prepared(transfer, groups)


def stream(prepared: Prepared, op: str) -> Generator[tuple[Piece, Tensor]]:
    """Brings the items to the leader, bucket by bucket. Collective over the ranks.

    Every rank must run it to the end or close it: a consumer that stops early still takes part in
    the transfers that the others wait in, and so does a rank that fails. Before the last bucket is
    given out the ranks agree that all of them have come to the end.

    Yields:
        A piece and its values ``[*piece.box.sizes]`` on the CPU, valid until the next one; only
        on ranks that receive.
    """
    pieces = _pieces(prepared, op)
    next(pieces)  # closing a generator that never ran would not move what is left
    return pieces


def _pieces(prepared: Prepared, op: str) -> Generator[tuple[Piece, Tensor]]:
    """What arrives, behind a first item that is none."""
    transfer, ranks = prepared.transfer, prepared.transfer.ranks
    failed: BaseException | None = None

    def finish() -> None:
        if failed is not None and not isinstance(failed, GeneratorExit):
            raise failed

    try:
        yield Piece(-1, Box((), ()), -1), torch.empty(0)
    except BaseException as error:  # the consumer stopped: the others go on to the end
        failed = error
    for number, bucket in enumerate(prepared.groups, 1):
        parts: list[Tensor] = []
        try:
            parts = transfer.move(bucket, op)
        except BaseException as error:
            if is_told(error):
                raise
            failed = failed or error
        if number == len(prepared.groups):
            ranks.agree(f"{op} (finishing)", finish)
        if failed is None and transfer.receives:
            try:
                for piece, part in zip(bucket, parts, strict=True):
                    transfer.go_on()
                    yield piece, part
            except BaseException as error:
                failed = error
    if not prepared.groups:
        ranks.agree(f"{op} (finishing)")
    if failed is not None:
        raise failed


class Iteration:
    """Full tensors that a caller takes one by one, while the other ranks have sent theirs.

    Attributes:
        ended_by: the call that ended it before its last tensor.
    """

    def __init__(self, arriving: Generator[tuple[Piece, Tensor]]) -> None:
        self.ended_by = ""
        self._arriving = arriving
        _iterations.add(self)

    def end(self, op: str) -> None:
        """Receives what is still on its way."""
        _iterations.discard(self)
        self.ended_by = self.ended_by or op
        self._arriving.close()


_iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()  # of all averages of the process


def end_iterations(op: str) -> None:
    """Ends all that are open: the other ranks may wait in their transfers."""
    for iteration in list(_iterations):
        iteration.end(op)


class _Transfer:
    """Moves buckets, one after the other, through one buffer of a bucket's size."""

    def __init__(
        self,
        plan: Plan,
        local: Callable[[int, Box], Tensor],
        out_dtype: Callable[[Item], torch.dtype],
        ranks: Ranks,
        all_ranks: bool,
    ) -> None:
        self._plan = plan
        self._local = local
        self._out_dtype = out_dtype
        self.ranks = ranks
        self._all_ranks = all_ranks
        self._beat_at = time.monotonic() + ranks.timeout / 4
        self._buffers: dict[torch.device, Tensor] = {}
        self._host = torch.empty(
            0, dtype=torch.uint8, device="cpu"
        )  # where what came by a device arrives
        self.receives = all_ranks or ranks.leader

    def reserve(self, groups: Sequence[list[Piece]]) -> None:
        """Allocates a buffer for each device, as large as its largest bucket needs."""
        sizes: dict[torch.device, int] = {}
        for bucket in groups:
            device = self._home(bucket)
            _, spans = self._layout(bucket)
            size = sum(spans[owner][1] for owner in self._owners(spans))
            sizes[device] = max(size, sizes.get(device, 0))
        for device, size in sizes.items():
            self._buffers[device] = torch.empty(size, dtype=torch.uint8, device=device)
        away = [size for device, size in sizes.items() if device.type != "cpu"]
        if self.receives and away:
            self._host = torch.empty(max(away), dtype=torch.uint8, device="cpu")

    def go_on(self) -> None:
        """Says that this rank goes on, where what it does between two transfers takes long."""
        if self.ranks.size > 1 and time.monotonic() > self._beat_at:
            self.ranks.beat()
            self._beat_at = time.monotonic() + self.ranks.timeout / 4

    def move(self, bucket: list[Piece], op: str) -> list[Tensor]:
        """The pieces of the bucket, in order, on ranks that receive; else nothing.

        A rank that fails to fill its part sends it all the same, and raises afterwards.
        """
        places, spans = self._layout(bucket)
        device = self._home(bucket)
        owners = self._owners(spans)
        first = min((spans[o][0] for o in owners), default=0)
        size = sum(spans[o][1] for o in owners)
        buffer = self._buffers[device][:size]
        # a sender's buffer holds its own span only, so it starts where that does
        slots = {o: buffer[spans[o][0] - first :][: spans[o][1]] for o in owners}
        failed: BaseException | None = None
        try:
            for piece, place in zip(bucket, places, strict=True):
                if piece.owner == self.ranks.index:
                    values = self._local(piece.item, piece.box)
                    self._view(buffer, place - first, piece).copy_(values)
        except BaseException as error:
            failed = error
        if self.ranks.size > 1 and self._takes_part(owners):
            self.ranks.transfer(op, lambda: self._exchange(slots), device)
        if failed is not None:
            raise failed
        if not self.receives:
            return []
        arrived = buffer if device.type == "cpu" else self._host[:size].copy_(buffer)
        return [self._view(arrived, place, p) for p, place in zip(bucket, places, strict=True)]

    def _takes_part(self, owners: Sequence[int]) -> bool:
        """Whether a bucket's exchange concerns this rank, given whose parts it has room for."""
        return self._all_ranks or any(owner != 0 for owner in owners)

    def _exchange(self, slots: Mapping[int, Tensor]) -> None:
        """Sends and receives the parts of a bucket, each in its owner's slot."""
        ranks, group = self.ranks, self.ranks.group()
        if self._all_ranks:
            for owner, slot in slots.items():
                dist.broadcast(slot, src=ranks.ranks[owner], group=group)
        elif ranks.leader:
            works = [
                dist.irecv(slot, src=ranks.ranks[owner], group=group)
                for owner, slot in slots.items()
                if owner != ranks.index
            ]
            for work in works:
                assert work is not None
                work.wait()
        else:
            dist.send(slots[ranks.index], dst=ranks.ranks[0], group=group)

    def _layout(self, bucket: list[Piece]) -> tuple[list[int], dict[int, tuple[int, int]]]:
        """First byte of each piece, and (first byte, bytes) of each owner: one span for each."""
        sizes: dict[int, int] = {}
        within = []
        for piece in bucket:
            within.append(sizes.get(piece.owner, 0))
            sizes[piece.owner] = within[-1] + -(-self._nbytes(piece) // _ALIGN) * _ALIGN
        spans: dict[int, tuple[int, int]] = {}
        start = 0
        for owner, size in sizes.items():
            spans[owner] = (start, size)
            start += size
        pairs = zip(bucket, within, strict=True)
        return [spans[piece.owner][0] + offset for piece, offset in pairs], spans

    def _owners(self, spans: dict[int, tuple[int, int]]) -> list[int]:
        """Owners whose span of a bucket this rank has room for: all, or itself."""
        return [owner for owner in spans if self.receives or owner == self.ranks.index]

    def _nbytes(self, piece: Piece) -> int:
        return piece.box.numel * self._out_dtype(self._plan.items[piece.item]).itemsize

    def _view(self, buffer: Tensor, start: int, piece: Piece) -> Tensor:
        dtype = self._out_dtype(self._plan.items[piece.item])
        raw = buffer[start : start + self._nbytes(piece)]
        return raw.view(dtype).view(piece.box.sizes)

    def _home(self, bucket: list[Piece]) -> torch.device:
        """The device that a bucket travels on; told from the plan, so all ranks choose alike."""
        if self.ranks.size == 1:
            return torch.device("cpu")
        kinds = {self._plan.items[piece.item].device for piece in bucket} - {"cpu"}
        return self.ranks.transport(kinds.pop() if kinds else "cpu")


class Holdings:
    """This rank's values of any box that it holds.

    Args:
        plan: the plan that ``shards`` are part of.
        shards: this rank's shards.
        shadows: by fqn, what stands in the place of a shard's own tensor.
    """

    def __init__(self, plan: Plan, shards: Sequence[Shard], shadows: Mapping[str, Tensor]) -> None:
        by_fqn = {s.fqn: list(s.pieces(shadows.get(s.fqn, s.own))) for s in shards if not s.opaque}
        self._pieces = [by_fqn.get(item.fqn, []) for item in plan.items]

    def __call__(self, index: int, box: Box) -> Tensor:
        """Values of ``box`` of item ``index``, a view ``[*box.sizes]``."""
        for held, values in self._pieces[index]:
            if held.intersect(box) == box:
                return box.relative_to(held.offsets).view(values)
        raise AssertionError((index, box))


def assemble(
    plan: Plan,
    chosen: Sequence[int],
    arriving: Iterator[tuple[Piece, Tensor]],
    out_dtype: Callable[[Item], torch.dtype],
) -> Iterator[tuple[Item, Tensor]]:
    """Full tensors ``[*shape]`` on the CPU, one at a time, from the pieces of `stream`."""
    pieces = iter(arriving)
    for index in chosen:
        item = plan.items[index]
        missing = sum(box.numel for box, _ in item.holders)
        full: Tensor | None = None
        while missing:
            piece, values = next(pieces)
            assert piece.item == index, (piece, item.fqn)
            if full is None:
                full = torch.empty(item.shape, dtype=values.dtype, device="cpu")
            piece.box.view(full).copy_(values)
            missing -= piece.box.numel
        if full is None:
            full = torch.empty(item.shape, dtype=out_dtype(item), device="cpu")
        yield item, full


def with_apart(
    plan: Plan,
    chosen: Sequence[int],
    full: Iterator[tuple[Item, Tensor]],
    own: Mapping[str, Tensor],
) -> Iterator[tuple[Item, Tensor]]:
    """``full`` with the items of `apart` at their places: copies of the model's ``own`` tensors."""
    for item in (plan.items[index] for index in chosen):
        yield (item, _copied(own[item.fqn])) if item.opaque else next(full)


def _copied(tensor: Tensor) -> Tensor:
    """A copy in host memory; the tensor itself where its class has no such thing."""
    try:
        return tensor.to("cpu", copy=True)
    except Exception:  # of somebody else's class: NotImplementedError, KeyError, AssertionError
        return tensor
