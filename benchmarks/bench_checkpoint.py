"""Time and memory of saving and loading averages, next to other ways and to the disk alone.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_checkpoint.py --mib 1024

Every way saves and loads the averages of one FSDP2 model, in these same processes, in turn. The
saves in the background run beside training steps of another, small model.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist

import models
from harness import (
    Missing,
    Table,
    Target,
    arguments,
    attempt,
    everywhere,
    files_in,
    finish,
    forget,
    leave,
    rank,
    ratio,
    say,
    shared_folder,
    turns,
    world,
)
from rows import MIB, PeakMemory
from shardema import ShardedEMA
from shardema.files import verify

RAW, TORCH, OURS = "raw", "torch_save", "shardema"
STEPS = "training"  # steps with nothing beside them
_CHUNK = 16 * MIB
_T = TypeVar("_T")
TARGETS = (Target(OURS, "save in background .*", "step_slower", most=5),)


# ---- what is saved ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The averages of a sharded model.

    Attributes:
        averages: a second copy, as DTensors, for the other ways.
        group: of all ranks, for what communicates beside the training.
    """

    ema: ShardedEMA
    averages: dict[str, Tensor]
    group: Any

    @property
    def theirs(self) -> dict[str, Tensor]:
        """This rank's part of the copy."""
        return {name: models.local(value) for name, value in self.averages.items()}

    @property
    def ours(self) -> dict[str, Tensor]:
        """The values of ``ema``."""
        held = self.ema.state_dict()["averages"]["ema"]
        return {name: held[name].local for name in self.averages}

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return sum(value.nbytes for value in self.theirs.values())


def make_case(mib: int, group: Any) -> Case:
    """Builds the model shard by shard; averages and weights differ everywhere."""
    model = models.build(lambda: models.Blocks(mib), "fsdp2")
    ema = ShardedEMA(model, 0.5)
    for local in models.locals_of(model):
        local.add_(1)
    ema.update()
    averages = {name: param.detach().clone() for name, param in model.named_parameters()}
    case = Case(ema, averages, group)
    for name, value in case.ours.items():
        case.theirs[name].copy_(value)
    return case


# ---- the ways ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pending:
    """A save that goes on in the background."""

    done: Callable[[], bool]
    result: Callable[[], object]


@dataclass(frozen=True)
class Way:
    """One way to keep averages. All ranks call all of these.

    Attributes:
        save: into a folder that does not exist yet; the bytes are on the disk afterwards.
        load: what it saved, into the same memory.
        start: saves in the background.
        of_ema: it saves and loads ``ema``, else the copy.
        check: whether what it loads must equal what it saved.
    """

    save: Callable[[Case, Path], object]
    load: Callable[[Case, Path], object]
    start: Callable[[Case, Path], Pending] | None = None
    of_ema: bool = False
    check: bool = True


def path_of(folder: Path) -> Path:
    """This rank's file, of the ways that have one."""
    return folder / f"rank-{rank()}"


def raw_save(case: Case, folder: Path) -> None:
    """As many bytes from every rank: what the disk alone takes."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_raw(path_of(folder), case.nbytes)


def _write_raw(path: Path, nbytes: int) -> None:
    chunk = memoryview(_noise())
    with open(path, "wb", buffering=0) as file:
        while nbytes:
            nbytes -= file.write(chunk[:nbytes])
        os.fsync(file.fileno())


@functools.cache
def _noise() -> bytearray:
    return bytearray(os.urandom(_CHUNK))


def raw_load(case: Case, folder: Path) -> None:
    """The bytes of this rank's file, read and left."""
    read_raw(path_of(folder))


def read_raw(path: Path) -> None:
    """Reads a file into one buffer, over and over."""
    with open(path, "rb", buffering=0) as file:
        while file.readinto(_noise()):
            pass


def raw_start(case: Case, folder: Path) -> Pending:
    """The same bytes from a thread: what any writer beside the training takes from it."""
    folder.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=_write_raw, args=(path_of(folder), case.nbytes))
    thread.start()
    return Pending(lambda: not thread.is_alive(), thread.join)


