"""``shardema reconstruct`` and ``merge``: averages chosen afterwards.

Under ``torchrun --no-python shardema merge ...`` the ranks share the work.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import click
import torch
from torch import distributed as dist

from shardema import posthoc
from shardema.cli import spec
from shardema.cli.tables import as_json, line, one_line, printable, progress, row, screen, table
from shardema.errors import ArgumentError, counted
from shardema.files.safetensors import reporting
from shardema.posthoc.reconstruction import Reconstruction, described
from shardema.posthoc.targets import CURVES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_dtype = click.option("--dtype", type=click.Choice(list(DTYPES)), help="Dtype of the weights.")
_size = click.option("--max-shard-size", default="5GB", show_default=True, help="Size of one file.")
_partial = click.option("--partial", is_flag=True, help="Without parameters that are not saved.")
_json = click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
_quiet = click.option("--quiet", is_flag=True, help="Print no progress bar and no summary.")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--target", required=True, help="Such as 'power(0.10)', 'window(20000, minus-sqrt)'.")
@click.option("--at", type=float, help="Time of a snapshot; default: the last one.")
@click.option("--out", type=click.Path(), help="The new folder to write; none: show the fit only.")
@click.option("--average", "names", multiple=True, help="Use this average only; repeatable.")
@click.option("--allow-residual", is_flag=True, help="Write it however far it is from the target.")
@click.option("--picture", type=click.Path(), help="Draw the profiles; default: OUT.png.")
@_dtype
@_size
@_partial
@_json
@_quiet
def reconstruct(
    directory: str,
    target: str,
    at: float | None,
    out: str | None,
    names: tuple[str, ...],
    allow_residual: bool,
    picture: str | None,
    dtype: str | None,
    max_shard_size: str,
    partial: bool,
    json_: bool,
    quiet: bool,
) -> None:
    """Write the average with the profile TARGET from the snapshots in DIR, to the new folder OUT.

    DIR is a directory of Snapshots. TARGET is a schedule, as if that average had been kept from the
    start, or window(LENGTH, CURVE): as if the learning rate had decayed by linear, minus-sqrt or
    cosine over the last LENGTH. Exit status 2 if the snapshots do not reach it.
    """
    drawn = picture or (f"{out.rstrip('/')}.png" if out else "")
    with one_line(), _ranks() as leader:
        if drawn and os.path.lexists(drawn):
            raise ArgumentError(f"{drawn} exists already, and the picture would be drawn there")
        found = posthoc.open(directory).target(
            spec.target(target),
            at,
            names=list(names) or None,
            **({"allow_residual": True} if allow_residual else {}),
        )
        if out:
            with progress("reconstruct", quiet or not leader) as bar:
                found.export(
                    out,
                    dtype=DTYPES[dtype] if dtype else None,
                    max_shard_size=max_shard_size,
                    partial=partial,
                    done=bar.update,
                )
        if leader and drawn:
            _draw(found, target, drawn, bool(picture))
    if leader and json_:
        as_json({**described(found), "target": target, "out": out})
    elif leader and not quiet:
        _show(found, target, out)


def _show(found: Reconstruction, target: str, out: str | None) -> None:
    console = screen()
    made = table(("snapshot", "coefficient"), ("coefficient",))
    for name, coefficient in found.coefficients.items():
        row(made, name, f"{coefficient:+.6f}")
    console.print(made)
    line(
        console,
        f"{f'{out}: ' if out else ''}{target} at t={found.at:g}: residual {found.residual:.3g} of "
        f"the weight, amplification {found.fit.amplification:.3g}, ridge {found.fit.ridge:g}",
    )


def _draw(found: Reconstruction, target: str, path: str, asked: bool) -> None:
    """Draws the picture; one that was not asked for is left out where matplotlib is missing."""
    try:
        from shardema.cli import plot
    except ImportError as error:
        if asked:
            raise click.ClickException(str(error)) from error
        return
    edges, wanted, reached = found.profile
    figure = plot.reached(
        edges, wanted, reached, target=target, residual=found.residual, unit=found.unit
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    with reporting(path, "writing"), open(path, "xb") as file:
        file.write(picture.getvalue())


@click.command()
@click.argument("checkpoints", metavar="CKPT...", nargs=-1, required=True, type=click.Path())
@click.option("--weights", help="Such as 0.2,0.8: one for each, summing to 1.")
@click.option("--style", type=click.Choice(list(CURVES)), help="Weights of a learning-rate decay.")
@click.option("--any-sum", is_flag=True, help="Allow weights that do not sum to 1.")
@click.option("--out", type=click.Path(), required=True, help="The new folder to write.")
@click.option("--average", help="Of checkpoints with several.")
@click.option("--trust", is_flag=True, help="Allow the pickle in a DCP folder to run code.")
@_dtype
@_size
@_partial
@_json
@_quiet
def merge(
    checkpoints: tuple[str, ...],
    weights: str | None,
    style: str | None,
    any_sum: bool,
    out: str,
    average: str | None,
    trust: bool,
    dtype: str | None,
    max_shard_size: str,
    partial: bool,
    json_: bool,
    quiet: bool,
) -> None:
    """Write the weighted sum of CKPT..., oldest first, to the new folder OUT in the HF layout.

    CKPT is a checkpoint of shardema, a folder in the HF layout, a safetensors file, or a folder of
    torch.distributed.checkpoint (--trust). --style gives the weights that stand for a decay of the
    learning rate over the checkpoints: linear and mean are equal weights.
    """
    with one_line(), _ranks() as leader, progress("merge", quiet or not leader) as bar:
        used = posthoc.merge(
            checkpoints,
            out,
            weights=_numbers(weights),
            style=style,
            any_sum=any_sum,
            average=average,
            trust=trust,
            dtype=DTYPES[dtype] if dtype else None,
            max_shard_size=max_shard_size,
            partial=partial,
            done=bar.update,
        )
    if leader and json_:
        as_json({"out": out, "weights": dict(zip(checkpoints, used, strict=True))})
    elif leader and not quiet:
        told = ", ".join(f"{weight:.6g}" for weight in used)
        click.echo(printable(f"{out}: {counted(len(used), 'checkpoint')} with the weights {told}"))


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--weights: got {text!r}, expected numbers such as 0.2,0.8") from error


@contextlib.contextmanager
def _ranks() -> Iterator[bool]:
    """The process group of torchrun, if it started this process; whether it is the first rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
