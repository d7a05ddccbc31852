"""``shardema.json``: the tensors of a checkpoint, their offsets, and a checksum of every block.

docs/format.md has the format field by field. Nothing in a manifest is trusted: every number is
checked before it is used. A checksum finds damage; it is not a signature, and whoever can write the
folder can write the manifest too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash

from shardema.errors import CheckpointError, abbreviate
from shardema.files import histories, remote
from shardema.files.arrangement import Arrangement, Order, Pieces, StoredBox, StoredFile
from shardema.files.places import OpenFile, any_path, exists, names_in, read_whole, reading
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    BROKEN,
    DTYPES,
    MODEL,
    NAMES,
    STEM,
    checked_int,
    checked_list,
    checked_shape,
    checked_text,
    parse_json,
    reporting,
)
from shardema.profiles import History, Profile
from shardema.shards.boxes import Box, Dims, check_covered, flat_boxes
from shardema.shards.shard import Role

NAME = "shardema.json"
VERSION = (1, 4)  # docs/format.md says what each one added
SHARED_VERSION = (2, 0)  # of a manifest with orders that files share
BLOCK = 4 << 20  # bytes that one checksum covers
MAX_MANIFEST = 1 << 30  # bytes
_START = b'{"checksum":"'
_MIDDLE = b'","body":'
_END = b"}\n"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
PLACE = re.compile(r"save-[0-9a-f]{16}")  # of the files of a save that replaced another one


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        average: None for buffers and frozen parameters.
        file_name: its name in an export; the fqn or one of its aliases.
        stem: stem of its file in an export; empty if it is not exported.
    """

    average: str | None
    fqn: str
    file_name: str
    role: Role
    shape: Dims
    dtype: torch.dtype
    aliases: tuple[str, ...]
    stem: str = MODEL


@dataclass(frozen=True, slots=True)
class StoredAverage:
    """Progress, schedule and history of one average."""

    schedule: dict[str, Any]
    t: float
    num_updates: int
    dtype: str
    moved_at: float  # progress when it last moved, at most ``t``
    history: History  # its last update point is ``moved_at``
    seed: int | None = None  # of an average that is rounded at random
    compensated: bool = False  # its float32 values are stored in float64, with lost bits

    def profile(self, names: tuple[str, ...] = ()) -> Profile:
        """The weight of each past step in it; of the tensor with these names."""
        return Profile(self.history, self.t, names)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """See `shardema.kernels.fingerprint`: of a full tensor in a dtype, 16 hexadecimal digits."""

    dtype: str
    digits: str


@dataclass(frozen=True)
class Manifest:
    """Everything in a checkpoint but the values of its tensors.

    Attributes:
        model: of the averaged parameters when the checkpoint was saved: by ``"weights"`` (what the
            forward uses) and ``"masters"`` (an engine's in fp32) and by fqn; empty before 1.2.
        place: name of the subfolder with the files, "" if they are beside the manifest.
        home: path of the folder with the files; set by `read`.
        follows: ``save_id`` of the snapshot before this one; empty for others.
    """

    save_id: str
    world_size: int
    averages: dict[str, StoredAverage]
    tensors: tuple[StoredTensor, ...]
    left_out: tuple[str, ...]
    files: tuple[StoredFile, ...]
    place: str = ""
    home: str = ""
    model: dict[str, dict[str, Fingerprint]] = field(default_factory=dict)
    follows: str = ""

    @cached_property
    def arrangement(self) -> Arrangement:
        """Which file holds which box of which tensor."""
        return Arrangement(self.files)

    def exported_dtype(self, tensor: StoredTensor) -> torch.dtype:
        """The dtype of a tensor outside of checkpoints, where lost bits are not kept."""
        narrowed = tensor.average is not None and self.averages[tensor.average].compensated
        return torch.float32 if narrowed else tensor.dtype


