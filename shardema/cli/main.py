"""The command line: inspects, verifies, compares and exports checkpoints, plots averages.

No command needs model code. Exit codes: 0 success, 1 an error of the checkpoint, the log or the
file system, or two checkpoints that differ, 2 wrong usage.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from shardema import importers
from shardema.cli import logs, spec
from shardema.cli.checks import diff, prune, verify
from shardema.cli.chosen import DTYPES, merge, reconstruct
from shardema.cli.demo import demo
from shardema.cli.doctor import doctor
from shardema.cli.looks import inspect
from shardema.cli.planned import plan
from shardema.cli.tables import Commands, as_json, one_line, printable, progress
from shardema.cli.texts import describe, unit_of
from shardema.errors import ArgumentError, counted
from shardema.files import companions, manifest
from shardema.files.layouts import LAYOUTS, Layout
from shardema.files.manifest import Manifest
from shardema.files.offline import export_checkpoint
from shardema.files.profiles import read_profile
from shardema.importers import converting
from shardema.profiles import Profile
from shardema.schedules import Schedule


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shardema")
def main() -> None:
    """Inspect, verify, compare and export checkpoints of averaged weights; plot averages."""


main.add_command(demo)
main.add_command(inspect)
main.add_command(verify)
main.add_command(diff)
main.add_command(prune)
main.add_command(reconstruct)
main.add_command(merge)
main.add_command(plan)
main.add_command(doctor)


@main.command()
@click.argument("checkpoint", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--average", help="Name of the average, if there are several.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Dtype of the weights in OUT.")
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default="hf", show_default=True, help="What reads OUT."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
@click.option("--partial", is_flag=True, help="Export without parameters that are not saved.")
@click.option("--tokenizer", type=click.Path(), help="Folder of a tokenizer to copy to OUT.")
@click.option("--pipeline", type=click.Path(), help="A diffusers pipeline: OUT is a copy of it,")
@click.option("--component", help="with this component replaced, such as unet.")
@click.option("--card", is_flag=True, help="Write a model card.")
@click.option("--base-model", help="For the card: what the run started from.")
@click.option("--push", metavar="ORG/NAME", help="Upload OUT to the Hugging Face Hub, with a card.")
@click.option("--private", is_flag=True, help="With --push: a new repository is private.")
@click.option("--quiet", is_flag=True, help="Print no progress bar and no summary.")
def export(
    checkpoint: str,
    out: str,
    average: str | None,
    dtype: str | None,
    layout: Layout,
    max_shard_size: str,
    partial: bool,
    tokenizer: str | None,
    pipeline: str | None,
    component: str | None,
    card: bool,
    base_model: str | None,
    push: str | None,
    private: bool,
    quiet: bool,
) -> None:
    """Write an average of CHECKPOINT to the new folder OUT, by default in the HF layout.

    One process, no model code, a few MiB of memory. The layouts timm and torch_averaged are one
    file of torch.save, and need memory for the average.
    """
    hub = _hub() if card or push else None
    if (pipeline is None) != (component is None):
        raise click.UsageError("give --pipeline and --component together")
    if hub is not None and (pipeline is not None or layout not in ("hf", "diffusers")):
        raise click.UsageError("--card and --push are of one model in the HF layout")
    stored: list[Manifest] = []
    with one_line(), progress("export", quiet) as bar:
        companions.check_tokenizer(tokenizer)

        def write(folder: str) -> None:
            stored[:] = [
                export_checkpoint(
                    checkpoint,
                    folder,
                    average=average,
                    dtype=DTYPES[dtype] if dtype else None,
                    layout=layout,
                    max_shard_size=max_shard_size,
                    partial=partial,
                    done=bar.update,
                )
            ]

        if pipeline is not None and component is not None:
            companions.into_pipeline(pipeline, component, out, write)
        else:
            write(out)
        if tokenizer is not None:
            companions.copy_tokenizer(tokenizer, out)
    address = _published(hub, out, push, base_model, private) if hub is not None else None
    if not quiet:
        name = average or next(iter(stored[0].averages))
        click.echo(printable(f"{out}: average {name!r} at t={stored[0].averages[name].t}"))
        if address:
            click.echo(printable(address))


def _hub() -> Any:
    """The module that needs huggingface_hub, before anything is written."""
    try:
        from shardema.files import hub
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    return hub


def _published(
    hub: Any, out: str, push: str | None, base_model: str | None, private: bool
) -> str | None:
    """Writes the card, and uploads the folder if there is a place; returns its address."""
    with one_line():
        if push:
            return str(hub.push(out, push, base_model=base_model, private=private))
        hub.write_card(out, base_model=base_model)
        return None


@main.command()
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--format", "format_", default="auto", help="Format of IN, if it is not recognized.")
@click.option("--key", default="", help="The part of IN that holds the average.")
@click.option("--prefix", default="", help="What names in IN begin with and the model's do not.")
@click.option("--trust", is_flag=True, help="Allow the pickle in a DCP folder to run code.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Dtype of the weights in OUT.")
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default="hf", show_default=True, help="What reads OUT."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
@click.option("--quiet", is_flag=True, help="Print no progress bar and no summary.")
def convert(
    source: str,
    out: str,
    format_: str,
    key: str,
    prefix: str,
    trust: bool,
    dtype: str | None,
    layout: Layout,
    max_shard_size: str,
    quiet: bool,
) -> None:
    """Write the average that another library saved in IN to the new folder OUT.

    IN is what ema.load_full reads: files of torch.save, safetensors, folders of DCP. Needs no model
    code; checkpoints of shardema are written by `shardema export`.
    """
    with one_line(), progress("convert", quiet) as bar:
        found = importers.read(source, format_, key=key, prefix=prefix, trust=trust)
        converting.write(
            found,
            out,
            dtype=DTYPES[dtype] if dtype else None,
            layout=layout,
            max_shard_size=max_shard_size,
            done=bar.update,
        )
    if not quiet:
        count = "unknown" if found.num_updates is None else f"{found.num_updates}"
        tensors = counted(len(found.tensors), "tensor")
        told = f"{out}: {tensors} of format {found.format!r}, updates: {count}"
        click.echo(printable(told))


@main.group()
def plot() -> None:
    """Plot weight profiles and decays of averages, and learning curves."""


_FORMATS = (".png", ".svg", ".pdf")
_force = click.option("--force", is_flag=True, help="Replace an existing file.")
_format = click.option(
    "--format",
    "format_",
    type=click.Choice(["picture", "terminal", "json"]),
    default="picture",
    show_default=True,
    help="A file; text in the terminal; the curves as JSON.",
)


def _output(default: str) -> Callable[..., Any]:
    """The option for the output file, whose suffix sets the format."""

    def checked(ctx: click.Context, param: click.Parameter, path: str) -> str:
        if not path.endswith(_FORMATS):
            raise click.BadParameter(f"got {path!r}, expected a name in {', '.join(_FORMATS)}")
        return path

    kind = click.Path(dir_okay=False)
    return click.option(
        "--output", "-o", type=kind, default=default, show_default=True, callback=checked
    )


def _of_rules(*, steps_required: bool) -> Callable[..., Any]:
    """The options for the schedules and the length of the run."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        kind = click.IntRange(1)
        for option in (
            click.option("--dt", type=float, help="Samples or tokens per step."),
            click.option("--steps", type=kind, required=steps_required, help="Steps of the run."),
            click.option("--preset", multiple=True, help="Such as 'swa'; repeatable."),
            click.option("--schedule", multiple=True, help="Such as 'power(0.10)'; repeatable."),
        ):
            command = option(command)
        return command

    return decorated


