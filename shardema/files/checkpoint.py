"""The checkpoint folder: every rank writes its shards; any world size and backend reads them.

::

    run/ema-000100/
        shardema.json                        index and checksums; see manifest.py
        rank-00000-of-00002.safetensors      keys fqn, or fqn#k for the k-th box
        rank-00001-of-00002.safetensors
        config.json                          of a transformers model, for a later export

A save writes to a temporary folder, syncs it and renames it (see folder.py), so a folder of the
final name is complete. A load reads and verifies into staging of the shadows' size; values are
copied only after every rank has read all of its own.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from shardema.errors import ArgumentError, abbreviate
from shardema.files import manifest as manifests
from shardema.files import pairing
from shardema.files.arrangement import Pieces, StoredFile, packed
from shardema.files.background import PendingSave
from shardema.files.folder import NewFolder, new_folder
from shardema.files.manifest import (
    BLOCK,
    Manifest,
    ReadRequest,
    StoredAverage,
    StoredTensor,
)
from shardema.files.places import new_file
from shardema.files.prefix import NewPrefix
from shardema.files.remote import NewObject
from shardema.files.safetensors import NewFile, make_header, reporting
from shardema.kernels.rounding import compensated_value, store_compensated
from shardema.model.own_state import MergedState
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Contents, Item, refuse_opaque
from shardema.schedules import describe
from shardema.shards.boxes import Box, split_box
from shardema.shards.shard import Shard
from shardema.shards.strides import raw_bytes
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.copy_on_write import CopyOnWrite
from shardema.update.shadows import Shadows

_SMALL = 1 << 18  # bytes; smaller chunks of a file are written together
_CHUNK = BLOCK  # bytes copied from a device at a time
_Told = tuple[dict[str, Any] | None, list[pairing.Part]]  # entry of a file, fingerprints


@dataclass(frozen=True)
class _Box:
    """A box that this rank writes.

    Attributes:
        key: its name in the file.
        number: of its tensor.
        average: name of the average, None for the model's own tensors.
        dtype: that the values are written in.
        companion: index of its lost bits among the values; None if it has none.
    """

    key: str
    number: int
    box: Box
    average: str | None
    dtype: torch.dtype
    companion: int | None


class _Values(Protocol):
    """The values of boxes, by their indices in a list."""

    def parts(self, number: int, limit: int) -> Iterator[Tensor]: ...


class _Current:
    """Values as they are when they are read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def parts(self, number: int, limit: int) -> Iterator[Tensor]:
        values = self._tensors[number]
        for part in split_box(Box((0,) * values.dim(), tuple(values.shape)), limit):
            yield part.view(values).cpu()


