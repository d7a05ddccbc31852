"""What grows with the number of ranks: reading the shards, their shadows, the plan of a gather.

::

    python benchmarks/bench_scale.py

One process, on one core. A fake process group stands for the other ranks, and Llama 3 70B and a
model of 1 T with experts lie on the meta device. The plan is made from the boxes of all ranks, as
they would arrive pickled; what a save and an export would send and write is counted from it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import pickle
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import models
from harness import Table, Target, arguments, finish, say
from shardema import backends
from shardema.files import manifest as manifests
from shardema.files.arrangement import Pieces, StoredFile, packed
from shardema.files.export import parse_size, plan_targets
from shardema.files.manifest import (
    Fingerprint,
    Manifest,
    StoredAverage,
    StoredTensor,
)
from shardema.files.safetensors import make_header
from shardema.policy import ShadowPolicy
from shardema.profiles import History
from shardema.ranks.agree import Ranks
from shardema.ranks.messages import text_of
from shardema.ranks.plan import Plan, make_plan
from shardema.schedules import constant, describe
from shardema.shards.boxes import Box, flat_boxes
from shardema.shards.shard import Shard
from shardema.update.shadows import allocate

MIB = 1 << 20
EP = 64  # ranks over which the experts are divided, as DeepSeek-V3 was trained
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


def core_seconds(work: Callable[[], object]) -> float:
    """CPU time of a long call, which other work on the machine does not change."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


# ---- one rank of many: FSDP2 ------------------------------------------------------------------


def sharded(
    make: Callable[[], nn.Module],
    ranks: int,
    place: Callable[[nn.Module, int], None] = lambda model, ranks: None,
) -> nn.Module:
    """The model on the meta device, sharded over a fake world, parts of it by ``place``."""
    with torch.device("meta"):
        model = make()
    place(model, ranks)
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


def by_rows(shard: Shard, ranks: int, rank: int) -> tuple[Box, ...]:
    """What FSDP2 over all ranks gives to a rank of a tensor."""
    return rows_of(shard.shape, ranks, rank)


Held = Callable[[Shard, int, int], tuple[Box, ...]]


def payloads(shards: Sequence[Shard], ranks: int, held: Held = by_rows) -> list[bytes]:
    """What each rank would send: the shards of the first one, with the rank's own boxes."""
    averaged = {shard.fqn for shard in shards}
    sent = []
    for rank in range(ranks):
        theirs = [replace(shard, boxes=held(shard, ranks, rank)) for shard in shards]
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
        self.plans: dict[Any, Any] = {}
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


# ---- large models: what a rank holds, and what a save and an export send and write ------------


@dataclass(frozen=True)
class Large:
    """A model, how it is sharded, and which boxes that gives to a rank.

    Attributes:
        flat: as FSDP1 shards it, which needs real ranks: what FSDP2 gives is not compared.
    """

    make: Callable[[], nn.Module]
    place: Callable[[nn.Module, int], None]
    held: Held
    flat: bool = False


