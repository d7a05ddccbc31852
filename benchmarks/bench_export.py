"""Time and memory of an export of a sharded average, next to the other ways to one file.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_export.py --mib 1024

Every way runs in these same processes, in turn, ``--repeats`` times; README.md lists them.
The exit code is not zero where shardema needs more than one bucket of extra memory on any rank,
or where ``--verify`` finds a file that is not what safetensors would have written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import models
from harness import (
    Table,
    Target,
    arguments,
    everywhere,
    finish,
    leave,
    say,
    shared_folder,
    turns,
    world,
)
from rows import MIB, PeakMemory
from shardema import ShardedEMA
from shardema.ranks.transfer import BUCKET_BYTES

REFERENCE = "gather_save_file"
_FILE = "model.safetensors"
_CHUNK = 16 * MIB


# ---- what is exported -------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A sharded model whose weights and average differ everywhere.

    Attributes:
        nbytes: of all tensors of the full model.
    """

    model: nn.Module
    ema: ShardedEMA
    nbytes: int


def make_case(mib: int, device: str) -> Case:
    """Builds the model shard by shard: the full one is in no rank's memory."""
    model = models.build(lambda: models.Blocks(mib), "fsdp2", device=device)
    locals_ = models.locals_of(model)
    with torch.no_grad():
        ema = ShardedEMA(model, 0.5)
        for local in locals_:
            local.add_(1)
        ema.update()
    return Case(model, ema, sum(p.numel() * p.itemsize for p in model.parameters()))


# ---- the ways to one file ---------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """One way to a consolidated file.

    Attributes:
        write: writes into a folder that does not exist yet. All ranks call it.
        of_model: it reads the model, so it runs while the model holds the average.
        equals: what of its file must equal the reference's: ``"bytes"``, ``"tensors"`` or nothing.
        optional: it is left out where it does not run.
    """

    write: Callable[[Case, Path], None]
    of_model: bool = False
    equals: str = ""
    optional: bool = False


def write_raw(case: Case, folder: Path) -> None:
    """As many bytes, one after the other, from one rank: what the disk alone takes."""
    if dist.get_rank() != 0:
        return
    folder.mkdir()
    chunk = memoryview(torch.randint(256, (_CHUNK,), dtype=torch.uint8).numpy())
    with open(folder / _FILE, "wb", buffering=0) as file:
        left = case.nbytes
        while left:
            left -= file.write(chunk[:left])
        os.fsync(file.fileno())


def write_gathered(case: Case, folder: Path) -> None:
    """What is usually done: all tensors to the first rank, then one save_file."""
    full = get_model_state_dict(
        case.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        folder.mkdir()
        save_file(full, folder / _FILE, metadata={"format": "pt"})
        fsync(folder / _FILE)


def write_hf_dcp(case: Case, folder: Path) -> None:
    """torch's own: every rank writes a file of its shards, the first one merges them."""
    writer = HuggingFaceStorageWriter(
        str(folder), save_distributed=True, enable_consolidation=True, thread_count_consolidation=2
    )
    dcp.save({fqn: p.detach() for fqn, p in case.model.named_parameters()}, storage_writer=writer)
    if dist.get_rank() == 0:
        fsync(next(folder.glob("*.safetensors")))


def write_direct(case: Case, folder: Path) -> None:
    """shardema, every rank its own boxes into one file."""
    case.ema.export(folder, mode="direct", max_shard_size="1TB", progress=False)


def write_stream(case: Case, folder: Path) -> None:
    """shardema, bucket by bucket through the first rank."""
    case.ema.export(folder, mode="stream", max_shard_size="1TB", progress=False)


PROVIDERS: dict[str, Provider] = {
    "raw": Provider(write_raw),
    REFERENCE: Provider(write_gathered, of_model=True),
    "shardema_direct": Provider(write_direct, equals="bytes"),
    "shardema_stream": Provider(write_stream, equals="bytes"),
    "hf_dcp": Provider(write_hf_dcp, of_model=True, equals="tensors", optional=True),
}
OURS = ("shardema_direct", "shardema_stream")
TARGETS = (Target("shardema_(direct|stream)", ".*", "extra_memory_max", most=BUCKET_BYTES / MIB),)


def fsync(path: Path) -> None:
    """Returns when the file is on the disk, as shardema's export does."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# ---- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One run of one provider.

    Attributes:
        seconds: until the last rank was done.
        extra: bytes that each rank's memory rose by at most.
    """

    seconds: float
    extra: tuple[int, ...]


def run_once(provider: Provider, case: Case, folder: Path) -> Sample:
    """Runs a provider on all ranks, from a disk at rest."""
    with case.ema.swap() if provider.of_model else contextlib.nullcontext():
        if dist.get_rank() == 0:
            os.sync()
        with PeakMemory() as memory:
            dist.barrier()
            start = time.perf_counter()
            provider.write(case, folder)
            dist.barrier()
            seconds = time.perf_counter() - start
    return Sample(max(everywhere(seconds)), tuple(everywhere(memory.extra)))


