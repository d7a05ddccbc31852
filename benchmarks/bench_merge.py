"""Time and memory of a merge of snapshots, next to reading all bytes once and writing the result.

::

    python benchmarks/bench_merge.py --mib 256 --sources 6
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_merge.py

Both ways run in these same processes, in turn, ``--repeats`` times: with the checkpoints in the
page cache, then from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

import models
from harness import (
    Table,
    Target,
    arguments,
    everywhere,
    finish,
    forget,
    leave,
    rank,
    ranks,
    ratio,
    say,
    shared_folder,
    turns,
    world,
)
from rows import MIB, PeakMemory
from shardema import ShardedEMA, posthoc
from shardema.ranks.transfer import BUCKET_BYTES

REFERENCE = "read_all_write_once"
OURS = "shardema"
TARGETS = [
    Target(OURS, "cold .*", f"time_to_{REFERENCE}", most=1.3),
    Target(OURS, ".*", "extra_memory_max", most=BUCKET_BYTES / MIB),
]
_CHUNK = 4 * MIB


@dataclass(frozen=True)
class Sample:
    """One run: seconds of the slowest rank, of all processors, bytes of extra memory of each."""

    seconds: float
    processor: float
    extra: tuple[int, ...]


def make_sources(mib: int, count: int, folder: Path) -> list[Path]:
    """Checkpoints of averages that differ everywhere, saved by these ranks."""
    model = models.build(lambda: models.Blocks(mib), "fsdp2")
    ema = ShardedEMA(model, 0.5)
    paths = []
    for number in range(count):
        with torch.no_grad():
            for local in models.locals_of(model):
                local.add_(1 + number)
        ema.update()
        paths.append(folder / f"source-{number}")
        ema.save(paths[-1])
    return paths


def read_all_write_once(sources: Sequence[Path], out: Path) -> None:
    """The bytes of all sources, read and dropped; those of one, written and synced."""
    files = sorted(file for source in sources for file in source.glob("*.safetensors"))
    buffer = bytearray(_CHUNK)
    for file in files[rank() :: ranks()]:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    size = sum(file.stat().st_size for file in sources[-1].glob("*.safetensors"))
    share = range(rank() * size // ranks(), (rank() + 1) * size // ranks())
    out.mkdir(exist_ok=True)
    with open(out / f"{rank()}.bin", "wb", buffering=0) as written:
        left = len(share)
        os.posix_fallocate(written.fileno(), 0, max(1, left))
        while left:
            left -= written.write(memoryview(buffer)[:left])
        os.fsync(written.fileno())


def merge(sources: Sequence[Path], out: Path) -> None:
    posthoc.merge(sources, out, style="minus-sqrt")


def run_once(call: Callable[[], None]) -> Sample:
    dist.barrier()
    with PeakMemory() as memory:
        start, busy = time.perf_counter(), time.process_time()
        call()
        busy = time.process_time() - busy
        dist.barrier()
        seconds = time.perf_counter() - start
    extra = tuple(everywhere(memory.extra))
    return Sample(max(everywhere(seconds)), sum(everywhere(busy)), extra)


def measure(
    sources: Sequence[Path], repeats: int, folder: Path, cold: bool
) -> dict[str, list[Sample]]:
    """Runs both ways in turn; the first turn warms up and does not count.

    Args:
        cold: the checkpoints are read from the disk.
    """
    ways: Mapping[str, Callable[[Sequence[Path], Path], None]] = {
        REFERENCE: read_all_write_once,
        OURS: merge,
    }
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for turn, name in turns(list(ways), repeats + 1):
        out, way = folder / f"out-{name}", ways[name]
        if cold:
            for source in sources:
                forget(source)
        sample = run_once(lambda way=way, out=out: way(sources, out))
        say(f"{turn}/{repeats} {name:20} {sample.seconds:.2f} s")
        if turn:
            samples[name].append(sample)
        if rank() == 0:
            shutil.rmtree(out)
        dist.barrier()
    return samples


def add_rows(table: Table, samples: Mapping[str, Sequence[Sample]], case: str) -> None:
    times = {name: [sample.seconds for sample in runs] for name, runs in samples.items()}
    table.add_times(times, case, unit="s", to=[REFERENCE])
    busy = {name: [sample.processor for sample in runs] for name, runs in samples.items()}
    for name, seconds in busy.items():
        table.add(name, case, "processor_time", "s", seconds)
    to_reference = ratio(busy[OURS], busy[REFERENCE])
    table.add(OURS, case, f"processor_time_to_{REFERENCE}", "ratio", to_reference)
    extra = [max(sample.extra) / MIB for sample in samples[OURS]]
    table.add(OURS, case, "extra_memory_max", "MiB", extra)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("merge", __doc__, repeats=5)
    parser.add_argument("--mib", type=int, default=256, help="size of the model")
    parser.add_argument("--sources", type=int, default=6, help="checkpoints to merge")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="a folder on the disk to use")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code, the same on every rank."""
    args = parse(argv)
    with world():
        with shared_folder("merge-", args.out) as folder:
            sources = make_sources(args.mib, args.sources, folder)
            table = Table()
            for cold in (False, True):
                case = f"{'cold ' if cold else ''}fp32 {args.mib} MiB, {args.sources} sources"
                add_rows(table, measure(sources, args.repeats, folder, cold), case)
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
