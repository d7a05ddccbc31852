"""Our own checkpoint folder: every rank writes its shards, any layout reads them again.

::

    run/ema-000100/
        shardema.json                        what is where, with checksums; see manifest.py
        rank-00000-of-00002.safetensors      keys fqn, or fqn#k for the k-th box
        rank-00001-of-00002.safetensors
        config.json                          of a transformers model, for a later export

A save goes into a folder of its own, which is synced before it counts (see folder.py), so under
the final name there is a whole checkpoint or nothing. A load reads and verifies into staging of
the shadows' size; only when every rank has all of its own is anything copied.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardema.errors import abbreviate
from shardema.files import manifest as manifests
from shardema.files import pairing
from shardema.files.folder import new_folder
from shardema.files.manifest import (
    BLOCK,
    Manifest,
    ReadRequest,
    Stored,
    StoredAverage,
    StoredBox,
    StoredFile,
)
from shardema.files.places import new_file
from shardema.files.safetensors import layout, reporting
from shardema.model.own_state import Outward
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Contents, Item, refuse_opaque
from shardema.schedules import describe
from shardema.shards.boxes import Box, split_box
from shardema.shards.shard import Shard
from shardema.shards.strides import raw_bytes
from shardema.update.average import Average

_CHUNK = BLOCK  # bytes that travel from a device at a time


def save_averages(
    folder: str | os.PathLike[str],
    averages: Sequence[Contents],
    own: Contents,
    progress: Mapping[str, StoredAverage],
    outward: Outward,
    weights: Sequence[Shard],
    *,
    include_frozen: bool,
    overwrite: bool,
    extra: Callable[[str], None],
) -> None:
    """Writes averages, and what belongs to them of the model. Collective.

    Args:
        averages: all that there are of the model.
        own: the model's own tensors.
        progress: by the name of the average.
        outward: what the model's own code makes of its state.
        weights: this rank's shards of the averaged tensors, of which the fingerprint is kept.
        include_frozen: also the parameters that are not averaged.
        overwrite, extra: as for `save`.
    """
    if include_frozen:
        outward.check_tensors(
            "save(include_frozen=True)", "save without include_frozen, which a load does not need"
        )
    plan = averages[0].plan  # in own.plan packed parameters are buffers
    items = list(enumerate(plan.items))
    averaged = [i for i, item in items if item.averaged]
    rest = [
        i for i, item in items if not item.averaged and (item.role == "buffer" or include_frozen)
    ]
    refuse_opaque(
        "save",
        plan,
        rest,
        "leave include_frozen off and keep the model's own state dict beside it, or leave "
        'such a buffer out: buffers={name: "ignore"}',
    )
    kept = {*averaged, *rest}
    left_out = [item.fqn for i, item in items if i not in kept and item.stem]
    left_out += sorted(outward.holders)
    sources = [*(one.only(averaged) for one in averages), own.only(rest)]
    parts = pairing.local_parts(own.plan, weights, own.ranks)
    save(folder, sources, progress, left_out, parts, own.ranks, extra=extra, overwrite=overwrite)


def progress_of(average: Average) -> StoredAverage:
    """What the manifest keeps of an average beside its tensors."""
    return StoredAverage(
        describe(average.schedule),
        average.t,
        average.num_updates,
        str(average.policy.dtype).removeprefix("torch."),
        average.moved_at,
    )


def save(
    folder: str | os.PathLike[str],
    sources: Sequence[Contents],
    averages: Mapping[str, StoredAverage],
    left_out: Sequence[str],
    parts: Sequence[pairing.Part],
    ranks: Ranks,
    *,
    extra: Callable[[str], None],
    overwrite: bool,
) -> None:
    """Writes a checkpoint. Collective over ``ranks``.

    Args:
        folder: where; must not exist. Its parent is made.
        parts: this rank's fingerprints of the model.
        extra: called on the leader with the temporary folder, to write what else belongs in it.
        overwrite: a complete checkpoint may be there, and is replaced.

    Raises:
        CheckpointError: on all ranks, if any could not write; nothing is left behind.
    """
    tensors = _tensors(sources)
    with new_folder(folder, "save", ranks, overwrite=overwrite) as new:

        def finish(told: list[tuple[dict[str, Any] | None, list[pairing.Part]]]) -> None:
            manifest = Manifest(
                secrets.token_hex(16),
                ranks.size,
                dict(averages),
                tensors,
                tuple(left_out),
                tuple(_stored_file(entry, tensors) for entry, _ in told if entry is not None),
                new.place,
                model=pairing.merged(sources[-1].plan, [theirs for _, theirs in told]),
            )
            new.finish({manifests.NAME: manifests.pack(manifest)}, extra)

        def write() -> tuple[dict[str, Any] | None, Sequence[pairing.Part]]:
            return _write_rank(new.path, sources, ranks), parts

        ranks.agree("save (writing)", write, finish, nbytes=_busiest(sources))


def _busiest(sources: Sequence[Contents]) -> int:
    """Bytes that the rank which writes most of all writes."""
    loads = (source.loads() for source in sources)
    return max(map(sum, zip(*loads, strict=True)))


def _write_rank(temporary: str, sources: Sequence[Contents], ranks: Ranks) -> dict[str, Any] | None:
    """Writes this rank's file and returns its entry for the manifest; None if it owns nothing."""
    found = []  # key, dtype, number of the tensor, box, values
    first = 0
    several = sum(source.name is not None for source in sources) > 1
    for source in sources:
        prefix = f"{source.name}/" if several and source.name is not None else ""
        for number, index in enumerate(source.chosen):
            item = source.plan.items[index]
            pairs = zip(item.holders, source.plan.writers[index], strict=True)
            boxes = [box for (box, _), writer in pairs if writer == ranks.index]
            for k, box in enumerate(boxes):
                key = f"{prefix}{item.fqn}" + (f"#{k}" if len(boxes) > 1 else "")
                values = source.holdings(index, box)
                found.append((key, values.dtype, first + number, box, values))
        first += len(source.chosen)
    if not found:
        return None
    head, entries = layout([(key, dtype, box.sizes) for key, dtype, _, box, _ in found])
    found.sort(key=lambda part: entries[part[0]].start)
    size = len(head) + sum(entries[part[0]].nbytes for part in found)
    name = f"rank-{ranks.index:05d}-of-{ranks.size:05d}.safetensors"
    path = os.path.join(temporary, name)
    blocks: list[str] = []
    with reporting(path, "writing"), new_file(path, size) as file:
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


