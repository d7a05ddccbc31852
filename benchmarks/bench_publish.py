"""Time and memory of publishing an average to each kind of sink, beside gathering it.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_publish.py --mib 1024

What a group publishes is received by a process of its own, which shares the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import models
from harness import (
    HERE,
    Table,
    Target,
    arguments,
    attempt,
    clock,
    everywhere,
    finish,
    leave,
    rank,
    ratio,
    shared_folder,
    world,
)
from models import MIB
from shardema import ShardedEMA, publishing
from shardema.ranks.transfer import BUCKET_BYTES
from tests import meters

REFERENCE = "iter_full"
BEYOND = "peak_memory_rank0_beyond_iter_full"
TARGETS = (Target("shardema.*", ".*", BEYOND, most=BUCKET_BYTES / MIB + 0.1),)

Publish = Callable[[int], object]  # given a version that is new


def receive_all(store: str) -> None:
    """The reader of the group, until the publisher is done."""
    connection = publishing.Connection(dist.FileStore(store, 2), 1, 2)
    while publishing.receive(connection) is not None:
        pass


@contextlib.contextmanager
def group_sink(folder: str) -> Iterator[publishing.GroupSink | None]:
    """On the first rank, a sink with a reader in a process of its own."""
    if rank() != 0:
        yield None
        return
    store = str(Path(folder) / "store")
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    call = [sys.executable, __file__, "--receive", store]
    process = subprocess.Popen(call, env=os.environ | {"PYTHONPATH": paths})
    try:
        sink = publishing.GroupSink(publishing.Connection(dist.FileStore(store, 2), 0, 2))
        yield sink
        sink.close()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def into(served: dict[str, Tensor]) -> Callable[[Iterator[tuple[str, Tensor]]], None]:
    """What an engine does: copies each tensor to where it has it."""

    def load_weights(weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name not in served:
                served[name] = torch.empty_like(tensor)
            served[name].copy_(tensor)

    return load_weights


def gather(ema: ShardedEMA) -> None:
    for _ in ema.iter_full():
        pass


@contextlib.contextmanager
def providers(ema: ShardedEMA, folder: str, served: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    """By name, what publishes one version; and the reference."""
    first = rank() == 0
    files = publishing.FolderSink(f"{folder}/w", keep=1)
    memory = publishing.SharedMemorySink(f"bench-{os.getpid()}") if first else None
    load = into(served) if first else None
    try:
        with group_sink(folder) as group:
            yield {
                REFERENCE: lambda version: gather(ema),
                "shardema": lambda version: ema.publish(load, dtype=None, version=version),
                "shardema_folder": lambda version: ema.publish(files, dtype=None, version=version),
                "shardema_group": lambda version: ema.publish(group, dtype=None, version=version),
                "shardema_memory": lambda version: ema.publish(memory, dtype=None, version=version),
            }
    finally:
        files.close()
        if memory is not None:
            memory.close(remove=True)


def make(mib: int) -> ShardedEMA:
    """An average of an FSDP2 model."""
    model: nn.Module = models.build(lambda: models.Blocks(mib), "fsdp2")
    ema = ShardedEMA(model, 0.5)
    ema.update()
    return ema


def wrong(publish: Publish, name: str, served: dict[str, Tensor], ema: ShardedEMA) -> str:
    """What an engine got that differs from the gathered model, or nothing; others only run."""
    publish(0)
    full = ema.full_state_dict()
    odd = [key for key in full if not torch.equal(full[key], served[key])] if served else []
    return f"wrong: {odd[0]} differs" if name == "shardema" and odd else ""


def peak(call: Callable[[], object]) -> int:
    """`meters.peak`, of a call that frees nothing that was left by others."""
    gc.collect()
    return meters.peak(call)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("publish", __doc__, repeats=7)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="where the folder is made")
    parser.add_argument("--receive", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    if args.receive:
        receive_all(args.receive)
        return 0
    served: dict[str, Tensor] = {}
    with world(), torch.no_grad(), shared_folder("publish-", args.out) as folder:
        table, case = Table(), f"fsdp2 fp32 {args.mib} MiB"
        ema, versions = make(args.mib), iter(range(1, 1 << 30))
        with providers(ema, str(folder), served) as named:
            usable: dict[str, Callable[[], object]] = {}
            for name, publish in named.items():
                said, why = attempt(
                    lambda p=publish, n=name: wrong(p, n, served, ema)  # type: ignore[misc]
                )
                if why or said:
                    table.lacks(name, case, why or said)
                else:
                    usable[name] = lambda p=publish: p(next(versions))  # type: ignore[misc]
            times = clock(usable, args.repeats, warm_up=1)
            table.add_times(times, case, unit="s", to=[REFERENCE])
            for name in usable:
                if name != REFERENCE:
                    share = ratio(times[REFERENCE], times[name])
                    table.add(name, case, "share_of_iter_full", "ratio", share)
            peaks = {name: everywhere(peak(call)) for name, call in usable.items()}
            for name, (first, *_) in peaks.items():
                table.add(name, case, "peak_memory_rank0", "MiB", [first / MIB])
                if name != REFERENCE:
                    beyond = (first - peaks[REFERENCE][0]) / MIB
                    table.add(name, case, BEYOND, "MiB", [beyond])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