def remove(folder: Path) -> None:
    """Removes what a provider wrote, once every rank is done with it."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()


def warm_up(out: Path, device: str) -> list[str]:
    """Runs every provider once on a small model: what is imported or built once is not measured.

    Returns:
        Names of those that run here.
    """
    case = make_case(1, device)
    usable = []
    for name, provider in PROVIDERS.items():
        failure = ""
        try:
            provider.write(case, out / name)
        except Exception as error:
            if not provider.optional:
                raise
            failure = f"{type(error).__name__}: {error}"
        failures = [text for text in everywhere(failure) if text]
        if failures:
            say(f"{name} is left out, it does not run here: {failures[0]}")
        else:
            usable.append(name)
            remove(out / name)
    return usable


def measure(
    case: Case, names: Sequence[str], repeats: int, out: Path, look: Callable[[str, Path], None]
) -> dict[str, list[Sample]]:
    """Runs the providers in turn, each time from another one on: a slow moment hits all alike.

    Args:
        look: told, on the first rank, the name and the folder of each run of the first turn.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn, name in turns(names, repeats):
        folder = out / name
        sample = run_once(PROVIDERS[name], case, folder)
        samples[name].append(sample)
        extra = ", ".join(f"{n / MIB:.0f}" for n in sample.extra)
        say(f"{turn + 1}/{repeats} {name:17} {sample.seconds:7.2f} s, extra MiB [{extra}]")
        if turn == 0 and dist.get_rank() == 0:
            look(name, folder)
        remove(folder)
    return samples


# ---- what is claimed --------------------------------------------------------------------------


class Verifier:
    """Compares the files of a turn with the reference's, by digests: they are soon removed."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._tensors: dict[str, dict[str, str]] = {}

    def look(self, name: str, folder: Path) -> None:
        """Notes what a provider wrote."""
        if not PROVIDERS[name].equals and name != REFERENCE:
            return
        path = next(folder.glob("*.safetensors"))
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.get("__metadata__", {}).pop("shardema", None)  # ours say what they are
            digest.update(json.dumps(header).encode())
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        self._files[name] = digest.hexdigest()
        with safe_open(path, "pt") as stored:
            keys = stored.keys()
            self._tensors[name] = {key: _fingerprint(stored.get_tensor(key)) for key in keys}

    def differing(self) -> list[str]:
        """A line for each provider whose file is not what it must be."""
        lines = []
        for name in self._files:
            what = PROVIDERS[name].equals
            noted: Mapping[str, Any] = self._files if what == "bytes" else self._tensors
            if what and noted[name] != noted[REFERENCE]:
                lines.append(f"WRONG: the {what} of {name} differ from those of {REFERENCE}")
        return lines


def _fingerprint(tensor: Tensor) -> str:
    data = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {data}"


def over_the_limit(samples: Mapping[str, Sequence[Sample]], limit: float) -> list[str]:
    """A line for each run of ours in which a rank's memory rose by more than ``limit`` bytes."""
    return [
        f"BROKEN: {name} took {extra / MIB:.1f} MiB of extra memory on rank {rank} in turn "
        f"{turn}, expected at most {limit / MIB:g} MiB"
        for name in OURS
        for turn, sample in enumerate(samples[name], start=1)
        for rank, extra in enumerate(sample.extra)
        if extra > limit
    ]


def to_rows(samples: Mapping[str, Sequence[Sample]], case: str) -> Table:
    """The rows of a run; a ratio is to the reference in the same turn."""
    table = Table()
    times = {name: [sample.seconds for sample in runs] for name, runs in samples.items()}
    table.add_times(times, case, unit="s", to=[REFERENCE])
    for name, runs in samples.items():
        extra = [max(sample.extra) / MIB for sample in runs]
        table.add(name, case, "extra_memory_max", "MiB", extra)
        first = [sample.extra[0] / MIB for sample in runs]
        table.add(name, case, "extra_memory_rank0", "MiB", first)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("export", __doc__, repeats=3, on_gpu=True)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="a folder on the disk to use")
    parser.add_argument("--verify", action="store_true", help="compare what is in the files")
    parser.add_argument(
        "--limit-mib",
        type=float,
        default=BUCKET_BYTES / MIB,
        help="extra memory that an export by shardema may take on a rank: one bucket",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code, the same on every rank."""
    args = parse(argv)
    with world(args.device):
        with shared_folder("export-", args.out) as out:
            names = warm_up(out, args.device)
            case = make_case(args.mib, args.device)
            verifier = Verifier()
            look = verifier.look if args.verify else lambda name, folder: None
            samples = measure(case, names, args.repeats, out, look)
        missed = finish(to_rows(samples, f"fsdp2 fp32 {args.mib} MiB"), args, TARGETS)
        differing = everywhere(verifier.differing())[0]
        over = over_the_limit(samples, args.limit_mib * MIB)
        if args.verify and not differing:
            others = [name for name in names if PROVIDERS[name].equals]
            say(f"verified: the files of {', '.join(others)} hold what {REFERENCE} wrote")
        if not over:
            say(f"{' and '.join(OURS)}: within {args.limit_mib:g} MiB on every rank")
        for line in (*differing, *over):
            say(line)
        return 1 if differing or over or missed else 0


if __name__ == "__main__":
    leave(main())
