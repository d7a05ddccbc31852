"""Our own checkpoint folder: every rank writes its shards, any layout reads them again.

::

    run/ema-000100/
        shardema.json                        what is where, with checksums; see manifest.py
        rank-00000-of-00002.safetensors      keys fqn, or fqn#k for the k-th box
        rank-00001-of-00002.safetensors
        config.json                          of a transformers model, for a later export

A save goes into a sibling folder with a random name, which is synced and then renamed, so under
the final name there is a whole checkpoint or nothing. A load reads and verifies into staging of
the shadows' size; only when every rank has all of its own is anything copied.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardema import manifest as manifests
from shardema.agree import Ranks
from shardema.errors import CheckpointError
from shardema.files import NewFile, layout, reporting, sync_path, write_file
from shardema.gather import Holdings, Item, Plan, raw_bytes
from shardema.manifest import BLOCK, Manifest, Stored, StoredAverage, StoredFile, StoredPiece
from shardema.shard import Box, Shard, few, split_box

_CHUNK = BLOCK  # bytes that travel from a device at a time


@dataclass(frozen=True)
class Source:
    """One set of tensors to save: an average, or what the averages leave out (``name`` None).

    Attributes:
        plan: who holds what of this set.
        items: which of the plan's items are in it.
        dtype: of an item's values in this set.
    """

    name: str | None
    plan: Plan
    items: Sequence[int]
    holdings: Holdings
    dtype: Callable[[Item], torch.dtype]


def save(
    folder: str,
    sources: Sequence[Source],
    averages: Mapping[str, StoredAverage],
    left_out: Sequence[str],
    ranks: Ranks,
    *,
    extra: Callable[[str], None],
) -> None:
    """Writes a checkpoint. Collective over ``ranks``.

    Args:
        folder: where; must not exist. Its parent is made.
        extra: called on the leader with the temporary folder, to write what else belongs in it.

    Raises:
        CheckpointError: on all ranks, if any could not write; nothing is left behind.
    """
    temporary = begin(folder, "save", ranks)
    tensors = _tensors(sources)
    nbytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)

    def finish(entries: list[dict[str, Any] | None]) -> None:
        files = tuple(_stored_file(entry, tensors) for entry in entries if entry is not None)
        manifest = Manifest(
            secrets.token_hex(16), ranks.size, dict(averages), tensors, tuple(left_out), files
        )
        with reporting(temporary, "save to"):
            extra(temporary)
            write_file(os.path.join(temporary, manifests.NAME), manifests.pack(manifest))
        commit(folder, temporary, "save")

    def write() -> dict[str, Any] | None:
        return _write_rank(temporary, sources, ranks)

    try:
        ranks.agree("save (writing)", write, finish, nbytes=nbytes)
    except BaseException:
        discard(temporary, ranks)
        raise


def discard(temporary: str, ranks: Ranks) -> None:
    """Removes a temporary folder after a failure. The leader does it."""
    if ranks.leader:
        shutil.rmtree(temporary, ignore_errors=True)


def begin(folder: str, op: str, ranks: Ranks) -> str:
    """Makes a temporary folder beside ``folder`` and returns its path. Collective.

    Raises:
        CheckpointError: ``folder`` exists, or the temporary one cannot be made or seen by a rank.
        ValueError: the ranks name different folders.
    """
    folder = os.path.abspath(folder)
    parent, name = os.path.split(folder)
    temporary = os.path.join(parent, f".{name}.{secrets.token_hex(4)}.tmp")

    def propose() -> list[str]:
        if os.path.lexists(folder):
            raise CheckpointError(
                f"{op} to {folder}: it exists already; {op} never writes into what is there: give "
                "a new path, such as one with the step in its name, or remove it first",
                path=folder,
            )
        return [folder, temporary]

    def choose(proposals: list[list[str]]) -> str:
        for rank, proposal in zip(ranks.ranks, proposals, strict=True):
            if proposal[0] != folder:
                raise ValueError(
                    f"{op}: rank {rank} names {proposal[0]}, rank {ranks.ranks[0]} names {folder}; "
                    "give the same path on every rank"
                )
        with reporting(temporary, "making"):
            os.makedirs(parent, exist_ok=True)
            os.mkdir(temporary)
        return temporary

    chosen = str(ranks.agree(op, propose, choose))

    def look() -> None:
        if not os.path.isdir(chosen):
            raise CheckpointError(
                f"{op} to {folder}: rank {ranks.rank} does not see the folder that rank "
                f"{ranks.ranks[0]} made; give a path on a file system that all ranks share",
                path=folder,
            )

    ranks.agree(f"{op} (looking)", look)
    return chosen


def commit(folder: str, temporary: str, op: str) -> None:
    """Gives the temporary folder its final name, durably. On the leader only."""
    folder = os.path.abspath(folder)
    with reporting(folder, op):
        for place, _, names in os.walk(temporary):  # the model's config: by its own code
            for name in names:
                sync_path(os.path.join(place, name))
            sync_path(place)
        if os.path.lexists(folder):
            raise CheckpointError(f"{op} to {folder}: it appeared meanwhile", path=folder)
        os.rename(temporary, folder)
        sync_path(os.path.dirname(folder))


def _write_rank(temporary: str, sources: Sequence[Source], ranks: Ranks) -> dict[str, Any] | None:
    """Writes this rank's file and returns its entry for the manifest; None if it owns nothing."""
    found = []  # key, dtype, number of the tensor, box, values
    first = 0
    several = sum(source.name is not None for source in sources) > 1
    for source in sources:
        prefix = f"{source.name}/" if several and source.name is not None else ""
        for number, index in enumerate(source.items):
            item = source.plan.items[index]
            pairs = zip(item.holders, source.plan.writers[index], strict=True)
            boxes = [box for (box, _), writer in pairs if writer == ranks.index]
            for k, box in enumerate(boxes):
                key = f"{prefix}{item.fqn}" + (f"#{k}" if len(boxes) > 1 else "")
                values = source.holdings(index, box)
                found.append((key, values.dtype, first + number, box, values))
        first += len(source.items)
    if not found:
        return None
    head, entries = layout([(key, dtype, box.sizes) for key, dtype, _, box, _ in found])
    found.sort(key=lambda part: entries[part[0]].start)
    size = len(head) + sum(entries[part[0]].nbytes for part in found)
    name = f"rank-{ranks.index:05d}-of-{ranks.size:05d}.safetensors"
    path = os.path.join(temporary, name)
    blocks: list[str] = []
    with reporting(path, "writing"), NewFile(path, size) as file:
        offset = 0
        for block in _in_blocks(head, (part[4] for part in found)):
            blocks.append(xxhash.xxh3_128_hexdigest(block))
            file.write_at(offset, block)
            offset += len(block)
        file.sync()
    pieces = [[number, box.offsets, box.sizes] for _, _, number, box, _ in found]
    return {"name": name, "size": size, "head": len(head), "blocks": blocks, "pieces": pieces}


