"""Every kind of injury, in full or in a short form."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.torture import damage, errors, kills, power, ranks, writers
from tests.torture.operations import OPERATIONS, WRITING
from tests.torture.tally import HEAD, Row


@dataclass(frozen=True)
class Size:
    """How much is tried.

    Attributes:
        numbers: the errnos.
        every: one of so many calls of an operation.
        moments: kills at any moment.
        states, sequels: after a loss of power; of each scenario, those that are saved on.
        sizes: numbers of ranks.
        points: calls of a rank at which it raises; one less at which it ends.
        rounds: of two writers.
        pages: sizes of a full disk.
        damaged: files.
        only: these operations, where there are several; all if empty.
    """

    numbers: tuple[str, ...] = errors.NUMBERS
    every: int = 1
    moments: int = 1000
    states: int = 50_000
    sequels: int = 150
    sizes: tuple[int, ...] = ranks.SIZES
    points: int = 4
    rounds: int = 200
    pages: int = 12
    damaged: int = 4000
    only: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """One of so many calls; every one where few operations are tried."""
        return 1 if self.only else self.every

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the operations that are tried."""
        return [name for name in names if not self.only or name in self.only]


FULL = Size()
SHORT = Size(("EIO", "EINTR"), 5, 10, 1200, 12, (2,), 1, 10, 4, 400)


def _errors(size: Size, where: Path) -> Iterator[Row]:
    yield from errors.short_calls(size.of(OPERATIONS), where)
    yield from errors.sweep(size.of(OPERATIONS), where, size.numbers, size.step)


def _kills(size: Size, where: Path) -> Iterator[Row]:
    yield from kills.every_call(size.of(WRITING), where, size.step)
    if not size.only:
        yield from kills.any_moment(where, size.moments)


def _power(size: Size, where: Path) -> Iterator[Row]:
    yield from power.sweep(size.of(power.SCENARIOS), where, size.states, sequels=size.sequels)


def _ranks(size: Size, where: Path) -> Iterator[Row]:
    yield from ranks.sweep(size.of(ranks.CALLS), size.sizes, size.points)


def _writers(size: Size, where: Path) -> Iterator[Row]:
    yield writers.two_managers(where, 4 * size.rounds)
    yield writers.two_saves(where, size.rounds)
    yield writers.full_disk(size.pages)
    yield from writers.terminated(where, size.every)


def _damage(size: Size, where: Path) -> Iterator[Row]:
    yield from damage.sweep(where, size.damaged)


KINDS: dict[str, Callable[[Size, Path], Iterator[Row]]] = {
    "errors": _errors,
    "kills": _kills,
    "power": _power,
    "ranks": _ranks,
    "writers": _writers,
    "damage": _damage,
}


def rows(kinds: Sequence[str], size: Size, say: Callable[[str], None]) -> list[Row]:
    """Tries all of it. The folders are in memory: they are made and removed thousands of times."""
    torch.set_num_threads(1)
    found: list[Row] = []
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for kind in kinds:
            start = time.monotonic()
            logging.disable(logging.WARNING)
            for row in KINDS[kind](size, Path(folder)):
                found.append(row)
                say(f"{' | '.join(row.cells())} ({time.monotonic() - start:.0f} s)")
                if row.bad:
                    say(f"    {row.first}")
            logging.disable(logging.NOTSET)
    return found


def table(found: Sequence[Row]) -> Table:
    made = Table(*HEAD)
    for row in found:
        made.add_row(*row.cells())
    total = Row("all", "", 0, sum(row.trials for row in found), sum(row.bad for row in found))
    made.add_row(total.injury, "", "", *total.cells()[3:])
    return made


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"got {text}, expected one of {', '.join(KINDS)}")
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Injures checkpoints, and tells what did not hold.")
    made.add_argument(
        "kinds", nargs="*", metavar="KIND", type=_kind, help=f"of {', '.join(KINDS)}; else all"
    )
    made.add_argument("--only", nargs="*", default=(), metavar="OPERATION")
    made.add_argument("--short", action="store_true", help="a minute of each")
    made.add_argument("--json", action="store_true", help="print the rows as JSON, a line of each")
    return made


def tally(args: argparse.Namespace) -> tuple[list[Row], int]:
    """Tries and prints what was asked for: the rows, and 1 if anything was bad."""
    size = dataclasses.replace(SHORT if args.short else FULL, only=tuple(args.only))
    say = (lambda text: None) if args.json else functools.partial(print, flush=True)
    found = rows(args.kinds or list(KINDS), size, say)
    if args.json:
        for row in found:
            print(json.dumps(dataclasses.asdict(row)))
    else:
        Console(width=140).print(table(found))
    return found, int(any(row.bad for row in found))
