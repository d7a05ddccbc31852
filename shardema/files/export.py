"""One consolidated safetensors file (or HF shards of it), written by all ranks at once.

The head (length and header) of a safetensors file follows from names, dtypes and shapes, so every
rank computes the offsets of its boxes and writes them: no full tensor, no collective on data::

    rank 0   [head][== w ==..........][== b ==....]
    rank 1         [..........== w ==][....== b ==]     the same file

This needs one host and a local file system: network file systems write back whole pages, and so
overwrite bytes of other ranks. Elsewhere the leader receives and writes the bytes, by buckets.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from shardema import bars
from shardema.errors import ArgumentError
from shardema.files.folder import new_folder
from shardema.files.places import any_path
from shardema.files.prefix import new_prefix
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    WHOLE,
    Entry,
    NewFile,
    close_quietly,
    make_folders,
    make_header,
    open_existing,
    reporting,
    start_sync,
    write_all,
)
from shardema.files.uploads import Uploads
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Contents, Item, refuse_opaque
from shardema.ranks.transfer import BUCKET_BYTES, Prepared, assemble, prepare, stream
from shardema.shards.boxes import Box, Dims, contiguous_runs, split_box
from shardema.shards.strides import raw_bytes

Mode = Literal["auto", "direct", "stream"]
BEHIND = 16 << 20  # bytes after which the disk begins, while the export goes on

# File systems on which ranks of one host may write to one file concurrently.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs", "ramfs"}
_SMALL_RUN = 4096  # bytes; tensors with shorter contiguous runs are streamed
_CHUNK = 16 << 20  # bytes converted or copied from a device at a time
ABOUT = "shardema"  # key of the metadata that says what the file is
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True)
class Target:
    """One safetensors file of an export: its head and the offset of each tensor.

    Attributes:
        stem: file name without number and suffix, may have a folder; one set of files has one stem.
    """

    stem: str
    name: str
    head: bytes
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        return max((e.start + e.nbytes for e in self.entries.values()), default=len(self.head))


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"5GB"`` or ``"512MiB"``.

    Raises:
        ValueError: not a size, or not above zero.

    >>> parse_size("5GB")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = (
        _UNITS.get(match[2].upper().removesuffix("B") + "B" if match[2] else "") if match else None
    )
    value = int(float(match[1]) * unit) if match and unit else 0
    if value <= 0:
        raise ArgumentError(
            f"max_shard_size: got {size!r}, expected a size such as '5GB' or '512MiB'"
        )
    return value


def about(average: str, t: float, num_updates: int, schedule: Any) -> dict[str, str]:
    """What the metadata of the files of an average says beside its format.

    Args:
        schedule: as `describe` gives it; None of a mixture.
    """
    told = {"average": average, "t": t, "num_updates": num_updates, "schedule": schedule}
    return {ABOUT: json.dumps(told, sort_keys=True)}


def plan_targets(
    tensors: Sequence[tuple[str, str, torch.dtype, Dims]],
    max_shard_size: int,
    told: Mapping[str, str] | None = None,
) -> tuple[list[Target], dict[str, bytes]]:
    """The files of an export, and ``{name: content}`` of an index for each set of several files.

    Args:
        tensors: stem, name, dtype and shape of each; one with an empty stem is not written.
        max_shard_size: bytes.
        told: of `about`, for the metadata of each file.
    """
    by_stem: dict[str, list[tuple[str, torch.dtype, Dims]]] = {}
    for stem, name, dtype, shape in tensors:
        if stem:
            by_stem.setdefault(stem, []).append((name, dtype, shape))
    targets: list[Target] = []
    indices: dict[str, bytes] = {}
    for stem, group in by_stem.items():
        # PEFT reads an adapter from one file
        limit = max_shard_size if stem in WHOLE else None
        made, index = _targets(stem, group, limit, told or {})
        targets += made
        if index is not None:
            indices[f"{stem}.safetensors.index.json"] = index
    return targets, indices


def _targets(
    stem: str,
    tensors: Sequence[tuple[str, torch.dtype, Dims]],
    max_shard_size: int | None,
    told: Mapping[str, str],
) -> tuple[list[Target], bytes | None]:
    """The files of one stem and the bytes of their index.

    As in transformers: tensors fill a file in order until the next would exceed the limit; a
    tensor larger than the limit has a file of its own.
    """
    groups: list[list[tuple[str, torch.dtype, Dims]]] = [[]]
    used = total = 0
    for name, dtype, shape in tensors:
        nbytes = Box(shape, shape).numel * dtype.itemsize
        if max_shard_size is not None and groups[-1] and used + nbytes > max_shard_size:
            groups.append([])
            used = 0
        groups[-1].append((name, dtype, shape))
        used += nbytes
        total += nbytes
    metadata = {"format": "pt", **told}
    if len(groups) == 1:
        return [Target(stem, f"{stem}.safetensors", *make_header(groups[0], metadata))], None
    targets = [
        Target(
            stem, f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", *make_header(group, metadata)
        )
        for i, group in enumerate(groups, start=1)
    ]
    places = {name: target.name for target in targets for name in target.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return targets, (json.dumps(index, indent=2) + "\n").encode()


def write_box(
    fd: int, entry: Entry, box: Box, values: Tensor, done: Callable[[int], object]
) -> None:
    """Writes ``values [*box.sizes]``, a box of a tensor, at its offsets in the file.

    Args:
        done: called with the number of bytes after each chunk.
    """
    itemsize = entry.dtype.itemsize
    for part in split_box(box, max(1, _CHUNK // itemsize)):
        chunk = part.relative_to(box.offsets).view(values)
        data = raw_bytes(chunk.to(device="cpu", dtype=entry.dtype))
        numel, starts = contiguous_runs(entry.shape, part)
        step = numel * itemsize
        for number, start in enumerate(starts):
            stretch = data[number * step : (number + 1) * step]
            write_all(fd, entry.start + start * itemsize, stretch)
        done(len(data))


def export(
    folder: str | os.PathLike[str],
    contents: Contents,
    *,
    max_shard_size: int,
    mode: Mode,
    progress: bool,
    extra: Callable[[str], None],
    told: Mapping[str, str] | None = None,
) -> None:
    """Writes ``contents`` in the HF layout. Collective over their ranks.

    Args:
        folder: must not exist.
        max_shard_size: bytes.
        mode: ``"direct"``: every rank writes its own boxes; ``"stream"``: the leader receives and
            writes them; ``"auto"``: direct where it is safe.
        progress: show a progress bar on the leader once the export has taken a second.
        extra: called on the leader with the temporary folder, to write further files.
        told: of `about`.

    Raises:
        ValueError: ``mode="direct"`` on several hosts, a file system that is not local or a URL.
        CheckpointError: on all ranks, if any failed to write; nothing is left behind.
    """
    ranks, contents = contents.ranks, _exported(contents)
    tensors = [(i.stem, i.file_name, contents.dtype(i), i.shape) for i in contents.items]
    targets, indices = plan_targets(tensors, max_shard_size, told)
    total = sum(entry.nbytes for target in targets for entry in target.entries.values())
    bar = bars.bar("export", total, visible=progress and ranks.leader)
    if is_remote(any_path("export", folder)):
        if mode == "direct":
            raise ArgumentError(
                f"export: got mode='direct' and {os.fspath(folder)}: ranks may write side by side "
                "only on a local file system: leave mode='auto'"
            )
        _upload(folder, contents, targets, indices, bar, extra)
        return
    with (
        new_folder(folder, "export", ranks) as new,
        Writer(new.path, targets, bar.update) as writer,
    ):
        direct = choose_mode(new.path, mode, ranks) == "direct"
        own, streamed = _divide(contents, direct)
        prepared = _make_room(new.path, targets, streamed)
        with bar:
            _write_own(own, writer)
            failed = _write_streamed(streamed, prepared[0], writer) if prepared else None

        def sync() -> None:
            if failed is not None:
                raise failed
            writer.sync()

        def finish(_: list[None]) -> None:
            new.add(extra)
            new.finish(indices)

        # fsync on one rank flushes what every rank wrote to the file
        ranks.agree("export (finishing)", sync, finish, nbytes=total)


def _upload(
    folder: str | os.PathLike[str],
    contents: Contents,
    targets: Sequence[Target],
    indices: Mapping[str, bytes],
    bar: tqdm[Any],
    extra: Callable[[str], None],
) -> None:
    """Writes the files into a store: configs first, then data, the indices last. Collective."""
    ranks, items = contents.ranks, contents.plan.items
    places = {
        (t.stem, name): (n, e.start) for n, t in enumerate(targets) for name, e in t.entries.items()
    }
    contents = contents.only(
        sorted(contents.chosen, key=lambda i: places[items[i].stem, items[i].file_name])
    )
    prepared: list[Prepared] = []
    with new_prefix(folder, "export", ranks) as new, Uploads(bar.update) as uploads:

        def make_room() -> None:
            if ranks.leader:
                new.names += [target.name for target in targets]
                new.add(extra)
            prepared.append(prepare(contents, limit=BUCKET_BYTES))

        def sync() -> None:
            if failed is not None:
                raise failed
            uploads.sync()

        def write(item: Item, values: Tensor) -> None:
            target = targets[places[item.stem, item.file_name][0]]
            path = os.path.join(new.path, target.name)
            entry = target.entries[item.file_name]
            uploads.write(path, target.size, target.head, entry, values)

        ranks.agree("export (reserving)", make_room)
        with bar:
            failed = _write_assembled(contents, prepared[0], write)
        ranks.agree("export (finishing)", sync, lambda _: new.finish(indices))


def _exported(contents: Contents) -> Contents:
    """The part of ``contents`` that an export writes; raises ValueError for opaque tensors."""
    contents = contents.only([i for i in contents.chosen if contents.plan.items[i].stem])
    refuse_opaque(
        "export",
        contents.plan,
        contents.chosen,
        "use ema.full_state_dict(), which returns it unchanged, or ema.save(folder) and then "
        "`shardema export --partial`, which writes the averages alone",
    )
    return contents


def _make_room(folder: str, targets: Sequence[Target], streamed: Contents) -> list[Prepared]:
    """Reserves the files, and buffers for the tensors that are streamed, if any. Collective."""
    prepared: list[Prepared] = []

    def make_room() -> None:
        if streamed.ranks.leader:
            reserve(folder, targets)
        if streamed.chosen:
            prepared.append(prepare(streamed, limit=BUCKET_BYTES))

    streamed.ranks.agree("export (reserving)", make_room)
    return prepared


def choose_mode(temporary: str, mode: Mode, ranks: Ranks) -> str:
    def facts() -> list[Any]:
        with reporting(temporary, "export to"):
            return [host_id(), is_local(temporary)]

    def choose(found: list[list[Any]]) -> str:
        hosts = {host for host, _ in found}
        local = all(is_here for _, is_here in found)
        if mode == "direct" and (len(hosts) > 1 or not local):
            raise ArgumentError(
                f"export: got mode='direct' with ranks on {len(hosts)} host(s) and "
                f"{'a' if local else 'no'} local file system, expected one host and a local file "
                "system; use mode='auto'"
            )
        if mode == "auto":
            return "direct" if len(hosts) == 1 and local else "stream"
        return mode

    return str(ranks.agree("export (choosing)", facts, choose))


def host_id() -> str:
    """An identifier of this host, the same in all its processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()}/{file.read().strip()}"
    except OSError:
        return socket.gethostname()


