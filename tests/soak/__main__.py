"""``python -m tests.soak --operations N --seed S [--layout NAME]``: the soak test by hand.

Exit codes: 0 nothing was found, 1 a fault, whose script is on the disk, 2 the command is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tests.soak.cases import KINDS, Case
from tests.soak.layouts import ALL
from tests.soak.machine import Tally, cases, script, shorten, soak


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--operations", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--layout", type=click.Choice(list(ALL)), help="This one only.")
@click.option("--out", type=click.Path(file_okay=False), default=".", help="For scripts of faults.")
@click.option("--shorten/--no-shorten", "shorter", default=True, help="Shorten what fails.")
def main(operations: int, seed: int, layout: str | None, out: str, shorter: bool) -> None:
    """Draw sequences of calls, run them against an oracle, and tally them."""
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    drawn = cases(operations, seed, layout or "")
    tally = Tally()
    with tqdm(total=sum(len(case.actions) for case in drawn), unit="op") as bar:

        def done(case: Case, said: str) -> None:
            bar.update(len(case.actions))
            if said:
                tqdm.write(f"fault: seed {case.seed}, layout {case.layout}, {case.ranks} ranks")

        soak(drawn, tally, done)
    _show(tally)
    for fault in tally.faults:
        told = shorten(fault) if shorter else fault
        path = Path(out) / f"soak-{told.case.layout}-{told.case.seed}.py"
        path.write_text(script(told))
        click.echo(f"{path}: {len(told.case.actions)} actions\n{told.said[-1500:]}")
    raise SystemExit(bool(tally.faults))


def _show(tally: Tally) -> None:
    console = Console()
    table = Table("kind", *(f"{n}" for n in ALL))
    for kind in KINDS:
        counts = [tally.operations[name, kind] for name in ALL]
        table.add_row(kind, *(str(n) if n else "" for n in counts))
    console.print(table)
    missing = tally.missing_pairs()
    console.print(
        f"{tally.total} operations, {tally.refusals} of them refused as they must, "
        f"{len(tally.faults)} faults; {len(KINDS) ** 2 - len(missing)} of {len(KINDS) ** 2} pairs "
        "of kinds followed each other"
    )


if __name__ == "__main__":
    main()
