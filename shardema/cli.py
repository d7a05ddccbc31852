"""The command line: look into checkpoints and export them, without the model's code.

Exit codes: 0 done, 1 the checkpoint or the disk is at fault, 2 the command is.
"""

from __future__ import annotations

import json
import math
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from shardema import manifest as manifests
from shardema.errors import CheckpointError
from shardema.manifest import Manifest, Stored
from shardema.offline import export_checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardema")
def main() -> None:
    """Checkpoints of averaged weights: what is in them, and one file out of them."""


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.option("--tensors/--no-tensors", default=False, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def inspect(checkpoint: str, tensors: bool, as_json: bool) -> None:
    """Show the averages, progress, schedules, tensors, sizes and world of CHECKPOINT.

    Reads the manifest only, however large the checkpoint is.
    """
    try:
        stored = manifests.read(checkpoint)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    facts = _facts(stored)
    if as_json:
        if tensors:
            facts["tensors"] = [
                {"fqn": t.fqn, "average": t.average, "shape": t.shape, "dtype": str(t.dtype)[6:]}
                for t in stored.tensors
            ]
        click.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    _show(console, checkpoint, stored, facts)
    if tensors:
        console.print(_tensor_table(stored))


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


def _nbytes(tensor: Stored) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _show(console: Console, checkpoint: str, stored: Manifest, facts: dict[str, Any]) -> None:
    console.print(
        f"{checkpoint}: saved by {stored.world_size} rank(s) in {len(stored.files)} file(s), "
        f"{_size(facts['bytes'])}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("average", "t", "updates", "schedule", "tensors", "elements", "size"):
        right = column not in ("average", "schedule")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for name, a in facts["averages"].items():
        rule = a["schedule"]
        given = rule.get("params", {})
        params = ", ".join(f"{k}={v}" for k, v in given.items() if k not in ("unit", "samples"))
        table.add_row(
            name,
            f"{a['t']} {given.get('unit', 'step')}s",
            str(a["num_updates"]),
            f"{rule['name']}({params})",
            str(a["tensors"]),
            f"{a['elements']:,}",
            _size(a["bytes"]),
        )
    console.print(table)
    if facts["buffers"]:
        console.print(f"and {facts['buffers']} buffer(s) of the model", highlight=False)
    if stored.left_out:
        console.print(
            f"not in it: {len(stored.left_out)} parameter(s) that are not averaged",
            highlight=False,
        )


def _tensor_table(stored: Manifest) -> Table:
    table = Table()
    for column in ("tensor", "average", "shape", "dtype", "size"):
        table.add_column(column, overflow="fold")
    for t in stored.tensors:
        shape = " x ".join(map(str, t.shape)) or "scalar"
        table.add_row(t.fqn, t.average or f"({t.role})", shape, str(t.dtype)[6:], _size(_nbytes(t)))
    return table


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--average", help="Which average, where there are several.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Dtype of the weights in OUT.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
@click.option("--partial", is_flag=True, help="Go on though the checkpoint left parameters out.")
@click.option("--quiet", is_flag=True, help="No progress bar and no last line.")
def export(
    checkpoint: str,
    out: str,
    average: str | None,
    dtype: str | None,
    max_shard_size: str,
    partial: bool,
    quiet: bool,
) -> None:
    """Write an average of CHECKPOINT to the new folder OUT as safetensors, in the HF layout.

    One process, no model code, a few MiB of memory.
    """
    bar = tqdm(unit="B", unit_scale=True, desc="export", delay=1, leave=False, disable=quiet)
    try:
        with bar:
            stored = export_checkpoint(
                checkpoint,
                out,
                average=average,
                dtype=_DTYPES[dtype] if dtype else None,
                max_shard_size=max_shard_size,
                partial=partial,
                done=bar.update,
            )
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not quiet:
        name = average or next(iter(stored.averages))
        click.echo(f"{out}: average {name!r} at t={stored.averages[name].t}")