def is_local(path: str) -> bool:
    """Whether ``path`` is on a file system that no other host writes to."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo") as file:
            lines = [line.split() for line in file]
    except OSError:
        return False
    kinds = [line[line.index("-") + 1] for line in lines if line[2] == wanted]
    return bool(kinds) and kinds[-1] in _LOCAL


def _divide(contents: Contents, direct: bool) -> tuple[Contents, Contents]:
    """Items that each holder writes directly, and items streamed to the leader (tiny runs)."""
    own: list[int] = []
    streamed: list[int] = []
    for index, item in zip(contents.chosen, contents.items, strict=True):
        small = False
        for box, _ in item.holders:
            numel, starts = contiguous_runs(item.shape, box) if len(item.holders) > 1 else (0, [])
            if len(starts) > 1 and numel * contents.dtype(item).itemsize < _SMALL_RUN:
                small = True
                break
        (own if direct and not small else streamed).append(index)
    return contents.only(own), contents.only(streamed)


def reserve(temporary: str, targets: Sequence[Target]) -> None:
    """Creates the files with their heads and reserves their space. On one rank only.

    Where a file system cannot reserve space, the C library writes to it instead, which could
    overwrite what other ranks wrote.
    """
    for target in targets:
        path = os.path.join(temporary, target.name)
        with reporting(path, "writing"):
            make_folders(os.path.dirname(path), [])
        with reporting(path, "writing"), NewFile(path, target.size) as file:
            file.write_at(0, target.head)


class Writer:
    """The files of an export, opened on their first write and closed at the end of a ``with``."""

    def __init__(
        self, folder: str, targets: Sequence[Target], done: Callable[[int], object]
    ) -> None:
        self._folder = folder
        self._places = {(t.stem, name): t for t in targets for name in t.entries}
        self._fds: dict[str, int] = {}
        self._behind = 0  # bytes that the disk may not have begun to write
        self._done = done

    def write(self, stem: str, name: str, box: Box, values: Tensor) -> None:
        """Writes a box of the tensor ``name`` in the files of ``stem``."""
        target = self._places[stem, name]
        path = os.path.join(self._folder, target.name)
        if target.name not in self._fds:
            self._fds[target.name] = open_existing(path, write=True)
        with reporting(path, "writing"):
            write_box(self._fds[target.name], target.entries[name], box, values, self._done)
        self._behind += box.numel * target.entries[name].dtype.itemsize
        if self._behind >= BEHIND:
            start_sync(self._fds[target.name])
            self._behind = 0

    def sync(self) -> None:
        """Syncs and closes the files that this rank wrote to."""
        while self._fds:
            name, fd = self._fds.popitem()
            with reporting(os.path.join(self._folder, name), "writing"):
                try:
                    os.fsync(fd)
                except BaseException:
                    close_quietly(fd)
                    raise
                os.close(fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        while self._fds:  # only after an error, which is being raised
            close_quietly(self._fds.popitem()[1])


def _write_own(contents: Contents, writer: Writer) -> None:
    """Writes the boxes that are assigned to this rank. Collective."""

    def write() -> None:
        for index, item in zip(contents.chosen, contents.items, strict=True):
            for (box, _), owner in zip(item.holders, contents.plan.writers[index], strict=True):
                if owner == contents.ranks.index:
                    writer.write(item.stem, item.file_name, box, contents.holdings(index, box))

    contents.ranks.agree("export (writing)", write, nbytes=max(contents.loads()))


def _write_assembled(
    contents: Contents, prepared: Prepared, write: Callable[[Item, Tensor], None]
) -> Exception | None:
    """`_write_streamed` of full tensors, one by one."""
    failed: Exception | None = None
    arriving = stream(prepared, "export")
    for item, values in assemble(contents, arriving) if contents.ranks.leader else ():
        if failed is None:
            try:
                write(item, values)
            except Exception as error:
                failed = error
    for _ in arriving:  # the last bucket has ended for all, or nothing arrives here
        pass
    return failed


def _write_streamed(contents: Contents, prepared: Prepared, writer: Writer) -> Exception | None:
    """Receives and writes boxes on the leader; returns its error, to be raised on all ranks."""
    failed: Exception | None = None
    for chunk, values in stream(prepared, "export"):
        if failed is None:  # else keep receiving, so that no sender waits forever
            try:
                item = contents.plan.items[chunk.item]
                writer.write(item.stem, item.file_name, chunk.box, values)
            except Exception as error:
                failed = error
    return failed
