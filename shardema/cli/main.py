"""The command line: look into checkpoints, check, compare, export them, draw averages.

No command needs the model's code. Exit codes: 0 done, 1 the checkpoint, the log or the disk is at
fault or two checkpoints differ, 2 the command is at fault.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

import click
import torch

from shardema.cli import logs, spec
from shardema.cli.checks import diff, prune, verify
from shardema.cli.looks import inspect
from shardema.cli.tables import Commands, one_line, printable, progress
from shardema.files.offline import export_checkpoint
from shardema.schedules import Schedule

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardema")
def main() -> None:
    """Checkpoints of averaged weights: what is in them, whether they are whole, how they differ."""


main.add_command(inspect)
main.add_command(verify)
main.add_command(diff)
main.add_command(prune)


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
    with one_line(), progress("export", quiet) as bar:
        stored = export_checkpoint(
            checkpoint,
            out,
            average=average,
            dtype=_DTYPES[dtype] if dtype else None,
            max_shard_size=max_shard_size,
            partial=partial,
            done=bar.update,
        )
    if not quiet:
        name = average or next(iter(stored.averages))
        click.echo(printable(f"{out}: average {name!r} at t={stored.averages[name].t}"))


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
