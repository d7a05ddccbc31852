"""Injures checkpoints in every way, and tells after how many trials a property did not hold.

The rows are not speeds: of each injury and operation the number of points, trials and bad trials.
What is tried is in tests/torture; docs/checkpoints.md says what it comes to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness import Table
from rows import HERE, append, commit
from tests.torture import all as torture
from tests.torture.tally import Row

RESULTS = HERE / "results" / "torture.csv"


def record(found: Sequence[Row], results: Path = RESULTS) -> None:
    """Appends three rows for each of the tally."""
    table = Table()
    for row in found:
        case = f"{row.injury}: {row.operation}"
        for metric in ("points", "trials", "bad"):
            table.add("shardema", case, metric, metric, [getattr(row, metric)])
    append(results, table.rows)


def main(words: Sequence[str] | None = None) -> int:
    """Prints the tally; 1 if anything was bad. ``--results FILE`` takes its rows elsewhere."""
    parser = torture.parser()
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV of rows")
    args = parser.parse_args(words)
    commit()  # what is tried, whatever is edited meanwhile
    found, code = torture.tally(args)
    record(found, args.results)
    return code


if __name__ == "__main__":
    sys.exit(main())
