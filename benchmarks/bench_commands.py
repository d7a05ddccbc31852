"""How long the commands take that a newcomer types first: the whole process, from start to end.

::

    python benchmarks/bench_commands.py

Each is started as the shell would, in a folder that is removed; a command that fails has no time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from harness import Table, Target, arguments, attempt, finish, say
from rows import HERE

_START = "from shardema.cli.main import main; main()"  # as the script of the package does
# the words after `shardema`
COMMANDS = {
    "demo": ["demo"],
    "doctor": ["doctor"],
    "plan of 7 B on 1024 ranks": ["plan", "--params", "7e9", "--world-size", "1024"],
    "help": ["--help"],
}
TARGETS = (
    Target("shardema", "demo", "time", most=60),
    Target("shardema", "doctor", "time", most=20),
    Target("shardema", "plan.*", "time", most=10),
)


def measure(command: str) -> float:
    """Seconds of one process."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _START, *COMMANDS[command]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().rpartition("\n")[2])
    return seconds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("commands", __doc__, repeats=5)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    table = Table()
    for command in args.commands:
        say(command)
        times, why = attempt(lambda c=command: [measure(c) for _ in range(args.repeats)])  # type: ignore[misc]
        if why:
            table.lacks("shardema", command, why)
        else:
            table.add("shardema", command, "time", "s", times)
    return finish(table, args, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