def save_averages(
    folder: str | os.PathLike[str],
    averages: Sequence[Contents],
    own: Contents,
    progress: Mapping[str, StoredAverage],
    merged_state: MergedState,
    weights: Sequence[Shard],
    *,
    include_frozen: bool,
    overwrite: bool,
    extra: Callable[[str], None],
    shared: Averages | None,
    follows: str = "",
) -> PendingSave | None:
    """Writes averages, the model's buffers and, optionally, frozen parameters. Collective.

    Args:
        averages: those to write, each in the dtype of its contents.
        own: the model's own tensors.
        progress: by name of the average.
        merged_state: how the model's own code changes its state dict.
        weights: this rank's shards of the averaged tensors, whose fingerprints are stored.
        include_frozen: also the parameters that are not averaged.
        overwrite, extra, shared: as for `save`.
        follows: id of the save before in a chain of snapshots, on the leader; else empty.
    """
    if include_frozen:
        merged_state.check_tensors(
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
    left_out += sorted(merged_state.holders)
    sources = [*(one.only(averaged) for one in averages), own.only(rest)]
    parts = pairing.local_parts(own.plan, weights, own.ranks)
    saving = _Saving(sources, progress, left_out, parts, own.ranks, follows)
    return save(folder, saving, extra=extra, overwrite=overwrite, shared=shared)


def progress_of(average: Average, dtype: torch.dtype | None = None) -> StoredAverage:
    """Schedule, clock, dtype and history of an average, as the manifest stores them.

    Args:
        dtype: that it is written in; None for its own.
    """
    return StoredAverage(
        describe(average.schedule),
        average.t,
        average.num_updates,
        str(dtype or average.policy.dtype).removeprefix("torch."),
        average.moved_at,
        average.ledger.history(),
        average.policy.seed if average.policy.stochastic else None,
        average.policy.compensated and dtype is None,
    )


@dataclass(frozen=True)
class _Saving:
    """What a save writes.

    Attributes:
        sources: the averages, and last the model's own tensors.
        averages: progress, by name of the average.
        left_out: names that an export of the full model has and that are not written.
        parts: this rank's fingerprints of the model.
        ranks: the ranks that write.
        follows: id of the save before in a chain.
    """

    sources: Sequence[Contents]
    averages: Mapping[str, StoredAverage]
    left_out: Sequence[str]
    parts: Sequence[pairing.Part]
    ranks: Ranks
    follows: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes written by the rank that writes most."""
        loads = (source.loads() for source in self.sources)
        return max(map(sum, zip(*loads, strict=True)))

    def write(self, path: str, boxes: Sequence[_Box], values: _Values) -> _Told:
        """Writes this rank's file to the folder ``path``."""
        return _write_rank(path, boxes, values, self.ranks), list(self.parts)

    def commit(self, new: NewFolder | NewPrefix, told: Sequence[_Told]) -> None:
        """Completes the checkpoint. On the leader, which was told what every rank wrote."""
        tensors = _tensors(self.sources)
        manifest = Manifest(
            secrets.token_hex(16),
            self.ranks.size,
            dict(self.averages),
            tensors,
            tuple(self.left_out),
            _stored_files([entry for entry, _ in told], tensors),
            new.place,
            model=pairing.merged(self.sources[-1].plan, [theirs for _, theirs in told]),
            follows=self.follows,
        )
        new.finish({manifests.NAME: manifests.pack(manifest)})


def save(
    folder: str | os.PathLike[str],
    saving: _Saving,
    *,
    extra: Callable[[str], None],
    overwrite: bool,
    shared: Averages | None,
) -> PendingSave | None:
    """Writes a checkpoint. Collective.

    Args:
        folder: must not exist, unless ``overwrite``; its parent is created.
        extra: called on the leader with the temporary folder, to write further files.
        overwrite: replace a complete checkpoint at ``folder``.
        shared: None writes it before the return. Else a thread writes it, and these averages are
            copied before they change; what else is written is copied now.

    Raises:
        CheckpointError: on all ranks, if any failed to write; nothing is left behind.
    """
    ranks = saving.ranks
    with new_folder(folder, "save", ranks, overwrite=overwrite) as new:

        def finish(told: list[_Told]) -> None:
            new.add(extra)
            saving.commit(new, told)

        boxes, tensors = _boxes_of(saving.sources, ranks)
        if shared is not None:
            return _in_background(new, saving, boxes, tensors, extra, shared)
        ranks.agree(
            "save (writing)",
            lambda: saving.write(new.path, boxes, _Current(tensors)),
            finish,
            nbytes=saving.nbytes,
        )
        return None


def _in_background(
    new: NewFolder | NewPrefix,
    saving: _Saving,
    boxes: Sequence[_Box],
    tensors: Sequence[Tensor],
    extra: Callable[[str], None],
    shared: Averages,
) -> PendingSave:
    """Keeps the values as they are now; a thread writes them. Collective."""
    kept: list[CopyOnWrite] = []

    def keep() -> None:
        names = {average.name for average in shared.values() if shared.shares(average)}
        of = [box.average for box in boxes]
        of += [box.average for box in boxes if box.companion is not None]
        kept.append(CopyOnWrite(tensors, [name in names for name in of]))

    nbytes = saving.nbytes
    saving.ranks.agree("save (staging)", keep, lambda _: new.add(extra), nbytes=nbytes)
    (values,) = kept

    def write() -> _Told:
        try:
            return saving.write(new.path, boxes, values)
        finally:
            values.clear()

    shared.lending.lend(values)
    new.hand_over()
    return PendingSave(new, saving.ranks, write, lambda told: saving.commit(new, told), nbytes)


def _boxes_of(sources: Sequence[Contents], ranks: Ranks) -> tuple[list[_Box], list[Tensor]]:
    """The boxes that this rank writes, and their values; after these their lost bits."""
    found, tensors, companions = [], [], list[Tensor]()
    taken: set[str] = set()
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
                while key in taken:  # a parameter may be called "w#0"
                    key += "#"
                taken.add(key)
                tensors.append(source.holdings(index, box))
                lost = source.companions(index, box)
                place = None if lost is None else len(companions)
                companions += [] if lost is None else [lost]
                dtype = source.dtype(item)
                found.append(_Box(key, first + number, box, source.name, dtype, place))
        first += len(source.chosen)
    count = len(tensors)  # known only now
    found = [
        one if one.companion is None else replace(one, companion=count + one.companion)
        for one in found
    ]
    return found, tensors + companions


def _write_rank(
    temporary: str, boxes: Sequence[_Box], values: _Values, ranks: Ranks
) -> dict[str, Any] | None:
    """Writes this rank's file and returns its entry for the manifest; None if it owns nothing."""
    if not boxes:
        return None
    head, entries = make_header([(one.key, one.dtype, one.box.sizes) for one in boxes])
    order = sorted(range(len(boxes)), key=lambda i: entries[boxes[i].key].start)
    size = len(head) + sum(entries[one.key].nbytes for one in boxes)
    name = f"rank-{ranks.index:05d}-of-{ranks.size:05d}.safetensors"
    path = os.path.join(temporary, name)
    with reporting(path, "writing"), new_file(path, size) as file:
        blocks = _write_chunks(file, _joined(_chunks(head, boxes, values, order)))
        file.sync()
    text, different = packed([(boxes[i].number, boxes[i].box) for i in order])
    shapes = [[box.offsets, box.sizes] for box in different]
    facts = {"name": name, "size": size, "head": len(head), "blocks": blocks}
    return {**facts, "order": text, "boxes": shapes}


def _write_chunks(file: NewFile | NewObject, chunks: Iterator[memoryview]) -> list[str]:
    """Writes the bytes of a file; returns the checksum of each `BLOCK`, the last one shorter."""
    blocks: list[str] = []
    offset = 0
    checksum = xxhash.xxh3_128()
    for chunk in chunks:
        file.write_at(offset, chunk)
        while chunk:
            piece = chunk[: BLOCK - offset % BLOCK]
            checksum.update(piece)
            chunk, offset = chunk[len(piece) :], offset + len(piece)
            if offset % BLOCK == 0:
                blocks.append(checksum.hexdigest())
                checksum.reset()
    if offset % BLOCK:
        blocks.append(checksum.hexdigest())
    return blocks


def _joined(chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes, with small chunks together: a store is slow at many small writes."""
    small = bytearray()
    for chunk in chunks:
        large = len(chunk) >= _SMALL
        if not large:
            small += chunk
        if small and (large or len(small) >= _SMALL):
            yield memoryview(small)
            small = bytearray()
        if large:
            yield chunk
    if small:
        yield memoryview(small)


def _chunks(
    head: bytes, boxes: Sequence[_Box], values: _Values, order: Sequence[int]
) -> Iterator[memoryview]:
    yield memoryview(head)
    for i in order:
        limit = max(1, _CHUNK // boxes[i].dtype.itemsize)
        parts, lost = values.parts(i, limit), boxes[i].companion
        if lost is not None:
            parts = map(compensated_value, parts, values.parts(lost, limit))
        yield from (raw_bytes(part.to(dtype=boxes[i].dtype)) for part in parts)


def _tensors(sources: Sequence[Contents]) -> tuple[StoredTensor, ...]:
    """The tensors of a checkpoint, numbered source by source."""
    tensors = []
    for source in sources:
        for item in source.items:
            dtype = source.dtype(item)
            tensors.append(
                StoredTensor(
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


def _stored_files(
    entries: Sequence[dict[str, Any] | None], tensors: Sequence[StoredTensor]
) -> tuple[StoredFile, ...]:
    pieces = Pieces([tensor.dtype.itemsize for tensor in tensors])
    return tuple(
        StoredFile(
            entry["name"],
            entry["size"],
            entry["head"],
            tuple(entry["blocks"]),
            pieces.unpacked(entry["order"]),
            tuple(Box(tuple(offsets), tuple(sizes)) for offsets, sizes in entry["boxes"]),
        )
        for entry in entries
        if entry is not None
    )


def read_requests(manifest: Manifest, average: str, shards: Sequence[Shard]) -> list[ReadRequest]:
    """The parts of files that this rank reads for an average."""
    numbers = _numbers(manifest, average)
    return manifests.read_requests(manifest, {numbers[s.fqn]: list(s.boxes) for s in shards})


def read_average(
    manifest: Manifest,
    average: str,
    found: list[ReadRequest],
    shards: Sequence[Shard],
    targets: Shadows,
) -> None:
    """Reads this rank's part of an average into ``targets``, of the same shards. Local.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    numbers = _numbers(manifest, average)
    places = {numbers[s.fqn]: list(s.local_boxes(targets.views[s.fqn])) for s in shards}
    lost = {
        numbers[s.fqn]: [values for _, values in s.local_boxes(targets.companions[s.fqn])]
        for s in shards
        if s.fqn in targets.companions
    }
    for number, box, values in manifests.parts(manifest, found):
        for k, (held, target) in enumerate(places[number]):
            common = held.intersect(box)
            if common is None:
                continue
            part = common.relative_to(box.offsets).view(values)
            inner = common.relative_to(held.offsets)
            if number in lost:
                store_compensated(part, inner.view(target), inner.view(lost[number][k]))
            else:
                inner.view(target).copy_(part)


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
        (here.keys() - stored.keys(), "missing"),
        (stored.keys() - here.keys(), "unexpected"),
    ):
        if names:
            raise ArgumentError(
                f"load from {folder}: {text} tensors in average {average!r}: "
                f"{abbreviate(sorted(names))}; it is a checkpoint of another model, or of another "
                "select= or buffers="
            )
    for fqn, item in here.items():
        there = stored[fqn]
        if (there.shape, there.dtype) != (item.shape, dtype(item)):
            raise ArgumentError(
                f"load from {folder}: {fqn} of average {average!r} has shape {there.shape} and "
                f"dtype {there.dtype}, expected {item.shape} and {dtype(item)}; build the model "
                "and the ShadowPolicy as they were at the save"
            )
