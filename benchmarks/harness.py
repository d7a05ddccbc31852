"""The one way that all benchmarks measure: every provider in the same processes, turn by turn.

::

    turn 1    a  b  c       a barrier before each run, so that the ranks' traffic coincides
    turn 2    b  c  a       a slow moment of a shared machine hits all alike
    turn 3    c  a  b       a ratio is of two runs of one turn

What was measured goes to a `Table`, which makes the rows; `finish` appends them to the CSV file and
compares them with the benchmark's targets.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import distributed as dist

from rows import HERE, Row, append, device_name, measured, unmeasured

sys.path.insert(1, str(HERE.parent))  # the tests' meters, which are shown to fire there

from tests import meters

_LEAST = 0.005  # seconds: what is shorter is repeated inside a turn
_MOST_CALLS = 200  # in a turn


# ---- ranks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def world(device: str = "cpu") -> Iterator[None]:
    """The process group that is there or that torchrun asks for, or one of a single rank."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    # ranks share the cores; beside a GPU each has its part of them, for averages in host memory
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, share) if device == "cuda" else 1)
    if dist.is_initialized():
        yield
        return
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code.

    DTensor's caches keep the group, and with it gloo's threads, past destroy_process_group; one
    that frees a tensor while the interpreter shuts down can abort it, as can those of DCP.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def shared_folder(prefix: str, parent: str) -> Iterator[Path]:
    """A new folder in ``parent`` that all ranks use; the first one removes it. Collective."""
    told = [tempfile.mkdtemp(prefix=prefix, dir=parent) if rank() == 0 else ""]
    dist.broadcast_object_list(told)
    try:
        yield Path(told[0])
    finally:
        if rank() == 0:
            shutil.rmtree(told[0], ignore_errors=True)


def rank() -> int:
    """This process among the ranks; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def everywhere(value: Any) -> list[Any]:
    """The value of every rank, in order."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    dist.barrier()
    if rank() == 0:
        for path in files_in(folder):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dist.barrier()


def say(text: str) -> None:
    """Prints on the first rank."""
    if rank() == 0:
        print(text, flush=True)


def settle() -> None:
    """Waits for the GPU, if this process uses one: until then its work is only queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def allocated(call: Callable[[], object], device: str) -> int:
    """Bytes of tensors that a call allocates there, after a first call."""
    return (meters.bytes_on_gpu if device == "cuda" else meters.allocated)(call)


def peak(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that a call holds there at a time, beyond those before it."""
    return (meters.peak_on_gpu if device == "cuda" else meters.peak)(call)


# ---- measuring --------------------------------------------------------------------------------