@plot.command()
@click.argument("checkpoint", metavar="[CKPT]...", nargs=-1, type=click.Path())
@click.option("--average", help="Only this average of each CKPT.")
@click.option("--text", is_flag=True, help="Print a line for each average, and draw nothing.")
@_of_rules(steps_required=False)
@click.option("--log", is_flag=True, help="Logarithmic vertical axis.")
@_output("profile.png")
@_format
@_force
def profile(
    checkpoint: tuple[str, ...],
    average: str | None,
    text: bool,
    schedule: tuple[str, ...],
    preset: tuple[str, ...],
    steps: int | None,
    dt: float | None,
    log: bool,
    output: str,
    format_: str,
    force: bool,
) -> None:
    """Plot how much each step of a run contributes to the average at its end.

    Of the averages in checkpoints, as they became, or of schedules in a run of so many steps.
    """
    if checkpoint:
        if schedule or preset or steps is not None or dt is not None:
            raise click.UsageError("give checkpoints, or schedules and --steps, not both")
        with one_line():
            found = _profiles(checkpoint, average)
        if text:
            for label, one in found.items():
                click.echo(printable(f"{label} at {counted(one.t, unit_of(one))}: {describe(one)}"))
        else:
            _draw(output, format_, force, lambda drawing: drawing.profiles(found, log=log))
        return
    if text or average is not None:
        raise click.UsageError("--text and --average are of checkpoints, and none is given")
    if steps is None:
        raise click.UsageError("Missing option '--steps'.")
    _draw(
        output,
        format_,
        force,
        lambda drawing: drawing.profile(_rules(schedule, preset), steps, dt=dt, log=log),
    )


