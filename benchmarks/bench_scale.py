"""What grows with the number of ranks: reading the shards, their shadows, the plan of a gather.

::

    python benchmarks/bench_scale.py

One process, on one core. A fake process group stands for the other ranks, and Llama 3 70B lies on
the meta device. The plan is made from the boxes of all ranks, as they would arrive pickled.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import models
from harness import Table, Target, arguments, finish, say
from shardema import backends
from shardema.policy import ShadowPolicy
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import make_plan
from shardema.shards.boxes import Box
from shardema.shards.shard import Shard
from shardema.update.shadows import allocate

MIB = 1 << 20
OURS = "shardema"
TARGETS = (
    Target(OURS, "plan 1024 ranks x 1000 tensors", "time", most=1),
    Target(OURS, "plan.*", "time_per_rank_grows", most=1.25),
    Target(OURS, "plan.*", "time_per_tensor_grows", most=1.25),
)


@contextlib.contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    """A world of ``ranks`` whose collectives do nothing; this process is ``rank``."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes, without the garbage of earlier ones."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- one rank of many: FSDP2 ------------------------------------------------------------------


def sharded(make: Callable[[], nn.Module], ranks: int) -> nn.Module:
    """The model on the meta device, sharded over a fake world."""
    with torch.device("meta"):
        model = make()
    models.shard(model, init_device_mesh("cpu", (ranks,)))
    return model


def read(model: nn.Module) -> list[Shard]:
    """What ``ShardedEMA(model)`` reads, on the meta device, which it refuses itself."""
    _, backend = backends.find([model])
    return backend.read([model])


def measure_reading(
    table: Table, make: Callable[[], nn.Module], label: str, ranks: int, repeats: int
) -> None:
    """Seconds to read the shards of the first rank, and the size of its shadows."""
    with fake_world(ranks):
        model = sharded(make, ranks)
        read(model)
        times = [seconds(lambda: read(model)) for _ in range(repeats)]
        shards = read(model)
        held = sum(flat.nbytes for flat in allocate(shards, ShadowPolicy()).flats)
    case = f"{label} {ranks} ranks"
    table.add(OURS, case, "read", "s", times)
    table.add(OURS, case, "tensors", "tensors", [len(shards)])
    table.add(OURS, case, "shadows", "MiB", [held / MIB])
    full = sum(4 * math.prod(shard.shape) for shard in shards)
    table.add(OURS, case, "shadows_to_even_share", "ratio", [held * ranks / full])


# ---- all ranks: the plan ----------------------------------------------------------------------


def rows_of(shape: tuple[int, ...], ranks: int, rank: int) -> tuple[Box, ...]:
    """What FSDP2 gives to a rank: ``torch.chunk`` over the first dim."""
    per_rank = -(-shape[0] // ranks)
    start, stop = min(rank * per_rank, shape[0]), min((rank + 1) * per_rank, shape[0])
    if stop == start:
        return ()
    return (Box((start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:])),)


class Sent(Exception):
    """Ends a plan where the exchange would begin, with what this rank would send."""


class Sender:
    """Stands for the ranks in `make_plan`, up to the exchange."""

    def all_gather(self, mine: Any) -> Any:
        raise Sent(pickle.dumps(mine))


def payloads(shards: Sequence[Shard], ranks: int) -> list[bytes]:
    """What each rank would send: the shards of the first one, with the rank's own boxes."""
    averaged = {shard.fqn for shard in shards}
    sent = []
    for rank in range(ranks):
        theirs = [replace(shard, boxes=rows_of(shard.shape, ranks, rank)) for shard in shards]
        try:
            make_plan(theirs, averaged, cast(Ranks, Sender()))
        except Sent as told:
            sent.append(told.args[0])
    return sent


class Received:
    """Stands for the ranks in `make_plan`: what they send is there already."""

    def __init__(self, sent: Sequence[bytes]) -> None:
        self.size = len(sent)
        self.ranks = tuple(range(len(sent)))
        self.unpickling = 0.0
        self._sent = sent

    def all_gather(self, mine: Any) -> list[Any]:
        """As ``all_gather_object`` does it, but for the wire."""
        start = time.perf_counter()
        everything = [pickle.load(io.BytesIO(data)) for data in self._sent]
        self.unpickling = time.perf_counter() - start
        return everything


def measure_plan(table: Table, shards: Sequence[Shard], ranks: int, repeats: int) -> float:
    """Seconds of the whole plan on one rank, the median of the turns."""
    averaged = {shard.fqn for shard in shards}
    sent = payloads(shards, ranks)
    times, unpickling = [], []
    for _ in range(repeats):
        received = Received(sent)
        work = lambda r=received: make_plan(shards, averaged, cast(Ranks, r))  # noqa: E731
        times.append(seconds(work))
        unpickling.append(received.unpickling)
    case = f"plan {ranks} ranks x {len(shards)} tensors"
    table.add(OURS, case, "time", "s", times)
    table.add(OURS, case, "unpickling", "s", unpickling)
    table.add(OURS, case, "sent_by_a_rank", "KiB", [max(map(len, sent)) / 1024])
    each = [1e6 * t / ranks / len(shards) for t in times]
    table.add(OURS, case, "time_per_rank_and_tensor", "us", each)
    return table.rows[-4].p50


def tensors(count: int, ranks: int) -> list[Shard]:
    """What one of ``ranks`` ranks holds of so many tensors of 4096 x 4096."""
    with fake_world(ranks):
        return read(sharded(lambda: models.Tensors(count, 4096 * 4096, 1), ranks))


def measure_growth(table: Table, args: argparse.Namespace) -> None:
    """Plans over ranks and over tensors, and how much dearer each rank and tensor becomes."""
    cost: dict[tuple[int, int], float] = {}
    for ranks in sorted(args.ranks):
        for count in sorted(args.tensors):
            if ranks == max(args.ranks) or count == max(args.tensors):
                say(f"plan for {ranks} ranks x {count} tensors")
                shards = tensors(count, ranks)
                cost[ranks, count] = measure_plan(table, shards, ranks, args.repeats)
    if len(args.ranks) < 2 or len(args.tensors) < 2:
        return
    (few_ranks, most_ranks), (few, most) = sorted(args.ranks)[-2:], sorted(args.tensors)[-2:]
    largest = cost[most_ranks, most]
    by_ranks = largest / cost[few_ranks, most] / (most_ranks / few_ranks)
    by_tensors = largest / cost[most_ranks, few] / (most / few)
    grown = f"plan from {few_ranks} to {most_ranks} ranks"
    table.add(OURS, grown, "time_per_rank_grows", "ratio", [by_ranks])
    grown = f"plan from {few} to {most} tensors"
    table.add(OURS, grown, "time_per_tensor_grows", "ratio", [by_tensors])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("scale", __doc__, repeats=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument(
        "--tensors", type=int, nargs="+", default=[125, 250, 500, 1000], help="of a plan"
    )
    parser.add_argument("--layers", type=int, default=80, help="of the Llama; 80 make 70 B")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(1)
    label = "llama-70b" if args.layers == 80 else f"llama of {args.layers} layers"

    def llama() -> nn.Module:
        return models.Llama(layers=args.layers)

    table = Table()
    for ranks in args.ranks:
        measure_reading(table, llama, label, ranks, args.repeats)
    measure_growth(table, args)
    return finish(table, args, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
