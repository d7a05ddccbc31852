"""Reads a consolidated safetensors file or a folder of HF shards, each rank its own boxes."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shardema.errors import CheckpointError, abbreviate
from shardema.files.places import OpenFile, any_path, exists, names_in, read_whole, reading
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    ADAPTER,
    BROKEN,
    DIFFUSERS,
    WHOLE,
    Entry,
    checked_int,
    parse_json,
    reporting,
)
from shardema.ranks.plan import Plan
from shardema.shards.boxes import Box, Dims, contiguous_runs, split_box

_CHUNK = 16 << 20  # bytes read at a time
_MAX_INDEX = 100_000_000  # bytes
_MAX_CONFIG = 10_000_000  # bytes
# what it adds to the model's config
_EMA_MODEL = {"optimization_step", "decay", "min_decay", "update_after_step", "use_ema_warmup"}


@dataclass(frozen=True, slots=True)
class Place:
    """File and byte offset of a stored tensor."""

    path: str
    entry: Entry


def tensors_of(source: str | os.PathLike[str]) -> dict[str, Place]:
    """Every tensor of a ``.safetensors`` file, or of a folder in the HF layout.

    Both may be symlinks, and so may the files in a folder, as in a Hub snapshot.

    Raises:
        CheckpointError: there is none, or a header is broken.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    source = any_path("load_full", source)
    with reporting(source, "reading"):
        if _is_file(source):
            return _tensors_in(source)
        inside = names_in(source)
    singles = [f"{stem}.safetensors" for stem in (*WHOLE, ADAPTER)]
    single = next((name for name in singles if name in inside), None)
    if single is not None:
        return _tensors_in(os.path.join(source, single))
    indices = (f"{name}.index.json" for name in singles)
    found_index = next((name for name in indices if name in inside), None)
    if found_index is None:
        raise CheckpointError(
            f"reading {source}: neither model.safetensors nor its index is in it, nor "
            f"{DIFFUSERS} or {ADAPTER} files; give a .safetensors file or a folder that export or "
            "save_pretrained wrote",
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
    found: dict[str, Place] = {}
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(
                f"reading {index}: it names {name!r:.300}, outside it", path=index
            )
        there = _tensors_in(os.path.join(source, name))
        twice = sorted(there.keys() & found.keys())
        if twice:
            raise CheckpointError(
                f"reading {source}: {abbreviate(twice)} is in {name} and in another file",
                path=source,
            )
        found.update(there)
    return found


def _is_file(path: str) -> bool:
    return exists(path) if is_remote(path) else not stat.S_ISDIR(os.stat(path).st_mode)


def steps_of(source: str | os.PathLike[str]) -> int | None:
    """The steps that diffusers' ``EMAModel`` had made when it wrote the folder; None elsewhere.

    Raises:
        CheckpointError: the count is no whole number of 0 or more, or the config is broken.
    """
    path = os.path.join(any_path("load_full", source), "config.json")
    if not (exists(path) if is_remote(path) else os.path.isfile(path)):
        return None
    try:
        # not as strict as `parse_json`: transformers writes Infinity into some configs
        config = json.loads(read_whole(path, _MAX_CONFIG, follow=True))
        if not isinstance(config, dict) or not config.keys() >= _EMA_MODEL:
            return None
        return checked_int(config["optimization_step"])
    except BROKEN as error:
        raise CheckpointError(
            f"reading {path}: it is broken ({error!r:.300})", path=path
        ) from error


def _tensors_in(path: str) -> dict[str, Place]:
    with reading(path, follow=True) as file:
        return {name: Place(path, entry) for name, entry in file.header().items()}


def read_into(target: Tensor, place: Place, box: Box) -> None:
    """Sets ``target [*box.sizes]`` to a box of a stored tensor, reading little more than that."""
    with reading(place.path, follow=True) as file:
        _read(file, place, box, target)


def _read(file: OpenFile, place: Place, box: Box, target: Tensor) -> None:
    entry = place.entry
    itemsize = entry.dtype.itemsize
    numel, starts = contiguous_runs(entry.shape, box)
    span = starts[-1] + numel - starts[0]
    if span * itemsize <= _CHUNK:
        # one read of the stretches and the bytes between them (columns of a matrix, for one)
        data = file.read_at(entry.start + starts[0] * itemsize, span * itemsize)
        strides = torch.empty(entry.shape, device="meta").stride()
        target.copy_(torch.frombuffer(data, dtype=entry.dtype).as_strided(box.sizes, strides))
        return
    for part in split_box(box, -(-box.numel // 2)):
        _read(file, place, part, part.relative_to(box.offsets).view(target))


def match(
    label: str, plan: Plan, shapes: Mapping[str, Dims], beside: Collection[str] = ()
) -> dict[str, str]:
    """For each averaged fqn the name that the source has it under.

    Args:
        beside: names that the source may have and that are not used.

    Raises:
        ValueError: names that are missing or unknown, or another shape.
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
            raise ValueError(
                f"{label}: {there} has shape {shapes[there]}, expected {item.shape}; it is of "
                "another model"
            )
        elif there in found.values():
            raise ValueError(
                f"{label}: {there} is the name of two tensors of the model, as of two adapters; "
                "give {fqn: tensor} with the names of model.state_dict()"
            )
        else:
            found[item.fqn] = there
    unknown = sorted(shapes.keys() - known)
    if missing or unknown:
        text = f"lacks {abbreviate(missing)}" if missing else ""
        text += " and " if missing and unknown else ""
        text += f"has the unknown {abbreviate(unknown)}" if unknown else ""
        raise ValueError(f"{label}: it {text}; it is of another model")
    return found
