"""What all commands share: tables, progress bars, JSON, and one line for what is wrong."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardema import bars
from shardema.costs.words import size as size
from shardema.errors import PAGE, CheckpointError, address


class Commands(click.Group):
    """Commands whose output may end early: a closed pipe or a full disk is one line, status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise _with_address(_output_failed(error)) from error
        except click.ClickException as error:
            raise _with_address(error) from error.__cause__

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:  # of the help text
            _with_address(_output_failed(error)).show()
            sys.exit(1)


def _with_address(error: click.ClickException) -> click.ClickException:
    """The error; its line ends with the address of its message's entry, if there is one."""
    entry = address(error.message)
    if not entry or PAGE in error.message:
        return error
    text = f"{error.format_message()} ({entry})"
    if isinstance(error, click.UsageError):
        return click.UsageError(text, error.ctx)
    return click.ClickException(text)


def _output_failed(error: OSError) -> click.ClickException:
    """The error of an output that cannot be written; what is buffered of it is dropped.

    Python would try to write that at its end, and print a traceback.
    """
    with contextlib.suppress(OSError, ValueError):  # a test's output has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    reason = os.strerror(error.errno or errno.EIO)
    return click.ClickException(f"writing the output: {reason}")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turns what the library raises into one line on stderr and an exit status."""
    try:
        yield
    except CheckpointError as error:
        raise click.ClickException(printable(error)) from error
    except ValueError as error:
        raise click.UsageError(printable(error)) from error


def progress(name: str, quiet: bool = False, total: int | None = None) -> Any:
    """A bar of bytes on stderr, for what takes longer than a second."""
    return bars.bar(name, total, visible=not quiet)


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def screen() -> Console:
    """Where tables are printed."""
    return _Screen(highlight=False)


def printable(text: object) -> str:
    """``text`` without what a terminal acts on, or cannot show: names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def line(console: Console, text: str) -> None:
    """Prints ``text`` as it is, unbroken."""
    console.print(Text(printable(text)), soft_wrap=True)


def table(columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table, without lines between columns: most fit into 80 characters.

    Args:
        right: columns with numbers.
    """
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in columns:
        justify: Any = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold")
    return made


def row(made: Table, *cells: object) -> None:
    """Adds cells as they are: brackets in them are no markup."""
    made.add_row(*(Text(printable(cell)) for cell in cells))


def as_json(value: object) -> None:
    """Prints JSON; a number that is not finite is not JSON, so give None for it."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