def _profiles(folders: tuple[str, ...], average: str | None) -> dict[str, Profile]:
    """The profiles of the averages in checkpoints by label."""
    found = {}
    for folder in dict.fromkeys(folders):
        names = (
            manifest.read(folder, "plot", files=False).averages if average is None else [average]
        )
        for name in names:
            label = f"{folder}:{name}" if len(folders) > 1 else name
            found[label] = read_profile(folder, name)
    return found


@plot.command()
@_of_rules(steps_required=True)
@_output("decay.png")
@_format
@_force
def decay(
    schedule: tuple[str, ...],
    preset: tuple[str, ...],
    steps: int,
    dt: float | None,
    output: str,
    format_: str,
    force: bool,
) -> None:
    """Plot the decay of each update of a run."""
    _draw(
        output,
        format_,
        force,
        lambda drawing: drawing.decay(_rules(schedule, preset), steps, dt=dt),
    )


@plot.command()
@click.argument("log", type=click.Path())
@click.option("--raw", help="Column of the raw weights; default: all pairs by name.")
@click.option("--average", help="Column of the average.")
@click.option("--step", help="Column of the horizontal axis.  [default: step]")
@click.option("--unit", default="", help="Unit of the vertical axis, such as nats.")
@_output("curves.png")
@_format
@_force
def curves(
    log: str,
    raw: str | None,
    average: str | None,
    step: str | None,
    unit: str,
    output: str,
    format_: str,
    force: bool,
) -> None:
    """Plot the raw and the averaged learning curves of LOG.

    LOG is the log.csv of the scripts in launch/, Lightning's metrics.csv, JSON lines, or the
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
        format_,
        force,
        lambda drawing: drawing.curves(rows, raw=raw, averaged=average, step=step, unit=unit),
    )


def _rules(written: tuple[str, ...], presets: tuple[str, ...]) -> dict[str, Schedule]:
    if not written and not presets:
        raise ArgumentError("nothing to draw: give --schedule or --preset")
    found = {text: spec.schedule(text) for text in written}
    for text in presets:
        found |= spec.preset(text)
    return found


def _draw(output: str, format_: str, force: bool, make: Callable[[Any], Any]) -> None:
    """Draws a figure, and writes or prints it; replaces an existing file only with ``force``."""
    if format_ == "picture" and os.path.lexists(output) and not force:
        raise click.ClickException(f"{output} exists already: give another --output, or --force")
    try:
        from shardema.cli import plot as drawing

        if format_ == "terminal":
            from shardema.cli import terminal
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    try:
        figure = make(drawing)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if format_ == "json":
        as_json(drawing.series(figure))
    elif format_ == "terminal":
        click.echo(terminal.draw(drawing.series(figure), color=sys.stdout.isatty()))
    else:
        _write(figure, output, force)


def _write(figure: Any, output: str, force: bool) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=output.rsplit(".", 1)[1], dpi=120)
    try:
        with open(output, "wb" if force else "xb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise click.ClickException(f"writing {output}: {error.strerror}") from error
    click.echo(f"drawn in {output}")
