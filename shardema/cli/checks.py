"""``shardema verify``, ``diff`` and ``prune``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import click
from rich.console import Console

from shardema.cli.tables import as_json, line, one_line, progress, row, screen, size, table
from shardema.errors import CheckpointError, abbreviate, counted
from shardema.files import pruning
from shardema.files import verify as verifying
from shardema.files.compare import Compared, Difference, compare
from shardema.files.places import any_path, is_there
from shardema.files.pruning import Pruning
from shardema.files.steps import name_of
from shardema.files.verify import Damage, Verified

_json = click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
_quiet = click.option("--quiet", is_flag=True, help="No progress bar.")


@click.command()
@click.argument("checkpoints", metavar="CKPT...", nargs=-1, required=True, type=click.Path())
@click.option(
    "--against",
    metavar="MODEL",
    type=click.Path(),
    help="Also check that CKPT was saved with the weights of this HF folder or safetensors file.",
)
@_json
@_quiet
def verify(checkpoints: tuple[str, ...], against: str | None, json_: bool, quiet: bool) -> None:
    """Read every block of checkpoints, and name what is damaged.

    CKPT is a checkpoint, a manager's directory (all its steps), or an export, which has no
    checksums: its headers, index and sizes are checked. Exit status 0 if nothing is damaged and
    everything belongs to MODEL, 2 if a CKPT does not exist, else 1.
    """
    console = screen()
    found = []
    with one_line():
        for given in checkpoints:
            for one in _verified(given, against, quiet):
                found.append(one)
                if not json_:
                    _show_verified(console, one)
    if json_:
        as_json([{"ok": _ok(one), **asdict(one)} for one in found])
    if not all(map(_ok, found)):
        raise click.exceptions.Exit(2 if any(one.absent for one in found) else 1)


def _ok(found: Verified) -> bool:
    return not (found.damages or found.mismatches or found.absent)


def _verified(given: str, against: str | None, quiet: bool) -> Iterator[Verified]:
    if not is_there(any_path("verify", given)):
        yield Verified(given, "", absent=True)
        return
    try:
        paths = verifying.expand(given)
    except CheckpointError as error:
        yield verifying.failed(given, error)
        return
    for path in paths:
        with progress("verify", quiet, verifying.size_of(path)) as bar:
            found = verifying.verify(path, bar.update)
        if against is not None and not (found.damages or found.gone):
            with progress("against", quiet) as bar:
                mismatches = verifying.against(path, against, bar.update)
            found = replace(found, mismatches=tuple(mismatches))
        yield found


def _show_verified(console: Console, found: Verified) -> None:
    held = f"{_tensors(found.tensors)} in {counted(found.files, 'file')}, {size(found.nbytes)}"
    if found.absent:
        line(console, f"{found.path}: no such folder or file")
    elif found.gone:
        line(console, f"{found.path}: removed while it was read")
    elif found.damages:
        line(console, f"{found.path}: DAMAGED: {_told(found.path, found.damages[0])}")
        for damage in found.damages[1:]:
            line(console, f"    and {_told(found.path, damage)}")
    elif found.mismatches:
        line(console, f"{found.path}: OF ANOTHER MODEL: {_told(found.path, found.mismatches[0])}")
    elif found.checksums:
        line(console, f"{found.path}: ok, {held}")
    else:
        told = "headers, index and sizes are ok; an export has no checksums, so values are not"
        line(console, f"{found.path}: {told} verified; {held}")


def _tensors(number: int) -> str:
    return counted(number, "tensor")


def _told(path: str, damage: Damage) -> str:
    tensors = f" ({abbreviate(damage.tensors)})" if damage.tensors else ""
    place = "" if damage.path in (path, "") or damage.path in damage.reason else f"{damage.path}: "
    return f"{place}{damage.reason}{tensors}"


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--average", help="Which average of a checkpoint that has several.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(0), help="Rows to show.")
@_json
@_quiet
def diff(a: str, b: str, average: str | None, top: int, json_: bool, quiet: bool) -> None:
    """Show how far B is from A, tensor by tensor, the worst first.

    A and B are checkpoints, CKPT:AVERAGE, folders in the HF layout, or safetensors files. The
    distance is ||a - b|| / ||a||. Exit status 0 if all tensors are bitwise equal, else 1.
    """
    with one_line(), progress("diff", quiet) as bar:
        found = compare(a, b, average=average, done=bar.update)
    if json_:
        as_json(_differences(found, top))
    else:
        _show_differences(screen(), a, b, found, top)
    if not found.equal:
        raise click.exceptions.Exit(1)


def _differences(found: Compared, top: int) -> dict[str, Any]:
    return {
        "equal": found.equal,
        "distance": _finite(found.distance),
        "compared": len(found.differences),
        "different": sum(not d.equal for d in found.differences),
        "tensors": [
            {
                "fqn": d.fqn,
                "distance": _finite(d.distance),
                "differing": d.differing,
                "elements": math.prod(d.shape),
                "dtypes": [str(dtype)[6:] for dtype in d.dtypes],
            }
            for d in _worst(found, top)
        ],
        "shapes": dict(found.shapes),
        "only_a": found.only_a,
        "only_b": found.only_b,
    }


def _finite(distance: float) -> float | None:
    return distance if math.isfinite(distance) else None


def _worst(found: Compared, top: int) -> list[Difference]:
    return [d for d in found.differences if not d.equal][:top]


def _show_differences(console: Console, a: str, b: str, found: Compared, top: int) -> None:
    worst = _worst(found, top)
    if worst:
        columns = ("tensor", "distance", "differing", "of", "dtype")
        made = table(columns, ("distance", "differing", "of"))
        for d in worst:
            dtype = " / ".join(dict.fromkeys(str(dtype)[6:] for dtype in d.dtypes))
            elements = f"{math.prod(d.shape):,}"
            row(made, d.fqn, f"{d.distance:.3g}", f"{d.differing:,}", elements, dtype)
        console.print(made)
    for fqn, (of_a, of_b) in found.shapes.items():
        line(console, f"{fqn}: shape {list(of_a)} in A, {list(of_b)} in B")
    for side, path, names in (("A", a, found.only_a), ("B", b, found.only_b)):
        if names:
            line(console, f"only in {side} ({path}): {abbreviate(names)}")
    different = sum(not d.equal for d in found.differences)
    line(
        console,
        f"{different} of {_tensors(len(found.differences))} differ; distance of all "
        f"{found.distance:.3g}"
        if different
        else f"{_tensors(len(found.differences))} compared, bitwise equal",
    )


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--keep-last", type=click.IntRange(1), required=True, help="Newest steps to keep.")
@click.option("--keep-every", type=click.IntRange(1), help="Multiples to keep besides.")
@click.option("--yes", is_flag=True, help="Remove them.")
@click.option(
    "--take-over",
    is_flag=True,
    help="With a URL: also if a manager on another host has not closed DIR; it cannot save then.",
)
@_json
@_quiet
def prune(
    directory: str,
    keep_last: int,
    keep_every: int | None,
    yes: bool,
    take_over: bool,
    json_: bool,
    quiet: bool,
) -> None:
    """Show which steps in a CheckpointManager's DIR its rotation would remove; --yes removes them.

    Only steps that a manager saved, and never the newest that verifies. A directory that a manager
    has open is left alone.
    """
    with one_line(), progress("verify", quiet) as bar:
        found = pruning.prune(
            directory,
            keep_last=keep_last,
            keep_every=keep_every,
            remove=yes,
            take_over=take_over,
            done=bar.update,
        )
    if json_:
        as_json(asdict(found))
    else:
        _show_pruning(screen(), found, yes)
    if yes and found.removed != found.surplus:
        raise click.exceptions.Exit(1)


def _show_pruning(console: Console, found: Pruning, yes: bool) -> None:
    for step in found.removed if yes else found.surplus:
        did = "removed" if yes else "would be removed"
        line(console, f"{did}: {os.path.join(found.folder, name_of(step))}")
    kept = ", ".join(map(str, found.kept))
    line(console, f"kept: {kept or 'nothing, there is no step'}")
    if found.surplus and not yes:
        line(console, "nothing was removed; --yes does it")
