"""Memory that each verb takes at its peak, on every rank, beyond what was there before.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_memory.py --mib 1024
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import distributed as dist

import models
from bench_swap import PROVIDERS as SWAPPERS
from bench_swap import use
from harness import Table, Target, arguments, everywhere, finish, leave, say, shared_folder, world
from models import MIB
from rivals import DTYPES, OTHERS, Average, Build, shardema
from rows import PeakMemory
from shardema import ShardedEMA
from shardema.ranks.transfer import BUCKET_BYTES
from tests import meters

BUCKET = BUCKET_BYTES / MIB
SIDE = {name: OTHERS[name] for name in ("torch_ema", "diffusers")}
TARGETS = (
    Target("shardema", ".*MiB update", "peak_memory", most=0),
    Target("shardema", ".* teacher (construct|update)", "peak_memory", most=0.1),
    Target("shardema", ".* fp32/fp32 .* swap", "peak_memory", most=16),
    Target("shardema", ".* (gather|save|export)", "peak_memory_others", most=BUCKET),
    Target("shardema", ".* (save|export)", "peak_memory_rank0", most=BUCKET),
)


def measure(
    table: Table,
    provider: str,
    case: str,
    work: Callable[[], object],
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Adds what a call takes: of tensors, counted at the allocator, and of resident memory.

    The call is made twice, each time after ``prepare``.
    """
    prepare()
    told = everywhere(meters.peak(work))
    prepare()
    dist.barrier()
    with PeakMemory() as memory:
        work()
    dist.barrier()
    table.add(provider, case, "peak_memory", "MiB", [max(told) / MIB])
    table.add(provider, case, "peak_memory_rank0", "MiB", [told[0] / MIB])
    if len(told) > 1:
        table.add(provider, case, "peak_memory_others", "MiB", [max(told[1:]) / MIB])
    resident = max(everywhere(memory.extra)) / MIB
    table.add(provider, case, "peak_resident", "MiB", [resident])


def averages(table: Table, case: str, model: torch.nn.Module) -> None:
    """What every library has: construction, updates, the swap."""
    builds: dict[str, Build] = {"shardema": shardema()} | SIDE
    for provider, build in builds.items():
        kept: list[Average] = []

        def construct(build: Build = build, kept: list[Average] = kept) -> None:
            kept.append(build(model))

        def again(build: Build = build, kept: list[Average] = kept) -> None:
            kept.clear()
            kept.append(build(model))

        def update(kept: list[Average] = kept) -> None:
            kept[0].update()

        measure(table, provider, f"{case} construct", construct, kept.clear)
        measure(table, provider, f"{case} first update", update, again)
        measure(table, provider, f"{case} update", update)
        kept.clear()
        swapper = SWAPPERS[provider](model)
        measure(table, provider, f"{case} swap", lambda s=swapper: use(s))


def taught(table: Table, case: str, model: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """What an average takes beyond the teacher that it is kept in."""
    held = sum(p.numel() * p.element_size() for p in models.locals_of(teacher)) / MIB
    table.add("shardema", f"{case} teacher", "size", "MiB", [max(everywhere(held))])
    kept: list[ShardedEMA] = []

    def construct() -> None:
        kept.append(ShardedEMA(model, 0.5, into=teacher))

    measure(table, "shardema", f"{case} teacher construct", construct, kept.clear)
    measure(table, "shardema", f"{case} teacher update", lambda: kept[0].update())


def ours(table: Table, case: str, model: torch.nn.Module, out: Path) -> None:
    """What only shardema has: the collective verbs."""
    ema = ShardedEMA(model, 0.5)
    ema.update()
    shadows = sum(p.numel() for p in models.locals_of(model)) * 4 / MIB
    table.add("shardema", f"{case} shadows", "size", "MiB", [max(everywhere(shadows))])
    fresh = (out / f"{n}" for n in range(1000))
    saved = out / "saved"
    ema.save(saved)
    verbs: dict[str, Callable[[], object]] = {
        "gather": ema.full_state_dict,
        "gather one by one": lambda: [None for _ in ema.iter_full()],
        "export": lambda: ema.export(next(fresh), progress=False),
        "export stream": lambda: ema.export(next(fresh), mode="stream", progress=False),
        "save": lambda: ema.save(next(fresh)),
        "load": lambda: ema.load(saved),
    }
    for verb, work in verbs.items():
        say(f"{case} {verb}")
        measure(table, "shardema", f"{case} {verb}", work)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("memory", __doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--mib", type=int, default=1024, help="size of the model in fp32")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="a folder on the disk to use")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(), torch.no_grad():
        table = Table()
        with shared_folder("memory-", args.out) as out:
            for word in args.dtype:
                case = f"fsdp2 {word}/fp32 {args.mib} MiB"
                make = lambda: models.Blocks(args.mib)  # noqa: E731
                model = models.build(make, "fsdp2", DTYPES[word])
                averages(table, case, model)
                ours(table, case, model, out / word)
                taught(table, case, model, models.build(make, "fsdp2").requires_grad_(False))
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