def _in_blocks(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    """The bytes of a file in blocks of `BLOCK`, the last one shorter."""
    block = bytearray(BLOCK)
    view, used = memoryview(block), 0
    for chunk in _chunks(head, tensors):
        while chunk:
            n = min(len(chunk), BLOCK - used)
            view[used : used + n] = chunk[:n]
            chunk, used = chunk[n:], used + n
            if used == BLOCK:
                yield view
                used = 0
    if used:
        yield view[:used]


def _chunks(head: bytes, tensors: Iterator[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        limit = max(1, _CHUNK // tensor.dtype.itemsize)
        for part in split_box(Box((0,) * tensor.dim(), tuple(tensor.shape)), limit):
            yield raw_bytes(part.view(tensor).cpu())


def _tensors(sources: Sequence[Source]) -> tuple[Stored, ...]:
    """The tensors of a checkpoint, numbered source by source."""
    tensors = []
    for source in sources:
        for index in source.items:
            item = source.plan.items[index]
            dtype = source.dtype(item)
            tensors.append(
                Stored(
                    source.name,
                    item.fqn,
                    item.file_name,
                    item.role,
                    item.shape,
                    dtype,
                    item.aliases,
                    item.stem,
                )
            )
    return tuple(tensors)


def _stored_file(entry: dict[str, Any], tensors: Sequence[Stored]) -> StoredFile:
    pieces = []
    start = entry["head"]
    for number, offsets, sizes in entry["pieces"]:
        box = Box(tuple(offsets), tuple(sizes))
        pieces.append(StoredPiece(number, box, start))
        start += box.numel * tensors[number].dtype.itemsize
    blocks = tuple(entry["blocks"])
    return StoredFile(entry["name"], entry["size"], entry["head"], blocks, tuple(pieces))


def read_average(
    folder: str,
    manifest: Manifest,
    average: str,
    shards: Sequence[Shard],
    targets: Mapping[str, Tensor],
) -> None:
    """Reads this rank's part of an average into ``targets``, tensors laid out like the shards.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    numbers = {t.fqn: n for n, t in enumerate(manifest.tensors) if t.average == average}
    places = {numbers[s.fqn]: list(s.pieces(targets[s.fqn])) for s in shards}
    wanted = {number: [box for box, _ in held] for number, held in places.items()}
    for number, box, values in manifests.parts(folder, manifest, wanted):
        for held, target in places[number]:
            common = held.intersect(box)
            if common is not None:
                part = common.relative_to(box.offsets).view(values)
                common.relative_to(held.offsets).view(target).copy_(part)


def check_same_tensors(
    folder: str,
    manifest: Manifest,
    average: str,
    items: Sequence[Item],
    dtype: Callable[[Item], torch.dtype],
) -> None:
    """Raises ValueError unless the checkpoint's average has the tensors of ``items``."""
    stored = {t.fqn: t for t in manifest.tensors if t.average == average}
    here = {item.fqn: item for item in items}
    for names, text in (
        (here.keys() - stored.keys(), "which the model has, are missing in it"),
        (stored.keys() - here.keys(), "which it holds, are unknown to the model"),
    ):
        if names:
            raise ValueError(
                f"load from {folder}: {few(sorted(names))}, {text} (average {average!r}); it is a "
                "checkpoint of another model, or of another select= or buffers="
            )
    for fqn, item in here.items():
        there = stored[fqn]
        if (there.shape, there.dtype) != (item.shape, dtype(item)):
            raise ValueError(
                f"load from {folder}: {fqn} of average {average!r} has shape {there.shape} and "
                f"dtype {there.dtype}, expected {item.shape} and {dtype(item)}; build the model "
                "and the ShadowPolicy as they were at the save"
            )
