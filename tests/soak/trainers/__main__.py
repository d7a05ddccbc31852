"""``python -m tests.soak.trainers --runs N --seed S [--trainer NAME]``: the soak test of trainers.

Exit codes: 0 nothing was found, 1 a fault, whose script is on the disk, 2 the command is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests.soak.trainers.cases import SETTINGS, Case
from tests.soak.trainers.machine import Machine, Tally, cases, script


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--runs", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--trainer", type=click.Choice(list(SETTINGS)), help="This one only.")
@click.option("--kills", is_flag=True, help="Also runs that end by SIGKILL.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="At a time.")
@click.option("--out", type=click.Path(file_okay=False), default=".", help="For scripts of faults.")
@click.option("--shorten/--no-shorten", "shorter", default=True, help="Shorten what fails.")
def main(
    runs: int, seed: int, trainer: str | None, kills: bool, jobs: int, out: str, shorter: bool
) -> None:
    """Draw runs of trainers, hold them against a plain loop and an oracle, and tally them."""
    os.makedirs(out, exist_ok=True)
    drawn = cases(runs, seed, trainer or "", kills)
    tally, start = Tally(), time.monotonic()
    with Machine(jobs) as machine:
        with tqdm(total=sum(len(case.lives) for case in drawn), unit="run") as bar:

            def done(case: Case, said: str) -> None:
                bar.update(len(case.lives))
                if said:
                    tqdm.write(f"fault: seed {case.seed}, {case.trainer}: {said[-300:]}")

            machine.soak(drawn, tally, done)
        _show(tally, time.monotonic() - start)
        for fault in tally.faults:
            told = machine.shorten(fault) if shorter else fault
            path = Path(out) / f"soak-{told.case.trainer}-{told.case.seed}.py"
            path.write_text(script(told))
            click.echo(f"{path}: {len(told.case.lives)} runs\n{told.said[-1500:]}")
    raise SystemExit(bool(tally.faults))


def _show(tally: Tally, seconds: float) -> None:
    console = Console()
    table = Table("runs with", *SETTINGS)
    for what in sorted({what for _, what in tally.rows}):
        counts = [tally.rows[name, what] for name in SETTINGS]
        table.add_row(what, *(str(n) if n else "" for n in counts))
    table.add_row("all", *(str(tally.runs[name]) for name in SETTINGS))
    console.print(table)
    console.print(
        f"{tally.total} runs in {seconds:.0f} s, {tally.total / seconds:.1f} a second; "
        f"{len(tally.faults)} faults"
    )


def command(words: list[str]) -> int:
    """The exit status of a command line."""
    try:
        main(words, standalone_mode=False)
    except click.UsageError as error:
        click.echo(f"soak: {error.format_message()}", err=True)
        return 2
    except SystemExit as end:
        return int(end.code or 0)
    return 0  # of --help


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
