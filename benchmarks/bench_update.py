"""Time, memory traffic and allocations of an update, next to the other ways to average.

::

    python benchmarks/bench_update.py --layout plain
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_update.py --layout fsdp2

Sizes are what one rank holds: ``--tensors 4x16Mi`` is 4 tensors of 16 Mi elements on every rank.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

import models
import rivals
import triads
from harness import (
    Table,
    Target,
    allocated,
    arguments,
    attempt,
    clock,
    finish,
    leave,
    number,
    ratio,
    say,
    world,
)
from rivals import DTYPES, Average, Build
from tests import meters

LIMIT, OURS, COPY, FOREACH = "limit", "shardema", "copy", "shardema_foreach"
SMALL = 1 << 10  # tensors of so many elements cost by the piece
TARGETS = (
    Target(OURS, r"fsdp2 fp32/fp32 (blocks-[0-9]+|.*Mi)", "time_to_limit", most=1.05),
    Target(
        "diffusers|torch_ema", "fsdp2 fp32/fp32 (blocks-.*|.*Mi)", "time_to_shardema", least=2.4
    ),
    Target("lerp_float", r".* bf16/fp32 \d+x(16|32|64)Mi", "time_to_shardema", least=5),
    Target(OURS, r".* fp32/fp32 (blocks-.*|.*Mi), 2 averages", "time_to_one_average", most=1.75),
    Target(OURS, r".* bf16/fp32 (blocks-.*|.*Mi), 2 averages", "time_to_one_average", most=1.9),
    Target(OURS, r".* 2000x1Ki", "beyond_1.5_limits_per_tensor", most=5),
    Target(OURS, r".* (4x|1x)\d+Mi", "share_of_copy_bandwidth", least=0.9),
    Target(OURS, r".* fp32/fp32 (blocks-.*|.*Mi)", "share_of_host", least=0.95),
    Target(OURS, r".* bf16/fp32 (blocks-.*|.*Mi)", "share_of_host", least=0.9),
    Target(OURS, r".* (blocks-.*|.*Mi)", f"time_to_{FOREACH}", most=1.03),
    Target(OURS, ".*", "allocated", most=0),
    Target(OURS, ".*", "collectives", most=0),
)


# ---- what is averaged -------------------------------------------------------------------------


def maker(tensors: str, layout: models.Layout) -> Callable[[], nn.Module]:
    """The model that ``"4x16Mi"`` or ``"blocks-512"`` (MiB of fp32 in all) stands for."""
    if tensors.startswith("blocks-"):
        return functools.partial(models.Blocks, int(tensors.removeprefix("blocks-")))
    count, _, numel = tensors.partition("x")
    ranks = dist.get_world_size() if layout == "fsdp2" else 1
    return functools.partial(models.Tensors, int(count), number(numel), ranks)


def runs_right(build: Build, args: argparse.Namespace, dtype: torch.dtype) -> str:
    """What is wrong with a provider, found on a small model of the same kind; or nothing."""

    def work() -> str:
        small = maker("3x96", args.layout)
        model = models.build(small, args.layout, dtype, args.device)
        return rivals.wrong(build(model), models.locals_of(model))

    said, why = attempt(work)
    return why or said


# ---- measuring --------------------------------------------------------------------------------


def measure(
    table: Table, model: nn.Module, builds: dict[str, Build], case: str, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Runs all providers on one model; adds what does not depend on the others."""
    averages: dict[str, Average] = {name: build(model) for name, build in builds.items()}
    running = {name: average.update for name, average in averages.items()}
    loops: dict[str, Callable[[], None]] = {}
    if args.device == "cpu":  # over the memory of our own average
        ours = list(averages[OURS].read())
        loops, why = attempt(lambda: triads.loops(models.locals_of(model), ours))
        if why:
            table.lacks("host", case, why)
    times = clock({**running, **(loops or {})}, args.repeats)
    if loops:
        share_of_host(table, case, times, list(loops))
        table.add_times({name: times.pop(name) for name in loops}, case)
    for name, average in averages.items():
        with meters.collectives() as calls:
            nbytes = allocated(average.update, args.device)
        table.add(name, case, "allocated", "bytes", [nbytes])
        table.add(name, case, "collectives", "calls", [len(calls) / 2])  # allocated calls twice
    return times


