"""Reads a consolidated safetensors file or a folder of HF shards; each rank reads its own boxes."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files.places import OpenFile, any_path, exists, is_file, names_in, read_whole, reading
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    ADAPTER,
    BROKEN,
    DIFFUSERS,
    WHOLE,
    Entry,
    checked_int,
    is_file_name,
    parse_json,
    reporting,
)
from shardema.ranks.plan import Plan
from shardema.shards.boxes import Box, Dims, contiguous_runs, split_box
from shardema.shards.strides import raw_bytes

SINGLES = tuple(f"{stem}.safetensors" for stem in (*WHOLE, ADAPTER))
INDICES = tuple(f"{name}.index.json" for name in SINGLES)
_CHUNK = 16 << 20  # bytes read at a time
_MAX_INDEX = 100_000_000  # bytes
_MAX_CONFIG = 10_000_000  # bytes
# keys that diffusers' EMAModel adds to the model's config
_EMA_MODEL = {"optimization_step", "decay", "min_decay", "update_after_step", "use_ema_warmup"}


@dataclass(frozen=True, slots=True)
class Place:
    """File and byte offset of a stored tensor."""

    path: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Files:
    """The safetensors files of a model.

    Attributes:
        paths: of the files, sorted.
        weight_map: of the index, ``{name of a tensor: name of its file}``; None without an index.
    """

    paths: tuple[str, ...]
    weight_map: dict[str, str] | None = None


def files_of(source: str | os.PathLike[str], op: str = "load_full") -> Files:
    """The ``.safetensors`` file ``source``, or those of a folder in the HF layout.

    Raises:
        CheckpointError: there is no such file, or the index is invalid.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    source = any_path(op, source)
    with reporting(source, "reading"):
        if is_file(source):
            return Files((source,))
        inside = names_in(source)
    single = next((name for name in SINGLES if name in inside), None)
    if single is not None:
        return Files((os.path.join(source, single),))
    found_index = next((name for name in INDICES if name in inside), None)
    if found_index is None:
        raise CheckpointError(
            f"reading {source}: it contains no model.safetensors, {DIFFUSERS}.safetensors, "
            f"{ADAPTER}.safetensors, or index of one; give a .safetensors file or a folder that "
            "export or save_pretrained wrote",
            path=source,
        )
    index = os.path.join(source, found_index)
    try:
        weight_map = parse_json(read_whole(index, _MAX_INDEX, follow=True))["weight_map"]
        names = sorted(set(weight_map.values()))
    except BROKEN as error:
        raise CheckpointError(
            f"reading {index}: it is broken ({error!r:.300})", path=index
        ) from error
    for name in names:
        if not is_file_name(name):
            raise CheckpointError(
                f"reading {index}: {name!r:.300} is not a file name in this folder", path=index
            )
    return Files(tuple(os.path.join(source, name) for name in names), weight_map)