def _tensors(sources: Sequence[Contents]) -> tuple[Stored, ...]:
    """The tensors of a checkpoint, numbered source by source."""
    tensors = []
    for source in sources:
        for item in source.items:
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
    boxes = []
    start = entry["head"]
    for number, offsets, sizes in entry["pieces"]:
        box = Box(tuple(offsets), tuple(sizes))
        boxes.append(StoredBox(number, box, start))
        start += box.numel * tensors[number].dtype.itemsize
    blocks = tuple(entry["blocks"])
    return StoredFile(entry["name"], entry["size"], entry["head"], blocks, tuple(boxes))


def read_requests(manifest: Manifest, average: str, shards: Sequence[Shard]) -> list[ReadRequest]:
    """What this rank is to read of an average."""
    numbers = _numbers(manifest, average)
    return manifests.read_requests(manifest, {numbers[s.fqn]: list(s.boxes) for s in shards})


def read_average(
    manifest: Manifest,
    average: str,
    found: list[ReadRequest],
    shards: Sequence[Shard],
    targets: Mapping[str, Tensor],
) -> None:
    """Reads this rank's part of an average into ``targets``, tensors laid out like the shards.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    numbers = _numbers(manifest, average)
    places = {numbers[s.fqn]: list(s.local_boxes(targets[s.fqn])) for s in shards}
    for number, box, values in manifests.parts(manifest, found):
        for held, target in places[number]:
            common = held.intersect(box)
            if common is not None:
                part = common.relative_to(box.offsets).view(values)
                common.relative_to(held.offsets).view(target).copy_(part)


def _numbers(manifest: Manifest, average: str) -> dict[str, int]:
    return {t.fqn: n for n, t in enumerate(manifest.tensors) if t.average == average}


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
                f"load from {folder}: {abbreviate(sorted(names))}, {text} (average {average!r}); "
                "it is a checkpoint of another model, or of another select= or buffers="
            )
    for fqn, item in here.items():
        there = stored[fqn]
        if (there.shape, there.dtype) != (item.shape, dtype(item)):
            raise ValueError(
                f"load from {folder}: {fqn} of average {average!r} has shape {there.shape} and "
                f"dtype {there.dtype}, expected {item.shape} and {dtype(item)}; build the model "
                "and the ShadowPolicy as they were at the save"
            )