def share_of_host(
    table: Table, case: str, times: dict[str, list[float]], loops: Sequence[str]
) -> None:
    """Of the fastest hand-written loop, whatever it is on this host."""
    fastest = min(loops, key=lambda name: statistics.median(times[name]))
    say(f"{case}: the host's own limit is {fastest}")
    for name in (LIMIT, OURS, FOREACH):
        if name in times:
            table.add(name, case, "share_of_host", "ratio", ratio(times[fastest], times[name]))
    if FOREACH in times:
        compared = ratio(times[OURS], times[FOREACH])
        table.add(OURS, case, f"time_to_{FOREACH}", "ratio", compared)


def one_average(
    table: Table, args: argparse.Namespace, model: nn.Module, case: str, dtype: torch.dtype
) -> None:
    """All providers, right ones only; the others get a row that says why."""
    builds = {LIMIT: rivals.limit()}
    if args.copy:
        builds[COPY] = rivals.copy
    for name, build in (rivals.ours() | rivals.OTHERS).items():
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in args.providers)
        if name != OURS and not wanted:
            continue
        why = runs_right(build, args, dtype)
        if why:
            table.lacks(name, case, why)
        else:
            builds[name] = build
    times = measure(table, model, builds, case, args)
    others = [name for name in times if name in rivals.OTHERS]
    table.add_times(times, case, to=[LIMIT])
    if others:
        fastest = min(others, key=lambda name: statistics.median(times[name]))
        table.add(OURS, case, f"time_to_{fastest}", "ratio", ratio(times[OURS], times[fastest]))
    for name in others:
        table.add(name, case, f"time_to_{OURS}", "ratio", ratio(times[name], times[OURS]))
    if args.copy:
        for name in (LIMIT, OURS):
            moved = 12 if name == LIMIT else 8 + dtype.itemsize  # bytes of an element
            share = [moved / 8 * r for r in ratio(times[COPY], times[name])]
            table.add(name, case, "share_of_copy_bandwidth", "ratio", share)
    count = sum(1 for _ in model.parameters())
    small = all(p.numel() <= SMALL for p in models.locals_of(model))
    for name, seconds in times.items():
        if small:
            beyond = [(a - 1.5 * b) / count for a, b in zip(seconds, times[LIMIT], strict=True)]
            table.add(name, case, "beyond_1.5_limits_per_tensor", "us", [1e6 * b for b in beyond])


def several_averages(
    table: Table, args: argparse.Namespace, model: nn.Module, case: str, numbers: Sequence[int]
) -> None:
    """The limit, one read of the weights and one for each average, in the same turns."""
    builds: dict[str, Build] = {}
    for n in (1, *numbers):
        builds |= {
            f"{n} {LIMIT}": rivals.limit(n),
            f"{n} {OURS}": rivals.shardema(averages=n),
            f"{n} {OURS}_foreach": rivals.shardema("foreach", averages=n),
        }
    running = {key: build(model).update for key, build in builds.items()}
    times = clock(running, args.repeats)
    for n in numbers:
        label = f"{case}, {n} averages"
        mine = {key[2:]: times[key] for key in times if key.startswith(f"{n} ")}
        table.add_times(mine, label, to=[LIMIT])
        for name, seconds in mine.items():
            one = ratio(seconds, times[f"1 {name}"])
            table.add(name, label, "time_to_one_average", "ratio", one)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("update", __doc__, repeats=11, on_gpu=True)
    parser.add_argument("--layout", choices=["plain", "fsdp2"], default="fsdp2")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument(
        "--tensors",
        nargs="+",
        default=["blocks-512", "4x16Mi", "2000x1Ki"],
        help="4x16Mi: count and elements of one rank's tensors; blocks-512: layers of 512 MiB",
    )
    parser.add_argument(
        "--averages", type=int, nargs="*", default=[2, 4], help="how many at once, besides one"
    )
    parser.add_argument(
        "--providers", nargs="+", default=["*"], help="patterns of names, besides shardema"
    )
    parser.add_argument(
        "--copy", action="store_true", help="also as a share of the bandwidth of a flat copy"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(args.device), torch.no_grad():
        table = Table()
        for word in args.dtype:
            dtype = DTYPES[word]
            for tensors in args.tensors:
                case = f"{args.layout} {word}/fp32 {tensors}"
                model: Any = models.build(
                    maker(tensors, args.layout), args.layout, dtype, args.device
                )
                say(f"{case}: {sum(p.numel() for p in models.locals_of(model)):,} elements a rank")
                one_average(table, args, model, case, dtype)
                if args.averages:
                    several_averages(table, args, model, case, args.averages)
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