def tensors_of(source: str | os.PathLike[str], op: str = "load_full") -> dict[str, Place]:
    """Every tensor of a ``.safetensors`` file, or of a folder in the HF layout.

    Both may be symlinks, and so may the files in a folder, as in a Hub snapshot.

    Raises:
        CheckpointError: there is none, or a header is broken.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    found: dict[str, Place] = {}
    for path in files_of(source, op).paths:
        there = tensors_in(path)
        twice = sorted(there.keys() & found.keys())
        if twice:
            raise CheckpointError(
                f"reading {source}: {abbreviate(twice)} is in {os.path.basename(path)} and in "
                "another file",
                path=str(source),
            )
        found.update(there)
    return found


def steps_of(source: str | os.PathLike[str]) -> int | None:
    """``optimization_step`` of a folder that diffusers' ``EMAModel`` wrote; None for any other.

    Raises:
        CheckpointError: it is not an integer of 0 or more, or the config is invalid.
    """
    path = os.path.join(any_path("load_full", source), "config.json")
    if not (exists(path) if is_remote(path) else os.path.isfile(path)):
        return None
    try:
        # not as strict as `parse_json`: transformers writes Infinity into some configs
        config = json.loads(str(read_whole(path, _MAX_CONFIG, follow=True), "utf-8"))
        if not isinstance(config, dict) or not config.keys() >= _EMA_MODEL:
            return None
        return checked_int(config["optimization_step"])
    except BROKEN as error:
        raise CheckpointError(
            f"reading {path}: it is broken ({error!r:.300})", path=path
        ) from error


def tensors_in(path: str) -> dict[str, Place]:
    """Every tensor of one safetensors file; may be a symlink."""
    with reading(path, follow=True) as file:
        return {name: Place(path, entry) for name, entry in file.header().items()}


def read_into(target: Tensor, place: Place, box: Box) -> None:
    """Reads a box of a stored tensor into ``target [*box.sizes]``, and few other bytes."""
    with reading(place.path, follow=True) as file:
        _read(file, place, box, target)


def read_parts(place: Place, box: Box, buffer: memoryview) -> Iterator[tuple[Box, Tensor]]:
    """Reads a box in parts that fit into the buffer, each valid until the next."""
    dtype = place.entry.dtype
    with reading(place.path, follow=True) as file:
        for part in split_box(box, len(buffer) // dtype.itemsize):
            flat = torch.frombuffer(buffer, dtype=dtype, count=part.numel)
            _read(file, place, part, flat.view(part.sizes))
            yield part, flat.view(part.sizes)


def _read(file: OpenFile, place: Place, box: Box, target: Tensor) -> None:
    entry = place.entry
    itemsize = entry.dtype.itemsize
    numel, starts = contiguous_runs(entry.shape, box)
    begin = entry.start + starts[0] * itemsize
    if len(starts) == 1 and _lies_as(target, entry.dtype):
        file.read_into(begin, raw_bytes(target.detach()))
        return
    span = starts[-1] + numel - starts[0]
    if span * itemsize <= _CHUNK:
        # one read of the contiguous runs and the bytes between them (columns of a matrix)
        data = file.read_at(begin, span * itemsize)
        strides = torch.empty(entry.shape, device="meta").stride()
        target.copy_(torch.frombuffer(data, dtype=entry.dtype).as_strided(box.sizes, strides))
        return
    for part in split_box(box, -(-box.numel // 2)):
        _read(file, place, part, part.relative_to(box.offsets).view(target))


def _lies_as(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of a file can be read into it as they are."""
    return target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()


def match(
    label: str, plan: Plan, shapes: Mapping[str, Dims], beside: Collection[str] = ()
) -> dict[str, str]:
    """Maps each averaged fqn to its name in the source.

    Args:
        label: begins the error messages.
        shapes: of the source, by name.
        beside: names that are allowed in the source and not used.

    Raises:
        ValueError: missing or unexpected names, or another shape.
    """
    found: dict[str, str] = {}
    known = set(beside)
    missing = []
    for item in plan.items:
        names = (item.fqn, *item.aliases)
        known.update(names)
        if not item.averaged:
            continue
        there = next((name for name in names if name in shapes), None)
        if there is None:
            missing.append(item.fqn)
        elif shapes[there] != item.shape:
            raise ArgumentError(
                f"{label}: {there} has shape {shapes[there]}, expected {item.shape}; the source is "
                "of another model"
            )
        elif there in found.values():
            raise ArgumentError(
                f"{label}: {there} is the name of two tensors of the model, such as two adapters; "
                "give {fqn: tensor} with the names of model.state_dict()"
            )
        else:
            found[item.fqn] = there
    unknown = sorted(shapes.keys() - known)
    if missing or unknown:
        text = f"missing {abbreviate(missing)}" if missing else ""
        text += ", " if missing and unknown else ""
        text += f"unexpected {abbreviate(unknown)}" if unknown else ""
        raise ArgumentError(f"{label}: {text}; the source is of another model")
    return found
