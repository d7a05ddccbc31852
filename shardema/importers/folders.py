"""Averages in folders: safetensors in the Hugging Face layout, and torch.distributed.checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files import consolidated
from shardema.files.dcp import Chunks, load_chunks
from shardema.files.places import any_path, is_file, names_in
from shardema.files.safetensors import reporting
from shardema.files.sources import Imported
from shardema.importers import states, torchfile

SAYS = {
    "safetensors": "a .safetensors file, or a folder of them in the Hugging Face layout",
    "torchtitan": "state.*.ema_params.*, a folder of torchtitan's checkpoints",
    "dcp": "a folder of torch.distributed.checkpoint with tensors by the model's names",
}
METADATA = ".metadata"  # in each folder that ``dcp.save`` wrote
_TORCHTITAN = re.compile(r"(?:ema\.)?state\.(?P<fqn>.+)\.ema_params\.(?P<copy>[^.]+)")
_STEP = "train_state.step"
_COUNTS = "ema_metadata.pt"  # of SimpleTuner


def looked_into(source: str | os.PathLike[str]) -> tuple[str, set[str] | None]:
    """The path, and what is in it if it is a folder.

    Raises:
        CheckpointError: it is not there or cannot be read.
        ValueError: it is empty, or a URL that cannot be used.
    """
    path = any_path("load_full", source)
    with reporting(path, "reading"):
        return path, None if is_file(path) else names_in(path)


def read_safetensors(
    path: str, format: str, key: str, prefix: str, names: Sequence[str] | None
) -> Imported:
    """A file or folder of safetensors, with the counter of diffusers' EMAModel if it has one."""
    label = f"load_full from {path}"
    tensors: dict[str, Any] = dict(consolidated.tensors_of(path))
    steps = consolidated.steps_of(path)
    kind = "safetensors" if steps is None else "diffusers"
    if format not in ("auto", kind, "safetensors"):
        raise ArgumentError(f"{label}: got {SAYS['safetensors']}, expected format {format!r}")
    if key:
        raise ArgumentError(
            f"{label}: got key={key!r}: it has one part; give prefix= for its names"
        )
    return states.renamed(
        label, Imported(kind, tensors, num_updates=steps, path=path), prefix, names
    )


# ---- torch.distributed.checkpoint -------------------------------------------------------------


def read_dcp(
    folder: str,
    format: str,
    key: str,
    prefix: str,
    names: Sequence[str] | None,
    *,
    trust: bool,
) -> Imported:
    """The average in a folder that ``dcp.save`` wrote; see `shardema.importers.read`."""
    if not trust:
        raise CheckpointError(
            f"reading {folder}: a folder of torch.distributed.checkpoint: its {METADATA} is a "
            "pickle, which can run any code when it is read; if you trust who wrote it, give "
            "ema.load_full(importers.read(folder, trust=True)), or shardema convert --trust",
            path=folder,
        )
    label = f"load_full from {folder}"
    chunks, others = _entries(folder)
    copies = {copy for _, copy, _ in _of_torchtitan(chunks)}
    kind = "torchtitan" if copies and (not key or key in copies) else "dcp"
    if not key and any(re.fullmatch(r"shadow_params\.\d+", name) for name in chunks):
        kind = "simpletuner"
    if format not in ("auto", kind):
        raise ArgumentError(f"{label}: got format {kind!r} ({_shown(chunks)}), expected {format!r}")
    if kind == "torchtitan":
        found = _torchtitan(label, folder, chunks, key, stepped=_STEP in others)
    elif kind == "simpletuner":
        found = _simpletuner(label, folder, chunks)
    else:
        found = _plain(label, chunks, key)
    return states.renamed(label, replace(found, path=folder), prefix, names)


def _entries(folder: str) -> tuple[dict[str, Chunks], set[str]]:
    """The tensors in the folder, and the keys of everything else."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        chunks = {
            name: Chunks(folder, name, entry.properties.dtype, tuple(entry.size))
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        return chunks, stored.keys() - chunks.keys()
    except Exception as error:  # unpickling may raise anything
        raise CheckpointError(
            f"reading {folder}: its {METADATA} is broken ({error!r:.300})", path=folder
        ) from error


def _shown(chunks: dict[str, Chunks]) -> str:
    return abbreviate([name[:100] for name in chunks]) or "no tensors"


def _of_torchtitan(chunks: dict[str, Chunks]) -> list[tuple[str, str, Chunks]]:
    found = [(_TORCHTITAN.fullmatch(name), chunk) for name, chunk in chunks.items()]
    return [(match["fqn"], match["copy"], chunk) for match, chunk in found if match]


def _torchtitan(
    label: str, folder: str, chunks: dict[str, Chunks], key: str, *, stepped: bool
) -> Imported:
    entries = _of_torchtitan(chunks)
    copies = sorted({copy for _, copy, _ in entries})
    if not key and len(copies) > 1:
        raise ArgumentError(f"{label}: it holds the averages {copies}; choose one by key=")
    wanted = key or copies[0]
    tensors: dict[str, Any] = {fqn: chunk for fqn, copy, chunk in entries if copy == wanted}
    step = None
    if stepped:
        state: dict[str, Any] = {_STEP: None}
        load_chunks(folder, state)
        step = states.count_of(state[_STEP], _STEP)
    return Imported("torchtitan", tensors, num_updates=step, metadata={"copy": wanted})


def _simpletuner(label: str, folder: str, chunks: dict[str, Chunks]) -> Imported:
    listed = {n.rpartition(".")[2]: c for n, c in chunks.items() if n.startswith("shadow_params.")}
    if set(listed) != {str(number) for number in range(len(listed))}:
        raise ArgumentError(f"{label}: shadow_params are not numbered from 0 on: {_shown(chunks)}")
    tensors: dict[str, Any] = {str(number): listed[str(number)] for number in range(len(listed))}
    path = os.path.join(folder, _COUNTS)
    with reporting(folder, "reading"):
        counted = _COUNTS in os.listdir(folder)
    if not counted:
        return Imported("simpletuner", tensors, "order")
    counts = torchfile.load(path)
    try:
        step = states.count_of(counts["optimization_step"], "optimization_step")
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"reading {path}: no counts in it ({error!r:.200})", path=path
        ) from error
    return Imported("simpletuner", tensors, "order", step)


def _plain(label: str, chunks: dict[str, Chunks], key: str) -> Imported:
    begin = f"{key}." if key else ""
    tensors: dict[str, Any] = {
        name.removeprefix(begin): chunk for name, chunk in chunks.items() if name.startswith(begin)
    }
    if not tensors:
        raise ArgumentError(f"{label}: key={key!r}: nothing is there in {_shown(chunks)}")
    return Imported("dcp", tensors)
