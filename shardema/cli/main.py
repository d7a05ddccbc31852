"""The command line: look into checkpoints, export them, draw averages, without the model's code.

Exit codes: 0 done, 1 the checkpoint, the log or the disk is at fault, 2 the command is.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from shardema.cli import logs, spec
from shardema.errors import CheckpointError
from shardema.files import manifest as manifests
from shardema.files.layouts import LAYOUTS, Layout
from shardema.files.manifest import Manifest, Stored
from shardema.files.offline import export_checkpoint
from shardema.schedules import Schedule

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
        stored = manifests.read(checkpoint, "inspect")
    except CheckpointError as error:
        raise click.ClickException(_shown(error)) from error
    except ValueError as error:
        raise click.UsageError(_shown(error)) from error
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


def _shown(text: object) -> str:
    """``text`` without what a terminal acts on, or cannot show: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _row(table: Table, *cells: object) -> None:
    """Adds cells as they are: brackets in them are no markup."""
    table.add_row(*(Text(_shown(cell)) for cell in cells))


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
    line = (
        f"{checkpoint}: saved by {stored.world_size} rank(s) in {len(stored.files)} file(s), "
        f"{_size(facts['bytes'])}"
    )
    console.print(Text(_shown(line)), soft_wrap=True)
    table = Table()
    for column in ("average", "t", "updates", "schedule", "tensors", "elements", "size"):
        right = column not in ("average", "schedule")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for name, a in facts["averages"].items():
        rule = a["schedule"]
        given = rule["params"]
        params = ", ".join(f"{k}={v}" for k, v in given.items() if k not in ("unit", "samples"))
        _row(
            table,
            name,
            f"{a['t']} {given.get('unit', 'step')}s",
            a["num_updates"],
            f"{rule['name']}({params})",
            a["tensors"],
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
        _row(table, t.fqn, t.average or f"({t.role})", shape, str(t.dtype)[6:], _size(_nbytes(t)))
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
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default="hf", show_default=True, help="What reads OUT."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
@click.option("--partial", is_flag=True, help="Go on though the checkpoint left parameters out.")
@click.option("--quiet", is_flag=True, help="No progress bar and no last line.")
def export(
    checkpoint: str,
    out: str,
    average: str | None,
    dtype: str | None,
    layout: Layout,
    max_shard_size: str,
    partial: bool,
    quiet: bool,
) -> None:
    """Write an average of CHECKPOINT to the new folder OUT, by default in the HF layout.

    One process, no model code, a few MiB of memory. The layouts timm and torch_averaged are one
    file of torch.save, and need memory for the average.
    """
    bar = tqdm(unit="B", unit_scale=True, desc="export", delay=1, leave=False, disable=quiet)
    try:
        with bar:
            stored = export_checkpoint(
                checkpoint,
                out,
                average=average,
                dtype=_DTYPES[dtype] if dtype else None,
                layout=layout,
                max_shard_size=max_shard_size,
                partial=partial,
                done=bar.update,
            )
    except CheckpointError as error:
        raise click.ClickException(_shown(error)) from error
    except ValueError as error:
        raise click.UsageError(_shown(error)) from error
    if not quiet:
        name = average or next(iter(stored.averages))
        click.echo(_shown(f"{out}: average {name!r} at t={stored.averages[name].t}"))


@main.group()
def plot() -> None:
    """Draw what averages are made of, how they decay, and what they do in a run."""


_FORMATS = (".png", ".svg", ".pdf")
_force = click.option("--force", is_flag=True, help="Replace the picture if it exists.")


def _output(default: str) -> Callable[..., Any]:
    """The option that names the picture, in a format that its suffix says."""

    def checked(ctx: click.Context, param: click.Parameter, path: str) -> str:
        if not path.endswith(_FORMATS):
            raise click.BadParameter(f"got {path!r}, expected a name in {', '.join(_FORMATS)}")
        return path

    kind = click.Path(dir_okay=False)
    return click.option(
        "--output", "-o", type=kind, default=default, show_default=True, callback=checked
    )


def _of_rules(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which averages and how long a run."""
    for option in (
        click.option("--dt", type=float, help="Samples, tokens, ... of one step, where counted."),
        click.option("--steps", type=click.IntRange(1), required=True, help="Steps of the run."),
        click.option("--preset", multiple=True, help="As 'timm_v3(decay=0.9999)'; repeatable."),
        click.option("--schedule", multiple=True, help="As 'power(std=0.10)'; repeatable."),
    ):
        command = option(command)
    return command


@plot.command()
@_of_rules
@click.option("--log", is_flag=True, help="A logarithmic axis of weights.")
@_output("profile.png")
@_force
def profile(
    schedule: tuple[str, ...],
    preset: tuple[str, ...],
    steps: int,
    dt: float | None,
    log: bool,
    output: str,
    force: bool,
) -> None:
    """Draw how much each step of a run weighs in the average at its end."""
    _draw(
        output,
        force,
        lambda drawing: drawing.profile(_rules(schedule, preset), steps, dt=dt, log=log),
    )


@plot.command()
@_of_rules
@_output("decay.png")
@_force
def decay(
    schedule: tuple[str, ...],
    preset: tuple[str, ...],
    steps: int,
    dt: float | None,
    output: str,
    force: bool,
) -> None:
    """Draw the decay of each update of a run."""
    _draw(output, force, lambda drawing: drawing.decay(_rules(schedule, preset), steps, dt=dt))


@plot.command()
@click.argument("log", type=click.Path())
@click.option("--raw", help="Column of the raw weights; else all pairs by their names.")
@click.option("--average", help="Column of the average.")
@click.option("--step", help="Column of the horizontal axis.  [default: step]")
@click.option("--unit", default="", help="Unit of the vertical axis, as nats.")
@_output("curves.png")
@_force
def curves(
    log: str,
    raw: str | None,
    average: str | None,
    step: str | None,
    unit: str,
    output: str,
    force: bool,
) -> None:
    """Draw the raw and the averaged learning curves of LOG.

    LOG is the log.csv of the scripts in launch/, Lightning's metrics.csv, lines of JSON, or the
    trainer_state.json of transformers.
    """
    try:
        rows = logs.read(log)
    except OSError as error:
        raise click.ClickException(f"reading {log}: {error.strerror}") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _draw(
        output,
        force,
        lambda drawing: drawing.curves(rows, raw=raw, averaged=average, step=step, unit=unit),
    )


def _rules(written: tuple[str, ...], presets: tuple[str, ...]) -> dict[str, Schedule]:
    if not written and not presets:
        raise ValueError("nothing to draw: give --schedule or --preset")
    found = {text: spec.schedule(text) for text in written}
    for text in presets:
        found |= spec.preset(text)
    return found


def _draw(output: str, force: bool, make: Callable[[Any], Any]) -> None:
    """Writes a picture, into an existing file only by force, and only when it is drawn."""
    if os.path.lexists(output) and not force:
        raise click.ClickException(f"{output} exists already: give another --output, or --force")
    try:
        from shardema.cli import plot as drawing
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    try:
        figure = make(drawing)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    picture = io.BytesIO()
    figure.savefig(picture, format=output.rsplit(".", 1)[1], dpi=120)
    try:
        with open(output, "wb" if force else "xb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise click.ClickException(f"writing {output}: {error.strerror}") from error
    click.echo(f"drawn in {output}")
