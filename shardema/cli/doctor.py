"""``shardema doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from shardema.cli.symptoms import Finding, examine
from shardema.cli.tables import as_json, line, printable, screen

_MARKS = {"ok": "ok", "absent": "-", "warning": "!", "fault": "X"}


@click.command()
@click.option("--folder", default=".", show_default=True, type=click.Path(), help="To measure.")
@click.option("--for-issue", is_flag=True, help="Print a block to paste into an issue.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
def doctor(folder: str, for_issue: bool, json_: bool) -> None:
    """Examine this machine: versions, integrations, kernel, memory, disk, 2 processes.

    Takes at most 20 s and writes a file of 64 MiB to --folder, which it removes. Exit status 1 if
    something is broken (X); what is slower than it could be (!) or not installed (-) is status 0.
    """
    found = examine(folder)
    broken = any(one.status == "fault" for one in found)
    if json_:
        as_json({"ok": not broken, "findings": [asdict(one) for one in found]})
    elif for_issue:
        click.echo(_block(found))
    else:
        console = screen()
        for one in found:
            line(console, _line(one))
            if one.remedy:
                line(console, f"   -> {one.remedy}")
    if broken:
        raise click.exceptions.Exit(1)


def _line(one: Finding) -> str:
    return printable(f"{_MARKS[one.status]:<3}{one.name}: {one.text}")


def _block(found: Sequence[Finding]) -> str:
    """A block of markdown, without what is not installed."""
    body = "\n".join(_line(one) for one in found if one.status != "absent")
    return f"Copy and paste this into your issue:\n\n```text\n{body}\n```"