def pack(manifest: Manifest) -> bytes:
    """The bytes of the manifest's file."""
    orders = [order for order, files in manifest.arrangement.orders if len(files) > 1]
    number = {id(order): n for n, order in enumerate(orders)}
    body = {
        "format": "shardema",
        "version": list(SHARED_VERSION if orders else VERSION),
        "save_id": manifest.save_id,
        "world_size": manifest.world_size,
        "block": BLOCK,
        "averages": {
            name: {
                "schedule": a.schedule,
                "t": a.t,
                "num_updates": a.num_updates,
                "dtype": a.dtype,
                "moved_at": a.moved_at,
                "history": histories.pack(a.history),
                **({} if a.seed is None else {"seed": a.seed}),
                **({"compensated": True} if a.compensated else {}),
            }
            for name, a in manifest.averages.items()
        },
        "tensors": [
            {
                "average": t.average,
                "fqn": t.fqn,
                "file_name": t.file_name,
                "role": t.role,
                "shape": t.shape,
                "dtype": NAMES[t.dtype],
                "aliases": t.aliases,
                **({} if t.stem == MODEL else {"stem": t.stem}),
            }
            for t in manifest.tensors
        ],
        "left_out": manifest.left_out,
        **({"follows": manifest.follows} if manifest.follows else {}),
        "place": manifest.place,
        "model": {
            kind: {fqn: [one.dtype, one.digits] for fqn, one in values.items()}
            for kind, values in manifest.model.items()
        },
        **({"orders": [[one.tensors, one.boxes] for one in orders]} if orders else {}),
        "files": [
            {
                "name": f.name,
                "size": f.size,
                "head": f.head,
                "blocks": f.blocks,
                **_held(f, number.get(id(f.order))),
            }
            for f in manifest.files
        ],
    }
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return _START + xxhash.xxh3_128_hexdigest(text).encode() + _MIDDLE + text + _END


def _held(file: StoredFile, order: int | None) -> dict[str, Any]:
    """What a file holds: its order, if others have it too, or all of it."""
    if order is None:
        return {"pieces": [[b.tensor, b.box.offsets, b.box.sizes] for b in file.boxes]}
    return {"order": order, "boxes": [[box.offsets, box.sizes] for box in file.different]}


def read(folder: str | os.PathLike[str], op: str = "load", *, files: bool = True) -> Manifest:
    """The manifest of the checkpoint in ``folder``, checked.

    Args:
        files: check by `check_file` that each file is there and has its size.

    Raises:
        CheckpointError: no checkpoint, a damaged manifest, an unsupported version, or files that
            are missing or of another size.
        ValueError: the path is empty, or a URL that cannot be used; the message begins with ``op``.
    """
    folder = any_path(op, folder)
    manifest = _read(folder)
    with contextlib.suppress(CheckpointError):
        _check_place(manifest, files)
        return manifest
    manifest = _read(folder)  # another process may have replaced the checkpoint meanwhile
    _check_place(manifest, files)
    return manifest


def _read(folder: str) -> Manifest:
    path = os.path.join(folder, NAME)
    if not exists(path):
        with reporting(folder, "reading"):
            raise CheckpointError(_missing(folder), path=folder)
    data = read_whole(path, MAX_MANIFEST, start=_START)
    begin, middle = len(_START), len(_START) + 32
    body = memoryview(data)[middle + len(_MIDDLE) : -len(_END)]
    framed = (
        data.startswith(_START)
        and data[middle : middle + len(_MIDDLE)] == _MIDDLE
        and data.endswith(_END)
        and data[begin:middle] == xxhash.xxh3_128_hexdigest(body).encode()
    )
    if not framed:
        raise CheckpointError(
            f"reading {path}: checksum mismatch: the file is damaged; load another step",
            path=path,
        )
    try:
        manifest = _parse(parse_json(body), folder)
    except BROKEN as error:
        raise CheckpointError(
            f"reading {path}: {error!r:.300} in the manifest; it was not written by ema.save",
            path=path,
        ) from error
    return manifest


def _check_place(manifest: Manifest, files: bool) -> None:
    if is_remote(manifest.home):
        if files:
            _check_objects(manifest)
        return
    if manifest.place:
        _check_home(manifest)
    for file in manifest.files if files else ():
        check_file(manifest, file)


def _missing(folder: str) -> str:
    try:
        inside = sorted(names_in(folder))
    except NotADirectoryError:
        if os.path.isfile(folder):  # else it is below a file
            return (
                f"reading {folder}: a file, not the folder that ema.save wrote; ema.load_full "
                "reads files of averages"
            )
        inside = None
    except FileNotFoundError:
        inside = None
    if inside is None or (is_remote(folder) and not inside):
        return f"reading {folder}: no such folder; give the folder that ema.save wrote"
    text = f"reading {folder}: no {NAME} in it, so this is not a finished checkpoint of ema.save"
    # not asked of a store, name by name
    nested = [name for name in inside if os.path.exists(os.path.join(folder, name, NAME))]
    if nested:
        return f"{text}; did you mean {os.path.join(folder, nested[-1])}?"
    if any(name.endswith(".safetensors") for name in inside):
        return f"{text}; ema.load_full reads an export"
    return text