def torch_save(case: Case, folder: Path) -> None:
    """One file of each rank, without what is needed to load it on another number of ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(path_of(folder), "wb") as file:
        torch.save(case.theirs, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(case: Case, folder: Path) -> None:
    """The tensors of the file, copied to where they belong."""
    found = torch.load(path_of(folder), weights_only=True)
    for name, value in case.theirs.items():
        value.copy_(found[name])


def dcp_save(case: Case, folder: Path) -> None:
    dcp.save(case.averages, checkpoint_id=folder)


def dcp_load(case: Case, folder: Path) -> None:
    dcp.load(case.averages, checkpoint_id=folder)


def dcp_start(case: Case, folder: Path) -> Pending:
    """torch copies the tensors, and a thread plans and writes."""
    future = dcp.async_save(case.averages, checkpoint_id=folder, process_group=case.group)
    assert isinstance(future, concurrent.futures.Future)
    return Pending(future.done, future.result)


def ours_save(case: Case, folder: Path) -> None:
    case.ema.save(folder)


def ours_load(case: Case, folder: Path) -> None:
    case.ema.load(folder)


def ours_start(case: Case, folder: Path) -> Pending:
    pending = case.ema.save(folder, wait=False)
    assert pending is not None
    return Pending(pending.done, pending.result)


@functools.cache
def _manager(background: bool) -> Any:
    try:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
    except ImportError as error:
        raise Missing("pip install torch_checkpointing") from error
    config = CheckpointManager.Config
    made = config.with_async_save() if background else config.with_sync_save()
    # the default fails on ext4: it writes buffers of any size and place with O_DIRECT
    made.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(made)


def tc_save(case: Case, folder: Path) -> None:
    """Without a resharder, whose metadata several ranks exchange on CUDA devices only."""
    _manager(False).save(str(folder), {"averages": case.averages})
    sync_folder(folder)


def tc_load(case: Case, folder: Path) -> None:
    _manager(False).load(str(folder), into={"averages": case.averages}, strict=True)


def tc_start(case: Case, folder: Path) -> Pending:
    """A thread copies to shared memory and a process writes; nothing is synced to the disk."""
    future = _manager(True).save(str(folder), {"averages": case.averages})
    with _manager(True).lock():  # the training may change them from here on
        pass
    return Pending(future.done, future.result)


def sync_folder(folder: Path) -> None:
    """Each rank a share of the files, for ways that do not sync what they write."""
    dist.barrier()
    for path in files_in(folder)[rank() :: dist.get_world_size()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


WAYS: dict[str, Way] = {
    RAW: Way(raw_save, raw_load, raw_start, check=False),
    OURS: Way(ours_save, ours_load, ours_start, of_ema=True),
    TORCH: Way(torch_save, torch_load),
    "dcp": Way(dcp_save, dcp_load, dcp_start),
    "torch_checkpointing": Way(tc_save, tc_load, tc_start),
}


def verify_raw(case: Case, folder: Path) -> None:
    for path in files_in(folder):
        read_raw(path)


def verify_ours(case: Case, folder: Path) -> None:
    found = verify.verify(str(folder))
    assert found.checksums
    assert not found.damages


VERIFIERS = {RAW: verify_raw, OURS: verify_ours}  # the first rank reads all files of ours


# ---- whether a way is right -------------------------------------------------------------------


def wrong(way: Way, case: Case, out: Path) -> str:
    """What is wrong with what a way loads; or nothing."""
    values = list((case.ours if way.of_ema else case.theirs).values())
    known = [value.clone() for value in values]

    def back(folder: Path) -> bool:
        for value in values:
            value.zero_()
        way.load(case, folder)
        return all(map(torch.equal, values, known))

    way.save(case, out / "saved")
    dist.barrier()
    if not back(out / "saved") and way.check:
        return "wrong: it loads other values"
    if way.start is not None:
        pending = way.start(case, out / "started")
        for value in values:
            value.add_(1)
        pending.result()
        dist.barrier()
        if not back(out / "started") and way.check:
            return "wrong: a save in the background holds later values"
    return ""


def usable(table: Table, args: argparse.Namespace, group: Any, out: Path) -> dict[str, Way]:
    """The ways that run here and are right; the others have a row of their reason."""
    found = {}
    for name, way in WAYS.items():
        small = functools.partial(wrong, way, make_case(1, group), out / f"{name}-small")
        said, why = attempt(small)
        odd = why or next((text for text in everywhere(said) if text), "")
        if odd:
            table.lacks(name, f"save fsdp2 fp32 {args.mib} MiB", odd)
        else:
            found[name] = way
        remove(out)
    return found


# ---- measuring --------------------------------------------------------------------------------


def remove(out: Path) -> None:
    """Removes all that was written, once every rank is done with it."""
    dist.barrier()
    if rank() == 0:
        for path in out.iterdir():
            shutil.rmtree(path)
        os.sync()
    dist.barrier()


def timed(work: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds until the last rank is done, from a disk at rest; and what was returned."""
    if rank() == 0:
        os.sync()
    dist.barrier()
    start = time.perf_counter()
    result = work()
    dist.barrier()
    return max(everywhere(time.perf_counter() - start)), result


