"""``python -m tests.soak --operations N --seed S [--layout NAME] [--kinds a,b]``: by hand.

Exit codes: 0 nothing was found, 1 a fault, whose script is on the disk, 2 the command is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests import operators
from tests.soak.cases import KINDS, Case, possible, possible_pairs
from tests.soak.layouts import ALL, ENGINES, impossible
from tests.soak.machine import Fault, Tally, cases, script, shorten, soak

_MOST = 40  # pairs that are listed; the table has them all
PRELOAD = ["torch._inductor.compile_fx", "tests.soak.performing"]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--operations", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--layout", type=click.Choice(list(ALL)), help="This one only.")
@click.option("--kinds", default="", help="Of actions, between commas: these only.")
@click.option("--out", type=click.Path(file_okay=False), default=".", help="For scripts of faults.")
@click.option("--shorten/--no-shorten", "shorter", default=True, help="Shorten what fails.")
def command(
    operations: int, seed: int, layout: str | None, kinds: str, out: str, shorter: bool
) -> None:
    """Draw sequences of calls, run them against an oracle, and tally them."""
    chosen = _kinds(kinds)
    layouts = _layouts([layout] if layout else list(ALL), chosen)
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    drawn = cases(operations, seed, kinds=chosen, layouts=layouts)
    preload = _prepare(drawn)
    tally = Tally()
    with tqdm(total=sum(len(case.actions) for case in drawn), unit="op") as bar:

        def heard(case: Case) -> None:
            if bar.n < bar.total:  # cases after a fault run again
                bar.update(len(case.actions))

        def done(case: Case, said: str) -> None:
            if said:
                path = _write(Fault(case, said), out)
                tqdm.write(f"fault: layout {case.layout}, {case.ranks} ranks: {path}")

        soak(drawn, tally, done, preload, heard)
    _show(tally, layouts, chosen)
    for fault in tally.faults:
        told = shorten(fault) if shorter else fault
        click.echo(f"{_write(told, out)}: {len(told.case.actions)} actions\n{told.said[-1500:]}")
    raise SystemExit(bool(tally.faults))


def _kinds(given: str) -> list[str]:
    chosen = [kind.strip() for kind in given.split(",") if kind.strip()]
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise click.UsageError(f"--kinds: got {', '.join(unknown)}, expected of {', '.join(KINDS)}")
    return chosen


def _layouts(wanted: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """Those that this machine can run, and that take one of the kinds; names what is left out."""
    skipped = {name: impossible(name) for name in wanted if impossible(name)}
    able = [name for name in wanted if name not in skipped]
    text = "; ".join(f"{name} is skipped: {why}" for name, why in skipped.items())
    if not able:
        raise click.UsageError(text)
    if text:
        click.echo(text, err=True)
    able = [name for name in able if not kinds or not set(kinds).isdisjoint(possible(name))]
    if not able:
        raise click.UsageError(f"--kinds: none of {', '.join(kinds)} is possible on {wanted[0]}")
    return able


def _prepare(drawn: Sequence[Case]) -> list[str]:
    """Modules to import once for all worlds."""
    if not any(case.layout in ENGINES for case in drawn):
        return PRELOAD
    operators.keep_in_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the import
    operators.ready()
    return [*PRELOAD, "deepspeed"]


def _write(fault: Fault, out: str) -> Path:
    path = Path(out) / f"soak-{fault.case.layout}-{fault.case.seed}.py"
    path.write_text(script(fault))
    return path


def _show(tally: Tally, layouts: Sequence[str], kinds: Sequence[str]) -> None:
    console = Console(width=240, highlight=False)
    shown = [kind for kind in KINDS if not kinds or kind in kinds]
    console.print("operations, by layout:", _legend(layouts))
    console.print(
        _table(shown, layouts, lambda kind, name: _count(tally.operations[name, kind], False))
    )
    able = {pair for pair in possible_pairs(layouts) if set(pair) <= set(shown)}
    console.print("kinds after which another came (-: not yet; empty: on no layout):")
    console.print(
        _table(shown, shown, lambda a, b: _count(tally.pairs[a, b], (a, b) in able)), _legend(shown)
    )
    missing = tally.missing_pairs(able)
    if missing:
        told = ", ".join(f"{a} {b}" for a, b in missing[:_MOST])
        more = f" and {len(missing) - _MOST} more" if len(missing) > _MOST else ""
        console.print(f"pairs still missing: {told}{more}")
    console.print(
        f"{tally.total} operations, {tally.refusals} of them refused as they must, "
        f"{len(tally.faults)} faults; {len(able) - len(missing)} of {len(able)} pairs "
        "of kinds followed each other"
    )


def _table(rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str]) -> Table:
    """The columns are numbered: names would be too wide."""
    table = Table("", *(str(n) for n in range(1, len(columns) + 1)), box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(row, *(cell(row, column) for column in columns))
    return table


def _legend(columns: Sequence[str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(columns, 1))


def _count(number: int, expected: bool) -> str:
    return str(number) if number else "-" if expected else ""


def main(args: Sequence[str] | None = None) -> None:
    """The command; what is wrong with it is told in one line."""
    try:
        command.main(args, standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"soak: {error.format_message()}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