def _parse(body: Any, folder: str) -> Manifest:
    if body["format"] != "shardema":
        raise ValueError(f"format {reprlib.repr(body['format'])}, expected 'shardema'")
    major, minor = (checked_int(n) for n in checked_list(body["version"]))
    if major not in (VERSION[0], SHARED_VERSION[0]):
        path = os.path.join(folder, NAME)
        raise CheckpointError(
            f"reading {path}: format version {major}.{minor}, this shardema reads "
            f"{VERSION[0]}.x and {SHARED_VERSION[0]}.x; install the version that wrote it",
            path=path,
        )
    if body["block"] != BLOCK:
        raise ValueError(f"block {reprlib.repr(body['block'])}, expected {BLOCK}")
    place = checked_text(body.get("place", ""))
    if place and not PLACE.fullmatch(place):
        raise ValueError(f"place {reprlib.repr(place)}")
    averages = {checked_text(name): _average(a) for name, a in body["averages"].items()}
    tensors = tuple(_tensor(value, averages) for value in checked_list(body["tensors"]))
    _check_names(tensors, averages)
    files = _files(body, tensors)
    manifest = Manifest(
        checked_text(body["save_id"]),
        checked_int(body["world_size"]),
        averages,
        tensors,
        tuple(checked_text(fqn) for fqn in checked_list(body["left_out"])),
        files,
        place,
        os.path.join(folder, place) if place else folder,
        _model(body.get("model", {}), {tensor.fqn for tensor in tensors if tensor.average}),
        checked_text(body.get("follows", "")),
    )
    _check_covered(manifest)
    return manifest


def _check_covered(manifest: Manifest) -> None:
    """Raises ValueError unless the files hold each element of each tensor exactly once."""
    held, known = manifest.arrangement, set()
    for number, tensor in enumerate(manifest.tensors):
        key = tensor.shape, held.alike(number)
        if key not in known:
            check_covered(tensor.fqn, tensor.shape, held.boxes(number, len(tensor.shape)))
            known.add(key)


def _model(value: Any, averaged: set[str]) -> dict[str, dict[str, Fingerprint]]:
    odd = sorted(value.keys() - {"weights", "masters"})
    if odd:
        raise ValueError(f"fingerprints of {reprlib.repr(odd[0])}")
    return {
        kind: {fqn: _fingerprint(fqn, one, averaged) for fqn, one in values.items()}
        for kind, values in value.items()
    }


def _fingerprint(fqn: str, value: Any, averaged: set[str]) -> Fingerprint:
    dtype, digits = (checked_text(part) for part in checked_list(value))
    if fqn not in averaged or dtype not in DTYPES or not _FINGERPRINT.fullmatch(digits):
        raise ValueError(f"{reprlib.repr(fqn)} has the fingerprint {reprlib.repr(value)}")
    return Fingerprint(dtype, digits)


def _average(value: Any) -> StoredAverage:
    t = histories.checked_number(value["t"])
    moved_at = histories.checked_number(value.get("moved_at", t))
    if moved_at > t:
        raise ValueError(f"moved_at {moved_at}, expected at most t, {t}")
    count = checked_int(value["num_updates"])
    dtype = checked_text(value["dtype"])
    schedule = histories.checked_schedule(value["schedule"])
    history = History(moved_at, imported=True)  # not known before version 1.3
    if "history" in value:
        history = histories.parse(value["history"], moved_at)
    seed = checked_int(value["seed"]) if "seed" in value else None
    compensated = histories.checked_bool(value.get("compensated", False))
    return StoredAverage(schedule, t, count, dtype, moved_at, history, seed, compensated)


