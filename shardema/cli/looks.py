"""``shardema inspect``: what a path holds, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from shardema.cli.tables import as_json, line, one_line, row, screen, size, table
from shardema.errors import ArgumentError, counted
from shardema.files import consolidated, recognize
from shardema.files import manifest as manifests
from shardema.files.manifest import Manifest, StoredTensor
from shardema.files.recognize import CHECKPOINT, DEEPSPEED, HF, MANAGER, SAFETENSORS, Recognized


@click.command()
@click.argument("path", type=click.Path())
@click.option("--tensors/--no-tensors", default=False, help="List every tensor.")
@click.option("--layout", is_flag=True, help="List which file of a checkpoint has which boxes.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
def inspect(path: str, tensors: bool, layout: bool, json_: bool) -> None:
    """Show what PATH is, what is in it, and which call reads it.

    A checkpoint of shardema: averages, progress, schedules, tensors, sizes, world. A manager's
    directory: its steps. An export, a safetensors file, a checkpoint of
    torch.distributed.checkpoint, DeepSpeed or Lightning, a pickle: what it is. Reads headers only,
    however large it is, and unpickles nothing.
    """
    with one_line():
        found = recognize.recognize(path)
        if layout and found.kind != CHECKPOINT:
            raise ArgumentError(
                f"--layout: {path} is {found.what}, expected a checkpoint of shardema"
            )
        if tensors and found.kind not in (CHECKPOINT, HF, SAFETENSORS):
            raise ArgumentError(f"--tensors: the tensors of {path} are not known: {found.what}")
        stored = manifests.read(path, "inspect") if found.kind == CHECKPOINT else None
        facts: dict[str, Any] = {
            "path": path,
            "kind": found.kind,
            "what": found.what,
            "advice": found.advice,
        }
        if stored is None:
            facts |= found.facts
            if tensors:
                facts["tensors"] = _exported(path)
        else:
            facts |= _facts(stored)
            if tensors:
                facts["tensors"] = [_tensor(t) for t in stored.tensors]
            if layout:
                facts["layout"] = _layout(stored)
    if json_:
        as_json(facts)
        return
    console = screen()
    if stored is None:
        _show_other(console, found)
        if tensors:
            console.print(_exported_table(facts["tensors"]))
        return
    _show(console, path, stored, facts)
    if tensors:
        console.print(_tensor_table(stored))
    if layout:
        console.print(_layout_table(facts["layout"]))


# ---- checkpoints of shardema --------------------------------------------------------------------


def _facts(stored: Manifest) -> dict[str, Any]:
    return {
        "save_id": stored.save_id,
        "world_size": stored.world_size,
        "bytes": sum(file.size for file in stored.files),
        "files": len(stored.files),
        "averages": {
            name: {
                "t": a.t,
                "num_updates": a.num_updates,
                "schedule": a.schedule,
                "tensors": sum(t.average == name for t in stored.tensors),
                "elements": sum(math.prod(t.shape) for t in stored.tensors if t.average == name),
                "bytes": sum(_nbytes(t) for t in stored.tensors if t.average == name),
            }
            for name, a in stored.averages.items()
        },
        "buffers": sum(t.role == "buffer" for t in stored.tensors),
        "left_out": list(stored.left_out),
    }


def _nbytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _tensor(t: StoredTensor) -> dict[str, Any]:
    return {"fqn": t.fqn, "average": t.average, "shape": t.shape, "dtype": str(t.dtype)[6:]}


def _layout(stored: Manifest) -> list[dict[str, Any]]:
    """The boxes of each file; a file is what one rank wrote."""
    return [
        {
            "file": file.name,
            "bytes": file.size,
            "boxes": [
                {
                    "fqn": stored.tensors[held.tensor].fqn,
                    "average": stored.tensors[held.tensor].average,
                    "offsets": held.box.offsets,
                    "sizes": held.box.sizes,
                    "bytes": held.box.numel * stored.tensors[held.tensor].dtype.itemsize,
                }
                for held in file.boxes
            ],
        }
        for file in stored.files
    ]


def _show(console: Console, path: str, stored: Manifest, facts: Mapping[str, Any]) -> None:
    line(
        console,
        f"{path}: saved by {counted(stored.world_size, 'rank')} in "
        f"{counted(len(stored.files), 'file')}, {size(facts['bytes'])}",
    )
    columns = ("average", "t", "updates", "schedule", "tensors", "elements", "size")
    made = table(columns, ("t", "updates", "tensors", "elements", "size"))
    for name, a in facts["averages"].items():
        rule = a["schedule"]
        given = rule["params"]
        params = ", ".join(f"{k}={v}" for k, v in given.items() if k not in ("unit", "samples"))
        row(
            made,
            name,
            counted(a["t"], given.get("unit", "step")),
            a["num_updates"],
            f"{rule['name']}({params})",
            a["tensors"],
            f"{a['elements']:,}",
            size(a["bytes"]),
        )
    console.print(made)
    if facts["buffers"]:
        line(console, f"and {counted(facts['buffers'], 'buffer')} of the model")
    if stored.left_out:
        left_out = counted(len(stored.left_out), "parameter")
        line(console, f"not in it, since not averaged: {left_out}")


def _tensor_table(stored: Manifest) -> Table:
    made = table(("tensor", "average", "shape", "dtype", "size"))
    for t in stored.tensors:
        dtype, nbytes = str(t.dtype)[6:], size(_nbytes(t))
        row(made, t.fqn, t.average or f"({t.role})", _shape(t.shape), dtype, nbytes)
    return made


def _layout_table(files: list[dict[str, Any]]) -> Table:
    made = table(("file", "tensor", "average", "elements", "size"))
    for file in files:
        name = file["file"]
        for box in file["boxes"]:
            ranges = ", ".join(
                f"{offset}:{offset + n}"
                for offset, n in zip(box["offsets"], box["sizes"], strict=True)
            )
            average = box["average"] or ""
            row(made, name, box["fqn"], average, f"[{ranges}]", size(box["bytes"]))
            name = ""  # once is enough
    return made


def _shape(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims)) or "scalar"


# ---- other things -------------------------------------------------------------------------------


def _exported(path: str) -> list[dict[str, Any]]:
    return [
        {
            "fqn": name,
            "file": place.path,
            "shape": place.entry.shape,
            "dtype": str(place.entry.dtype)[6:],
            "bytes": place.entry.nbytes,
        }
        for name, place in consolidated.tensors_of(path, "inspect").items()
    ]


def _exported_table(tensors: list[dict[str, Any]]) -> Table:
    made = table(("tensor", "shape", "dtype", "size"))
    for t in tensors:
        row(made, t["fqn"], _shape(t["shape"]), t["dtype"], size(t["bytes"]))
    return made


def _show_other(console: Console, found: Recognized) -> None:
    facts = found.facts
    nbytes = f", {size(facts['bytes'])}" if "bytes" in facts else ""
    line(console, f"{found.path}: {found.what}{nbytes}")
    if found.kind in _TABLES:
        console.print(_TABLES[found.kind](facts))
    for kind in facts["also"]:
        line(console, f"it is also of kind {kind}")
    for name, kind in facts["inside"].items():
        line(console, f"in it: {name} ({kind})")
    line(console, found.advice)


def _dtype_table(facts: Mapping[str, Any]) -> Table:
    made = table(("dtype", "tensors", "size"), ("tensors", "size"))
    for dtype, held in facts["dtypes"].items():
        row(made, dtype, held["tensors"], size(held["bytes"]))
    return made


def _step_table(facts: Mapping[str, Any]) -> Table:
    made = table(("step", "state", "t", "size", "made by"), ("step", "size"))
    for step in facts["steps"]:
        progress = ", ".join(f"{name} {t}" for name, t in step.get("t", {}).items())
        state = "complete" if step["complete"] else step["error"]
        nbytes = size(step["bytes"]) if step["complete"] else ""
        maker = "a manager" if step["of_manager"] else "you"
        row(made, step["step"], state, progress, nbytes, maker)
    return made


def _tag_table(facts: Mapping[str, Any]) -> Table:
    columns = ("tag", "size", "model states", "optimizer states", "latest")
    made = table(columns, ("size", "model states", "optimizer states"))
    for tag, held in facts["tags"].items():
        latest = "yes" if tag and tag == facts.get("latest") else ""
        row(made, tag, size(held["bytes"]), held["model_states"], held["optim_states"], latest)
    return made


_TABLES = {HF: _dtype_table, SAFETENSORS: _dtype_table, MANAGER: _step_table, DEEPSPEED: _tag_table}
