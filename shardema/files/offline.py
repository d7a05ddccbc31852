"""A consolidated export from a checkpoint: one process, no model code, one block in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from shardema import schedules
from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files import layouts
from shardema.files import manifest as manifests
from shardema.files.export import Target, Writer, about, parse_size, plan_targets, reserve
from shardema.files.folder import new_folder
from shardema.files.manifest import Manifest, StoredTensor
from shardema.files.places import any_path, exists, read_whole
from shardema.files.prefix import new_prefix
from shardema.files.remote import is_remote
from shardema.files.safetensors import WHOLE, write_file
from shardema.files.uploads import Uploads
from shardema.ranks.agree import Ranks
from shardema.shards.boxes import whole

_CONFIGS = ("config.json", "generation_config.json")
_ADAPTER = "adapter_config.json"
_MAX_CONFIG = 10_000_000  # bytes
_GROUP = 256 << 20  # bytes of tensors that are read at a time for a store


def export_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    average: str | None = None,
    dtype: torch.dtype | None = None,
    layout: layouts.Layout = "hf",
    max_shard_size: int | str = "5GB",
    partial: bool = False,
    done: Callable[[int], object] = lambda n: None,
) -> Manifest:
    """Writes one average of a checkpoint, as ``ema.export`` does.

    Args:
        folder: a checkpoint of ``ema.save``.
        out: the folder to write; must not exist.
        average: its name; may be None if there is only one.
        dtype: of the averages and frozen parameters; None keeps the stored ones, but of a
            compensated average float32.
        layout: as for ``ema.export``; ``"timm"`` and ``"torch_averaged"`` need memory for the full
            average, and a checkpoint has no extra state of modules.
        max_shard_size: bytes, or a size such as ``"5GB"``.
        partial: export without the parameters that the checkpoint lacks.
        done: called with the number of bytes after each part.

    Raises:
        CheckpointError: a damaged checkpoint, or ``out`` exists.
        ValueError: no average of this name, parameters that the checkpoint lacks, or a model or
            schedule that the layout does not have.
    """
    layouts.check(layout)
    limit = parse_size(max_shard_size)
    stored = manifests.read(folder, "export")
    name = choose_average(stored, average)
    if not partial:
        _check_complete(folder, stored)

    def out_dtype(tensor: StoredTensor) -> torch.dtype:
        if dtype is None:
            return stored.exported_dtype(tensor)
        cast = tensor.role != "buffer" and tensor.dtype.is_floating_point
        return dtype if cast else tensor.dtype

    alone = Ranks((dist.get_rank() if dist.is_initialized() else 0,))
    if layout in layouts.FILES:
        full = _full_tensors(stored, name, out_dtype, done)
        updates = stored.averages[name].num_updates
        layouts.write_file(out, layout, full, updates, alone)
        return stored
    numbers = [n for n, t in enumerate(stored.tensors) if t.average in (name, None) and t.stem]
    fields = _fields(stored, name, numbers) if layout == "diffusers" else {}
    wanted = {n: list(whole(stored.tensors[n].shape)) for n in numbers}
    tensors = [
        (t.stem, t.file_name, out_dtype(t), t.shape) for t in (stored.tensors[n] for n in numbers)
    ]
    averaged = (stored.tensors[n] for n in numbers if stored.tensors[n].average == name)
    written = next((out_dtype(t) for t in averaged), None)
    kept = stored.averages[name]
    told = about(name, kept.t, kept.num_updates, kept.schedule)
    targets, indices = plan_targets(tensors, limit, told)

    def configs(place: str) -> None:
        copy_configs(stored.home, place, {target.stem for target in targets}, written)
        if fields:
            layouts.add_fields(place, fields)

    if is_remote(any_path("export", out)):
        _upload(stored, numbers, targets, out, alone, indices, configs, done)
        return stored
    with (
        new_folder(out, "export", alone) as new,
        Writer(new.path, targets, done) as writer,
    ):
        reserve(new.path, targets)
        for number, box, values in manifests.parts(stored, manifests.read_requests(stored, wanted)):
            tensor = stored.tensors[number]
            writer.write(tensor.stem, tensor.file_name, box, values)
        writer.sync()
        new.add(configs)
        new.finish(indices)
    return stored


def _upload(
    stored: Manifest,
    numbers: Sequence[int],
    targets: Sequence[Target],
    out: str | os.PathLike[str],
    alone: Ranks,
    indices: Mapping[str, bytes],
    configs: Callable[[str], None],
    done: Callable[[int], object],
) -> None:
    """Writes the files into a store, where each is written in its order: tensors are read in it."""
    by_name = {(stored.tensors[n].stem, stored.tensors[n].file_name): n for n in numbers}
    with new_prefix(out, "export", alone) as new, Uploads(done) as uploads:
        new.names += [target.name for target in targets]
        new.add(configs)
        for target in targets:
            path = os.path.join(new.path, target.name)
            names = sorted(target.entries, key=lambda name: target.entries[name].start)
            order = [by_name[target.stem, name] for name in names]
            for number, values in _full(stored, order):
                entry = target.entries[stored.tensors[number].file_name]
                uploads.write(path, target.size, target.head, entry, values)
        uploads.sync()
        new.finish(indices)


def _full(stored: Manifest, order: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Full tensors in this order, read a group at a time."""
    groups: list[list[int]] = [[]]
    used = 0
    for number in order:
        tensor = stored.tensors[number]
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        if groups[-1] and used + nbytes > _GROUP:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += nbytes
    for group in groups:
        tensors = ((n, stored.tensors[n]) for n in group)
        full = {n: torch.empty(t.shape, dtype=t.dtype, device="cpu") for n, t in tensors}
        wanted = {n: list(whole(stored.tensors[n].shape)) for n in group}
        for number, box, values in manifests.parts(stored, manifests.read_requests(stored, wanted)):
            box.view(full[number]).copy_(values)
        yield from full.items()