def _tensor(value: Any, averages: dict[str, StoredAverage]) -> StoredTensor:
    average = value["average"]
    if average is not None and average not in averages:
        raise ValueError(f"unknown average {reprlib.repr(average)}")
    role = value["role"]
    if role not in ("parameter", "frozen", "buffer"):
        raise ValueError(f"unknown role {reprlib.repr(role)}")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {reprlib.repr(value['dtype'])}")
    aliases = tuple(checked_text(alias) for alias in checked_list(value["aliases"]))
    fqn, file_name = checked_text(value["fqn"]), checked_text(value["file_name"])
    if file_name not in (fqn, *aliases):
        raise ValueError(f"{fqn} has the file name {file_name!r}")
    stem = value.get("stem", MODEL)
    if not isinstance(stem, str) or (stem and not STEM.fullmatch(stem)):
        raise ValueError(f"{fqn} has the file {reprlib.repr(stem)}")
    shape = checked_shape(value["shape"])
    return StoredTensor(average, fqn, file_name, role, shape, DTYPES[value["dtype"]], aliases, stem)


def _check_names(tensors: tuple[StoredTensor, ...], averages: dict[str, StoredAverage]) -> None:
    """Raises ValueError if an export (an average, and tensors without one) has a name twice."""
    for attribute in ("fqn", "file_name"):
        names = [
            (t.average, getattr(t, attribute) if attribute == "fqn" else (t.stem, t.file_name))
            for t in tensors
            if t.stem or attribute == "fqn"
        ]
        common = {name for average, name in names if average is None}
        own = {(average, name) for average, name in names if name not in common}
        if len(common) + len(own) != len(names):
            raise ValueError(f"a tensor is listed twice, by its {attribute}")


def _files(body: Any, tensors: tuple[StoredTensor, ...]) -> tuple[StoredFile, ...]:
    pieces = Pieces([tensor.dtype.itemsize for tensor in tensors])
    orders = [_order(value, pieces) for value in checked_list(body.get("orders", []))]
    files = [_file(value, pieces, orders) for value in checked_list(body["files"])]
    if len({file.name for file in files}) != len(files):
        raise ValueError("a file is listed twice")
    for order, numbers in Arrangement(files).orders:
        within = _smallest(order, tensors)
        for number in numbers:
            _check_boxes(files[number], within, tensors)
    return tuple(files)


def _order(value: Any, pieces: Pieces) -> Order:
    tensors, boxes = (_dims(part) for part in checked_list(value))
    # counts, so as many different ones as the largest needs are all of them
    if len(tensors) != len(boxes) or len(set(boxes)) != 1 + max(boxes, default=-1):
        raise ValueError(f"the order {reprlib.repr(value)}")
    order = pieces.order(tensors, boxes)
    if not order.widest_first:  # else the start of each box in each file would be looked at
        raise ValueError(f"the order {reprlib.repr(value)} does not begin with the widest dtype")
    return order