def experts_or_rows(shard: Shard, ranks: int, rank: int) -> tuple[Box, ...]:
    """What `models.on_experts_mesh` and FSDP2 give to a rank."""
    if ".experts." not in shard.fqn:
        return by_rows(shard, ranks, rank)
    part, mine = divmod(rank, EP)
    experts, rows, columns = shard.shape
    sizes = (experts // EP, rows * EP // ranks, columns)
    return (Box((mine * sizes[0], part * sizes[1], 0), sizes),)


def flat_units(make: Callable[[], nn.Module]) -> Held:
    """What FSDP1 gives to a rank: even parts of each layer's parameters, one behind the other."""
    with torch.device("meta"):
        model = make()
    starts: dict[str, int] = {}
    lengths: dict[str, int] = {}

    def unit(fqn: str) -> str:
        words = fqn.split(".")
        return words[1] if words[0] == "layers" else ""

    for fqn, param in model.named_parameters():
        starts[fqn] = lengths.get(unit(fqn), 0)
        lengths[unit(fqn)] = starts[fqn] + param.numel()

    def held(shard: Shard, ranks: int, rank: int) -> tuple[Box, ...]:
        each = -(-lengths[unit(shard.fqn)] // ranks)
        start = max(0, rank * each - starts[shard.fqn])
        stop = min(math.prod(shard.shape), (rank + 1) * each - starts[shard.fqn])
        return flat_boxes(shard.shape, start, stop - start) if stop > start else ()

    return held


def large(layers: int | None) -> dict[str, Large]:
    """The large models, by label; with so many layers, or as many as they have."""
    fewer = {} if layers is None else {"layers": layers}

    def llama() -> nn.Module:
        return models.Llama(**fewer)

    return {
        "llama-70b": Large(llama, lambda model, ranks: None, by_rows),
        "llama-70b-fsdp1": Large(llama, lambda model, ranks: None, flat_units(llama), flat=True),
        "experts-1t": Large(
            lambda: models.Experts(**fewer),
            lambda model, ranks: models.on_experts_mesh(model, ranks, EP),
            experts_or_rows,
        ),
    }


def measure_large(table: Table, label: str, model: Large, ranks: int, repeats: int) -> None:
    """Rows of a model on so many ranks."""
    case = f"{label} on {ranks} ranks"
    say(case)
    with fake_world(ranks):
        shards = read(sharded(model.make, ranks, model.place))
    own = [replace(shard, boxes=model.held(shard, ranks, 0)) for shard in shards]
    assert model.flat or [s.boxes for s in own] == [s.boxes for s in shards]
    shards = own
    averaged = {shard.fqn for shard in shards}
    sent = payloads(shards, ranks, model.held)
    times, again = [], []
    for _ in range(repeats):
        received = cast(Ranks, Received(sent))
        plans: list[Plan] = []
        times.append(seconds(lambda r=received, p=plans: p.append(make_plan(shards, averaged, r))))
        again.append(seconds(lambda r=received: make_plan(shards, averaged, r)))
    table.add(OURS, case, "tensors", "tensors", [len(shards)])
    table.add(OURS, case, "plan", "s", times)
    table.add(OURS, case, "plan_of_a_second_object", "s", again)
    table.add(OURS, case, "plan_sent_by_a_rank", "KiB", [max(map(len, sent)) / 1024])
    measure_save(table, case, plans[0], ranks)
    measure_export(table, case, plans[0])


def files_of(plan: Plan, ranks: int) -> list[StoredFile]:
    """The file that each rank writes of one fp32 average; the checksums are made up."""
    pieces: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    for number, (item, writers) in enumerate(zip(plan.items, plan.writers, strict=True)):
        for (box, _), writer in zip(item.holders, writers, strict=True):
            pieces[writer].append((number, box))
    files = []
    made = Pieces([torch.float32.itemsize] * len(plan.items))
    for rank, held in enumerate(pieces):
        names = [f"{plan.items[number].fqn} {place}" for place, (number, _) in enumerate(held)]
        sizes = [box.sizes for _, box in held]
        head, entries = make_header(
            [(name, torch.float32, size) for name, size in zip(names, sizes, strict=True)]
        )
        starts = [entries[name].start for name in names]
        order, different = made.of([held[i] for i in np.argsort(starts).tolist()])
        size = len(head) + sum(entry.nbytes for entry in entries.values())
        blocks = tuple(f"{n:032x}" for n in range(-(-size // manifests.BLOCK)))
        name = f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        files.append(StoredFile(name, size, len(head), blocks, order, different))
    return files


def manifest_of(plan: Plan, files: Sequence[StoredFile]) -> Manifest:
    """Of a save of one fp32 average."""
    average = StoredAverage(describe(constant(0.999)), 1.0, 1, "float32", 1.0, History(1.0, True))
    tensors = tuple(
        StoredTensor("ema", i.fqn, i.file_name, i.role, i.shape, torch.float32, i.aliases)
        for i in plan.items
    )
    prints = {item.fqn: Fingerprint("F32", f"{1 << 63:016x}") for item in plan.items}
    return Manifest(
        "0" * 32,
        len(files),
        {"ema": average},
        tensors,
        (),
        tuple(files),
        model={"weights": prints},
    )


def word_of(file: StoredFile) -> int:
    """Bytes that a rank tells the first one of its file: its entry, and fingerprints."""
    entry = {
        "name": file.name,
        "size": file.size,
        "head": file.head,
        "blocks": file.blocks,
        "order": packed([(one.tensor, one.box) for one in file.boxes])[0],
        "boxes": [[box.offsets, box.sizes] for box in file.different],
    }
    numbers = sorted(file.order.tensors)
    made_up = [number * 0x9E3779B97F4A7C15 % (1 << 64) for number in numbers]
    prints = ["weights", "F32", text_of(numbers, np.uint32), text_of(made_up, np.uint64)]
    return len(json.dumps([entry, [prints]]))


def measure_save(table: Table, case: str, plan: Plan, ranks: int) -> None:
    """What the ranks write and tell of a save of one average, and its manifest."""
    files = files_of(plan, ranks)
    sizes = [file.size for file in files]
    table.add(OURS, case, "saved_by_the_most", "MiB", [max(sizes) / MIB])
    table.add(OURS, case, "saved_by_the_least", "MiB", [min(sizes) / MIB])
    table.add(OURS, case, "saved", "GiB", [sum(sizes) / (1 << 30)])
    words = [word_of(file) for file in files]
    table.add(OURS, case, "told_by_a_rank", "KiB", [max(words) / 1024])
    table.add(OURS, case, "told_by_all", "MiB", [sum(words) / MIB])
    manifest = manifest_of(plan, files)
    packed: list[bytes] = []
    packing = core_seconds(lambda m=manifest, to=packed: to.append(manifests.pack(m)))
    data = packed.pop()
    table.add(OURS, case, "manifest", "MiB", [len(data) / MIB])
    table.add(OURS, case, "manifest_packed", "s", [packing])
    del files, manifest  # gigabytes
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, manifests.NAME).write_bytes(data)
        reading = core_seconds(lambda: manifests.read(folder, files=False))
    table.add(OURS, case, "manifest_read", "s", [reading])


def measure_export(table: Table, case: str, plan: Plan) -> None:
    """The files of an export in bf16, and what the first rank receives for them."""
    tensors = [(i.stem, i.file_name, torch.bfloat16, i.shape) for i in plan.items]
    targets, _ = plan_targets(tensors, parse_size("5GB"))
    table.add(OURS, case, "exported", "GiB", [sum(t.size for t in targets) / (1 << 30)])
    table.add(OURS, case, "exported_files", "files", [len(targets)])
    table.add(OURS, case, "largest_file", "GiB", [max(t.size for t in targets) / (1 << 30)])
    own = sum(box.numel for i in plan.items for box, who in i.holders if who[0] == 0)
    full = sum(math.prod(item.shape) for item in plan.items)
    table.add(OURS, case, "received_by_the_first", "GiB", [2 * (full - own) / (1 << 30)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("scale", __doc__, repeats=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument(
        "--tensors", type=int, nargs="+", default=[125, 250, 500, 1000], help="of a plan"
    )
    parser.add_argument("--layers", type=int, default=80, help="of the Llama; 80 make 70 B")
    parser.add_argument(
        "--large-ranks", type=int, nargs="*", default=[256, 1024, 4096], help="of the large models"
    )
    parser.add_argument("--large-models", nargs="+", default=sorted(large(None)))
    parser.add_argument("--large-layers", type=int, help="of the large models; all by default")
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
    for name in args.large_models:
        for ranks in args.large_ranks:
            model = large(args.large_layers)[name]
            measure_large(table, name, model, ranks, args.repeats)
    return finish(table, args, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