def _full_tensors(
    stored: Manifest,
    name: str,
    out_dtype: Callable[[StoredTensor], torch.dtype],
    done: Callable[[int], object],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each full tensor of an average under each of its names.

    Raises:
        ValueError: the checkpoint is of adapters, whose names only PEFT knows.
    """
    stems = {tensor.stem for tensor in stored.tensors if tensor.stem}
    if not stems <= {*WHOLE}:
        raise ArgumentError(
            "it is of adapters, which only layout='hf' stores as PEFT names them; give layout='hf' "
            "or ema.export(path, layout=...) with the model"
        )
    for number, tensor in enumerate(stored.tensors):
        if tensor.average not in (name, None) or not tensor.stem:
            continue
        full = torch.empty(tensor.shape, dtype=out_dtype(tensor))
        wanted = {number: list(whole(tensor.shape))}
        for _, box, values in manifests.parts(stored, manifests.read_requests(stored, wanted)):
            box.view(full).copy_(values)
            done(values.numel() * full.dtype.itemsize)
        for fqn in (tensor.fqn, *tensor.aliases):
            yield fqn, full


def _fields(stored: Manifest, name: str, numbers: Sequence[int]) -> dict[str, Any]:
    """The fields of diffusers' ``EMAModel`` for an average of a diffusers model."""
    for stem in {stored.tensors[number].stem for number in numbers}:
        layouts.check_diffusers(stem)
    kept = stored.averages[name]
    schedule = schedules.restore(kept.schedule)
    unit = getattr(schedule, "unit", "step")
    return layouts.ema_model_fields(schedule or kept.schedule, kept.t, unit)


def _check_complete(folder: str | os.PathLike[str], stored: Manifest) -> None:
    if stored.left_out:
        raise ArgumentError(
            f"{folder} lacks {abbreviate(stored.left_out)}: parameters that are not averaged; "
            "save with ema.save(folder, include_frozen=True), or export without them (--partial)"
        )


def choose_average(stored: Manifest, average: str | None) -> str:
    """The average of this name, or the only one. Raises ValueError if there is none such."""
    names = list(stored.averages)
    if average is None and len(names) > 1:
        raise ArgumentError(
            f"there are several averages, choose one of {names}: --average NAME, or average="
        )
    if average is not None and average not in names:
        raise ArgumentError(f"got average {average!r}, expected one of {names}")
    return names[0] if average is None else average


def copy_configs(folder: str, temporary: str, stems: set[str], dtype: torch.dtype | None) -> None:
    """Copies the configs that belong to files of these stems, with the dtype of this export."""
    adapters = [os.path.dirname(stem) for stem in stems if stem not in WHOLE]
    for name in [os.path.join(place, _ADAPTER) for place in adapters] or _CONFIGS:
        path = os.path.join(folder, name)
        if not exists(path) or os.path.islink(os.path.dirname(path)):
            continue
        data = read_whole(path, _MAX_CONFIG)
        write_file(os.path.join(temporary, name), _with_dtype(data, path, dtype))


def _with_dtype(data: bytearray, path: str, dtype: torch.dtype | None) -> bytes | bytearray:
    try:
        config = json.loads(str(data, "utf-8"))
        keys = ("dtype", "torch_dtype")
        stated = [key for key in keys if isinstance(config, dict) and key in config]
        if dtype is None or not stated:
            return data
        for key in stated:
            config[key] = str(dtype).removeprefix("torch.")
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"reading {path}: invalid JSON ({error!r:.300})", path=path
        ) from error