def _file(value: Any, pieces: Pieces, orders: list[Order]) -> StoredFile:
    name = value["name"]
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError(f"file name {reprlib.repr(name)}")
    if "order" in value:
        order = orders[checked_int(value["order"])]
        different = tuple(_box(*one) for one in checked_list(value["boxes"]))
        if len(different) != len(order.itemsizes_of_box):
            raise ValueError(f"{name}: {len(different)} boxes, which its order does not have")
    else:
        listed = checked_list(value["pieces"])
        order, different = pieces.of([(checked_int(n), _box(*box)) for n, *box in listed])
    size, head = checked_int(value["size"]), checked_int(value["head"])
    blocks = tuple(checked_text(block) for block in checked_list(value["blocks"]))
    if len(blocks) != -(-size // BLOCK):
        raise ValueError(f"{name}: {len(blocks)} checksums, expected {-(-size // BLOCK)}")
    return StoredFile(name, size, head, blocks, order, different)


def _smallest(order: Order, tensors: tuple[StoredTensor, ...]) -> list[tuple[Dims, int]]:
    """For each different box the shape that it must be inside of, and a tensor that has it.

    A box of tensors of several shapes must be inside of the least size of each dim.
    """
    shapes: dict[int, dict[Dims, int]] = {}
    for number, box in zip(order.tensors, order.boxes, strict=True):
        shapes.setdefault(box, {}).setdefault(tensors[number].shape, number)
    found = []
    for box in range(len(shapes)):
        if len({len(shape) for shape in shapes[box]}) > 1:
            raise ValueError(f"a box of tensors of {len(shapes[box])} shapes")
        least = tuple(min(sizes) for sizes in zip(*shapes[box], strict=True))
        found.append((least, next(iter(shapes[box].values()))))
    return found


def _check_boxes(
    file: StoredFile, within: list[tuple[Dims, int]], tensors: tuple[StoredTensor, ...]
) -> None:
    """Raises ValueError unless the boxes are inside of the tensors, and end where the file does."""
    for box, (shape, number) in zip(file.different, within, strict=True):
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
            n > 0 and o + n <= full
            for o, n, full in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside:
            tensor = tensors[number]
            raise ValueError(f"{box!r:.200} is not inside {tensor.fqn} of shape {tensor.shape}")
    if file.end != file.size:
        raise ValueError(f"{file.name}: {file.size} bytes, its head and boxes are {file.end}")
    if file.order.widest_first and file.head % max(file.order.itemsizes, default=1) == 0:
        return  # every box begins between two elements
    starts = file.starts()
    odd = np.flatnonzero(starts % np.array(file.order.itemsizes, np.int64))
    if len(odd):  # an element would lie across two blocks
        fqn = tensors[file.order.tensors[odd[0]]].fqn
        raise ValueError(f"{fqn} begins at byte {starts[odd[0]]}, between its elements")


def _box(offsets: Any, sizes: Any) -> Box:
    return Box(_dims(offsets), _dims(sizes))


def _dims(value: Any) -> Dims:
    return tuple(checked_int(n) for n in checked_list(value))


def _check_home(manifest: Manifest) -> None:
    with reporting(manifest.home, "reading"):
        mode = os.lstat(manifest.home).st_mode
    if not stat.S_ISDIR(mode):
        raise CheckpointError(
            f"reading {manifest.home}: not a folder; the checkpoint is damaged", path=manifest.home
        )


def check_file(manifest: Manifest, file: StoredFile) -> None:
    """Raises CheckpointError unless a file of the checkpoint is a regular one of its size."""
    path = os.path.join(manifest.home, file.name)
    if is_remote(path):
        _check_object(path, file, remote.entries(manifest.home))
        return
    with reporting(path, "reading"):
        try:
            found = os.lstat(path)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"reading {path}: {error.strerror}; the checkpoint is incomplete",
                path=path,
                errno=error.errno,
            ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
        raise CheckpointError(
            f"reading {path}: {found.st_size} bytes, expected a regular file of {file.size}; "
            "the checkpoint is damaged",
            path=path,
        )


def _check_objects(manifest: Manifest) -> None:
    found = remote.entries(manifest.home)
    for file in manifest.files:
        _check_object(os.path.join(manifest.home, file.name), file, found)


def _check_object(path: str, file: StoredFile, found: dict[str, int | None]) -> None:
    if file.name not in found:
        raise CheckpointError(
            f"reading {path}: {os.strerror(errno.ENOENT)}; the checkpoint is incomplete",
            path=path,
            errno=errno.ENOENT,
        )
    if found[file.name] != file.size:
        raise CheckpointError(
            f"reading {path}: {found[file.name]} bytes, expected {file.size}; the checkpoint "
            "is damaged",
            path=path,
        )


Needed = tuple[int, int, StoredBox]  # first byte and end, in the file of the box


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What to read of one file, in the file's order."""

    file: StoredFile
    needed: tuple[Needed, ...]

    @property
    def blocks(self) -> dict[int, list[Needed]]:
        """The blocks that are read, ascending, each with what is needed of it."""
        found: dict[int, list[Needed]] = {}
        for start, stop, stored in self.needed:
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                inside = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
                found.setdefault(block, []).append((*inside, stored))
        return found


def read_requests(manifest: Manifest, wanted: dict[int, list[Box]]) -> list[ReadRequest]:
    """What to read of each file.

    Args:
        wanted: boxes by number of the tensor.
    """
    needed: dict[int, list[tuple[int, int, StoredBox]]] = {}
    for tensor, boxes in wanted.items():
        itemsize = manifest.tensors[tensor].dtype.itemsize
        held = {one: None for box in boxes for one in manifest.arrangement.overlapping(tensor, box)}
        for file, stored in held:
            start, stop = (stored.start + edge * itemsize for edge in _reach(stored, boxes))
            needed.setdefault(file, []).append((start, stop, stored))
    return [
        ReadRequest(manifest.files[file], tuple(sorted(needed[file], key=lambda one: one[0])))
        for file in sorted(needed)
    ]


def parts(
    manifest: Manifest, found: list[ReadRequest], buffer: memoryview | None = None
) -> Iterator[tuple[int, Box, torch.Tensor]]:
    """Reads and verifies each block once, in the files' order.

    Args:
        buffer: of `BLOCK` bytes, for who reads often: a fresh one costs as much as to read it.

    Yields:
        ``(tensor, box, values)``: values ``[*box.sizes]`` of a box of that tensor, valid until
        the next iteration. The boxes cover the wanted ones and may extend beyond them.

    Raises:
        CheckpointError: a file is missing, cut short or damaged.
    """
    room = memoryview(bytearray(BLOCK)) if buffer is None else buffer
    for read_at_once in reads(manifest, found, room):
        for stored, first, values in read_at_once:
            for box, part in boxes_of(stored.box, first, values):
                yield stored.tensor, box, part


def boxes_of(held: Box, first: int, values: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """The elements of a box from number ``first`` on, flat, as boxes of the tensor."""
    done = 0
    for box in flat_boxes(held.sizes, first, values.numel()):
        yield box.shifted(held.offsets), values[done : done + box.numel].view(box.sizes)
        done += box.numel


def reads(
    manifest: Manifest, found: list[ReadRequest], buffer: memoryview
) -> Iterator[list[tuple[StoredBox, int, torch.Tensor]]]:
    """`parts` as they follow each other in the files, flat.

    Args:
        buffer: of a whole number of elements, `BLOCK` bytes at most. If it has fewer, values are
            given out before their block is verified, and count only once nothing was raised.

    Yields:
        What was read at once, never nothing: ``(stored, first, values)``, the elements of a stored
        box from number ``first`` on. Valid until the next iteration.
    """
    for request in found:
        with reading(os.path.join(manifest.home, request.file.name)) as opened:
            for block, needed in request.blocks.items():
                names = [manifest.tensors[stored.tensor].fqn for _, _, stored in needed]
                for begin, data in _read_block(opened, request.file, block, names, buffer):
                    inside = [_elements(manifest, one, begin, data) for one in needed]
                    if any(one is not None for one in inside):
                        yield [one for one in inside if one is not None]


def _elements(
    manifest: Manifest, needed: Needed, begin: int, data: memoryview
) -> tuple[StoredBox, int, torch.Tensor] | None:
    """What is needed of ``data``, which begins at byte ``begin`` of the file."""
    start, stop, stored = max(needed[0], begin), min(needed[1], begin + len(data)), needed[2]
    if start >= stop:
        return None
    dtype = manifest.tensors[stored.tensor].dtype
    values = torch.frombuffer(data[start - begin : stop - begin], dtype=dtype)
    return stored, (start - stored.start) // dtype.itemsize, values


def _read_block(
    opened: OpenFile, file: StoredFile, block: int, names: list[str], buffer: memoryview
) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a block, as many at a time as fit; raises before the last if it is damaged."""
    checksum = xxhash.xxh3_128()
    start, stop = block * BLOCK, min((block + 1) * BLOCK, file.size)
    for begin in range(start, stop, len(buffer)):
        data = buffer[: min(len(buffer), stop - begin)]
        opened.read_into(begin, data)
        checksum.update(data)
        if begin + len(data) == stop and checksum.hexdigest() != file.blocks[block]:
            raise CheckpointError(
                f"reading {opened.path}: checksum mismatch in bytes {start} to {stop} "
                f"({abbreviate(names)}): the file is damaged; load another step",
                path=opened.path,
            )
        yield begin, data


def _reach(stored: StoredBox, boxes: list[Box]) -> tuple[int, int]:
    """First element of the stored box that any of the boxes overlaps, and the end.

    Args:
        boxes: of which one overlaps it.
    """
    low, high = stored.box.numel, 0
    for box in boxes:
        common = stored.box.intersect(box)
        if common is None:
            continue
        inner = common.relative_to(stored.box.offsets)
        first = last = 0
        for offset, size, full in zip(inner.offsets, inner.sizes, stored.box.sizes, strict=True):
            first = first * full + offset
            last = last * full + offset + size - 1
        low, high = min(low, first), max(high, last + 1)
    return low, high