def turns(names: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Turn and name of every run: each turn begins one name later than the one before."""
    for turn in range(repeats):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            yield turn, name


def clock(
    providers: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    calls: int | None = None,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of one call of each provider in each turn, on the rank that took longest.

    Args:
        providers: what to call; all ranks call the same.
        calls: how often a provider is called in a turn; None: until 5 ms have passed.
        warm_up: calls beforehand.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    many: dict[str, int] = {}
    for name, call in providers.items():
        for _ in range(warm_up):
            call()
        settle()
        dist.barrier()
        start = time.perf_counter()
        call()
        settle()
        slowest = max(everywhere(time.perf_counter() - start))
        many[name] = calls or min(_MOST_CALLS, max(1, math.ceil(_LEAST / slowest)))
    gc.collect()
    gc.disable()
    try:
        for _, name in turns(list(providers), repeats):
            call, n = providers[name], many[name]
            dist.barrier()
            start = time.perf_counter()
            for _ in range(n):
                call()
            settle()
            times[name].append((time.perf_counter() - start) / n)
    finally:
        gc.enable()
    told = everywhere(times)
    return {
        name: [max(turn) for turn in zip(*(theirs[name] for theirs in told), strict=True)]
        for name in providers
    }


class Missing(Exception):
    """A library that is not installed, and how to install it."""


def attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """What ``work`` returned, or why it failed on some rank.

    ``fails: the error's first line``, or ``missing: how to install it``.
    """
    result, why, printed = None, "", io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            result = work()
    except Missing as error:
        why = f"missing: {error}"
    except (Exception, SystemExit) as error:  # ema-pytorch prints, and ends the process
        ends = isinstance(error, SystemExit)
        text = (printed.getvalue() if ends else str(error)).strip().partition("\n")[0]
        why = f"fails: {type(error).__name__}: {text}"
    told = next((text for text in everywhere(why) if text), "")
    return (None, told) if told else (result, "")


# ---- rows -------------------------------------------------------------------------------------


@dataclass
class Table:
    """The rows of a run, as they come."""

    rows: list[Row] = field(default_factory=list)
    device: str = field(default_factory=device_name)
    world_size: int = field(default_factory=ranks)

    def add(
        self, provider: str, case: str, metric: str, unit: str, values: Sequence[float]
    ) -> None:
        """A row of what the turns gave."""
        what = {"provider": provider, "case": case, "metric": metric, "unit": unit}
        where = {"device": self.device, "world_size": self.world_size}
        self.rows.append(measured(values, **what, **where))  # type: ignore[arg-type]

    def add_times(
        self,
        times: Mapping[str, Sequence[float]],
        case: str,
        *,
        unit: Literal["s", "ms"] = "ms",
        to: Sequence[str] = (),
    ) -> None:
        """For each provider a row of its time, and of its ratio to each provider of ``to``."""
        scale = {"s": 1, "ms": 1000}[unit]
        for name, seconds in times.items():
            self.add(name, case, "time", unit, [s * scale for s in seconds])
            for other in to:
                if other in times and other != name:
                    self.add(name, case, f"time_to_{other}", "ratio", ratio(seconds, times[other]))

    def lacks(self, provider: str, case: str, why: str) -> None:
        """A row of a provider that gave no number, and a line that says so."""
        say(f"{provider}, {case}: {why}")
        where = {"device": self.device, "world_size": self.world_size}
        self.rows.append(unmeasured(why, provider=provider, case=case, **where))  # type: ignore[arg-type]


def ratio(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Turn by turn, one time over the other."""
    return [a / b for a, b in zip(times, others, strict=True)]


@dataclass(frozen=True)
class Target:
    """What a row must show.

    Attributes:
        provider, case: regular expressions that must match in full.
        most: the median must not be above it.
        least: nor below it.
    """

    provider: str
    case: str
    metric: str
    most: float = math.inf
    least: float = -math.inf

    def judge(self, row: Row) -> str:
        """``met: ...`` or ``MISSED: ...``; empty if the row is not meant."""
        meant = (
            row.metric == self.metric
            and re.fullmatch(self.provider, row.provider)
            and re.fullmatch(self.case, row.case)
        )
        if not meant:
            return ""
        bounds = [f"at most {self.most:g}"] * (self.most < math.inf)
        bounds += [f"at least {self.least:g}"] * (self.least > -math.inf)
        word = "met" if self.least <= row.p50 <= self.most else "MISSED"
        return (
            f"{word}: {row.provider}, {row.case}: {row.metric} {row.p50:g} {row.unit}, "
            f"expected {' and '.join(bounds)}"
        )


def arguments(
    name: str, doc: str | None, repeats: int = 0, *, on_gpu: bool = False
) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take; without ``repeats`` it measures once.

    Args:
        on_gpu: the benchmark has ``--device``.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if repeats:
        parser.add_argument(
            "--repeats", type=_positive, default=repeats, help="turns of all providers"
        )
    if on_gpu:
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the model")
    where = HERE / "results" / f"{name}.csv"
    parser.add_argument("--results", type=Path, default=where, help="CSV of rows")
    parser.add_argument(
        "--check", action="store_true", default=False, help="fail where a target is missed"
    )
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return int(text)


def number(text: str) -> int:
    """A whole number; ``Ki`` and ``Mi`` are 1024 and 1024 * 1024 of them."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|)", text)
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number such as 2000 or 64Ki")
    return int(found[1]) * {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}[found[2]]


def short(number: int) -> str:
    """As `number` reads it: ``64Ki``."""
    for word, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if number % size == 0:
            return f"{number // size}{word}"
    return str(number)


def finish(table: Table, args: argparse.Namespace, targets: Sequence[Target] = ()) -> int:
    """Prints and appends the rows on the first rank, judges them, returns the exit code."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        figures = cases.setdefault((row.case, row.provider), [])
        figures.append(f"{row.metric} {row.p50:g} {row.unit}" if row.unit else row.metric)
    for (case, provider), figures in cases.items():
        say(f"{case:32} {provider:20} {'; '.join(figures)}")
    if rank() == 0:
        append(args.results, table.rows)
    words = [word for target in targets for row in table.rows if (word := target.judge(row))]
    for word in words:
        say(word)
    missed = any(word.startswith("MISSED") for word in words)
    return everywhere(int(missed and args.check))[0]