def extra_memory(work: Callable[[], object]) -> float:
    """MiB that resident memory rises by at most, on the rank where it is most."""
    dist.barrier()
    with PeakMemory() as memory:
        work()
    return max(everywhere(memory.extra)) / MIB


class Training:
    """Steps of a small FSDP2 model on these ranks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._model = models.build(lambda: models.Blocks(args.train_mib), "fsdp2")
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, weight_decay=0)
        embed = self._model.embed
        assert isinstance(embed, nn.Embedding)
        self._batch = torch.arange(args.tokens) % embed.num_embeddings

    def step(self) -> None:
        with torch.enable_grad():
            self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def until(self, done: Callable[[], bool]) -> list[float]:
        """Seconds of each step, one at least, until ``done`` on every rank."""
        seconds = []
        left = torch.ones(1)
        while left.item():
            start = time.perf_counter()
            self.step()
            left.fill_(not done())
            dist.all_reduce(left)
            seconds.append(time.perf_counter() - start)
        return seconds


def measure_saves(
    table: Table, args: argparse.Namespace, case: Case, ways: Mapping[str, Way], out: Path
) -> None:
    """Saves that are waited for."""
    label = f"save fsdp2 fp32 {args.mib} MiB"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn, name in turns(list(ways), args.repeats):
        times[name].append(timed(lambda n=name: ways[n].save(case, out / n))[0])
        say(f"{turn + 1}/{args.repeats} {label} {name} {times[name][-1]:.2f} s")
        remove(out)
    table.add_times(times, label, unit="s", to=[RAW, TORCH])
    for name, way in ways.items():
        peak = extra_memory(lambda way=way, name=name: way.save(case, out / name))
        table.add(name, label, "extra_memory_max", "MiB", [peak])
        remove(out)


@dataclass(frozen=True)
class Beside:
    """Training steps beside a save.

    Attributes:
        call: seconds until the training may go on.
        done: seconds until the save is complete.
        step: seconds of a step meanwhile.
        steps: how many there were.
    """

    call: float
    done: float
    step: float
    steps: int

    def lost(self, usual: float) -> float:
        """Seconds that the save took from the training, in all."""
        return self.call + self.steps * (self.step - usual)


def beside(training: Training, start: Callable[[], Pending]) -> Beside:
    """A save in the background, and training until it is complete."""
    call, pending = timed(start)
    begin = time.perf_counter()
    seconds = training.until(pending.done)
    done = call + max(everywhere(time.perf_counter() - begin))
    pending.result()
    return Beside(call, done, mean(seconds), len(seconds))


def mean(seconds: Sequence[float]) -> float:
    return max(everywhere(sum(seconds) / len(seconds)))


def measure_starts(
    table: Table, args: argparse.Namespace, case: Case, ways: Mapping[str, Way], out: Path
) -> None:
    """Saves in the background, beside training steps."""
    label = f"save in background fsdp2 fp32 {args.mib} MiB"
    training = Training(args)
    training.step()
    starts = {
        name: functools.partial(way.start, case, out / name)
        for name, way in ways.items()
        if way.start is not None
    }
    usual: list[float] = []  # seconds of a step with nothing beside it
    runs: dict[str, list[Beside]] = {name: [] for name in starts}
    for turn, name in turns([STEPS, *starts], args.repeats):
        if name == STEPS:
            left = iter(range(args.steps))
            usual.append(mean(training.until(lambda left=left: next(left) == args.steps - 1)))
            continue
        runs[name].append(run := beside(training, starts[name]))
        say(f"{turn + 1}/{args.repeats} {label} {name} {run.call:.2f} s, {run.done:.2f} s")
        remove(out)
    table.add(STEPS, label, "step", "ms", [1000 * step for step in usual])
    for name, found in runs.items():
        done = [run.done for run in found]
        slower = ratio([run.step for run in found], usual)
        lost = [run.lost(step) for run, step in zip(found, usual, strict=True)]
        table.add(name, label, "call", "s", [run.call for run in found])
        table.add(name, label, "time", "s", done)
        table.add(name, label, f"time_to_{RAW}", "ratio", ratio(done, [r.done for r in runs[RAW]]))
        table.add(name, label, "step_slower", "%", [100 * (r - 1) for r in slower])
        table.add(name, label, "lost", "s", lost)
        peak = extra_memory(lambda start=starts[name]: start().result())
        table.add(name, label, "extra_memory_max", "MiB", [peak])
        remove(out)


def measure_loads(
    table: Table, args: argparse.Namespace, case: Case, ways: Mapping[str, Way], out: Path
) -> None:
    """Loads of what each way saved: first from the page cache, then from the disk."""
    for name, way in ways.items():
        way.save(case, out / name)
        dist.barrier()
        way.load(case, out / name)
    for cold in (False, True):
        label = f"load{' cold' if cold else ''} fsdp2 fp32 {args.mib} MiB"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn, name in turns(list(ways), args.repeats):
            if cold:
                forget(out / name)
            times[name].append(timed(lambda n=name: ways[n].load(case, out / n))[0])
            say(f"{turn + 1}/{args.repeats} {label} {name} {times[name][-1]:.2f} s")
        table.add_times(times, label, unit="s", to=[RAW, TORCH])
        if not cold:
            for name, way in ways.items():
                peak = extra_memory(lambda way=way, name=name: way.load(case, out / name))
                table.add(name, label, "extra_memory_max", "MiB", [peak])
    measure_verify(table, args, case, out / OURS)


def measure_verify(table: Table, args: argparse.Namespace, case: Case, folder: Path) -> None:
    """One process reads all files of a checkpoint."""
    label = f"verify {args.mib} MiB"

    def work(name: str) -> None:
        if rank() == 0:
            VERIFIERS[name](case, folder)

    times: dict[str, list[float]] = {name: [] for name in VERIFIERS}
    for _, name in turns(list(VERIFIERS), args.repeats):
        times[name].append(timed(lambda n=name: work(n))[0])
    table.add_times(times, label, unit="s", to=[RAW])
    for name in VERIFIERS:
        table.add(name, label, "extra_memory_max", "MiB", [extra_memory(lambda n=name: work(n))])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("checkpoint", __doc__, repeats=5)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--train-mib", type=int, default=32, help="of the model that trains beside")
    parser.add_argument("--tokens", type=int, default=128, help="of a rank in a training step")
    parser.add_argument("--steps", type=int, default=10, help="of training with nothing beside")
    parser.add_argument("--out", default=tempfile.gettempdir(), help="a folder on the disk to use")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(), torch.no_grad():
        table = Table()
        group = dist.new_group(backend="gloo")
        with shared_folder("checkpoint-", args.out) as out:
            ways = usable(table, args, group, out)
            case = make_case(args.mib, group)
            measure_saves(table, args, case, ways, out)
            measure_starts(table, args, case, ways, out)
            measure_loads(table, args, case, ways, out)
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
