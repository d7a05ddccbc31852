"""The average of another library, written as an export, without the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from shardema.errors import ArgumentError
from shardema.files import consolidated, layouts
from shardema.files.blending import dtype_of
from shardema.files.consolidated import Place
from shardema.files.dcp import Chunks, load_chunks
from shardema.files.export import Writer, parse_size, plan_targets, reserve
from shardema.files.folder import new_folder
from shardema.files.safetensors import MODEL, local_path
from shardema.files.sources import Imported
from shardema.ranks.agree import Ranks
from shardema.shards.boxes import Box, Dims, split_box, whole

_PART = 1 << 22  # elements of a file that are in memory at a time


def write(
    imported: Imported,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    layout: layouts.Layout = "hf",
    max_shard_size: int | str = "5GB",
    done: Callable[[int], object] = lambda n: None,
) -> None:
    """Writes what `importers.read` found, under the names that it has there. Local.

    Args:
        out: the folder to write; must not exist.
        dtype: of floating-point tensors; None keeps theirs.
        layout: ``"hf"``, ``"timm"`` or ``"torch_averaged"``; the latter two need memory for all of
            it.
        max_shard_size: bytes, or a size such as ``"5GB"``.
        done: called with the number of bytes after each part.

    Raises:
        CheckpointError: a damaged source, or ``out`` exists.
        ValueError: tensors without the model's names, or a layout that needs the model.
    """
    label = f"convert {imported.path}".rstrip()
    if imported.naming != "fqn":
        raise ArgumentError(
            f"{label}: {imported.format} stores the tensors without the model's names; build the "
            "model, ema.load_full(path), then ema.export"
        )
    if layout == "diffusers":
        raise ArgumentError(
            f"{label}: layout 'diffusers' needs the model's config; give another one"
        )
    shapes = imported.shapes(label)
    alone = Ranks((dist.get_rank() if dist.is_initialized() else 0,))
    if layout in layouts.FILES:
        full = ((name, _whole(imported, name, shapes[name], dtype)) for name in shapes)
        layouts.write_file(out, layout, full, imported.num_updates or 0, alone)
        return
    limit = parse_size(max_shard_size)
    facts = [
        (MODEL, name, _out_dtype(imported.tensors[name], dtype), shape)
        for name, shape in shapes.items()
    ]
    targets, indices = plan_targets(facts, limit)
    out = local_path("convert", out)
    with new_folder(out, "convert", alone) as new, Writer(new.path, targets, done) as writer:
        reserve(new.path, targets)
        for name, shape in shapes.items():
            for box, values in _parts(imported.tensors[name], shape):
                writer.write(MODEL, name, box, values)
        writer.sync()
        new.finish(indices)


def _out_dtype(value: Any, dtype: torch.dtype | None) -> torch.dtype:
    own = dtype_of(value)
    return own if dtype is None or not own.is_floating_point else dtype


def _parts(value: Any, shape: Dims) -> Iterator[tuple[Box, Tensor]]:
    """The tensor in boxes; those of a safetensors file are read one by one."""
    for box in whole(shape):
        if isinstance(value, Place):
            for part in split_box(box, _PART):
                values = torch.empty(part.sizes, dtype=value.entry.dtype, device="cpu")
                consolidated.read_into(values, value, part)
                yield part, values
        elif isinstance(value, Chunks):
            full = torch.empty(shape, dtype=value.dtype, device="cpu")
            load_chunks(value.folder, {value.key: full})
            yield box, full
        else:
            yield box, value.detach().cpu()


def _whole(imported: Imported, name: str, shape: Dims, dtype: torch.dtype | None) -> Tensor:
    value = imported.tensors[name]
    full = torch.empty(shape, dtype=_out_dtype(value, dtype), device="cpu")
    for box, values in _parts(value, shape):
        box.view(full).copy_(values)
    return full
