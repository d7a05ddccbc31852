"""What every benchmark shares: a row, percentiles, and a meter for memory.

::

    values of the repeats  -measured->  Row  -append->  results/<name>.csv

A row names all that a number depends on, so that it can be quoted, and compared with another.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import functools
import gc
import math
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from shardema.kernels.variants import cpu_model

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
_SAMPLE_EVERY = 0.002  # seconds between two looks at the memory
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        commit: of the library; ends in ``+`` where its code was not as committed.
        date: the day, in UTC.
        device: what computed; a row of a CPU never stands for a GPU.
        provider: what was measured; rivals of one case run in one process, interleaved.
        case: the size and kind of the problem.
        metric: what the numbers are; ``fails: why``, ``wrong: why`` or ``missing: how to
            install it`` where there are none.
        p20: 20 % of the repeats were at or below; p50 is the median. Not a number where the
            provider did not run or gave wrong values; the file then has an empty field.
    """

    commit: str
    date: str
    torch: str
    device: str
    world_size: int
    provider: str
    case: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float


FIELDS = tuple(field.name for field in fields(Row))


def measured(
    values: Sequence[float],
    *,
    provider: str,
    case: str,
    metric: str,
    unit: str,
    device: str,
    world_size: int,
) -> Row:
    """The row of what the repeats gave.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    return Row(
        commit(),
        today(),
        torch.__version__,
        device,
        world_size,
        provider,
        case,
        metric,
        unit,
        *percentiles(values),
    )


def unmeasured(why: str, *, provider: str, case: str, device: str, world_size: int) -> Row:
    """The row of a provider that gave no number; see `Row.metric`."""
    start = (commit(), today(), torch.__version__, device, world_size, provider, case)
    return Row(*start, " ".join(why.split()), "", math.nan, math.nan, math.nan)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, interpolated linearly.

    Raises:
        ValueError: no value, or one that is not finite.

    >>> percentiles([3.0, 1.0, 2.0])
    (1.4, 2.0, 2.6)
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"percentiles: got {values!r}, expected finite numbers, one or more")
    p20, p50, p80 = (float(f"{p:.4g}") for p in np.percentile(values, (20, 50, 80)))
    return p20, p50, p80


def append(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file; a new file gets the header first.

    Raises:
        ValueError: the file has other columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="ascii") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header is not None and tuple(header) != FIELDS:
            raise ValueError(f"{path}: got columns {header}, expected {list(FIELDS)}")
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if header is None:
            writer.writeheader()
        for row in rows:
            cells = asdict(row)
            blank = {key: "" for key, value in cells.items() if value != value}
            writer.writerow(cells | blank)


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a CSV file, the oldest first.

    Raises:
        ValueError: the file has other columns.
    """
    with open(path, newline="", encoding="ascii") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path}: got columns {lines.fieldnames}, expected {list(FIELDS)}")
        return [_row(line) for line in lines]


def _row(line: dict[str, str]) -> Row:
    numbers = {key: float(line[key] or "nan") for key in ("p20", "p50", "p80")}
    return Row(**{**line, **numbers, "world_size": int(line["world_size"])})  # type: ignore[arg-type]


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each figure that was measured several times the last one."""
    last = {}
    for row in rows:
        key = (row.device, row.world_size, row.case, row.provider, row.metric)
        last.pop(key, None)  # so that it takes its place at the end
        last[key] = row
    return list(last.values())


def today() -> str:
    """The day, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


@functools.cache
def commit() -> str:
    """The commit that the library is at, with a ``+`` if its code was changed since."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--", "shardema") else head or "?"


def _git(*words: str) -> str:
    command = ["git", "-C", str(HERE.parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):  # an unpacked archive, or no git
        return ""
    return done.stdout.strip()


def device_name() -> str:
    """The GPU, if this process uses one, else the processor."""
    if not torch.cuda.is_initialized():
        return cpu_name()
    return f"cuda ({torch.cuda.get_device_name()}, {torch.cuda.device_count()} of them)"


def cpu_name() -> str:
    """The processor and its cores that this process may use: ``cpu (Some CPU, 2 cores)``."""
    return f"cpu ({cpu_model()}, {len(os.sched_getaffinity(0))} cores)"


class PeakMemory:
    """How far the resident memory of this process rose above where it was, inside a block.

    Two meters, the larger counts: a thread that looks every 2 ms, and where Linux allows it to be
    reset the kernel's own high-water mark, which also sees what happens while the interpreter
    lock is held. Memory that was freed before the block is handed back to the system first, or
    it would be used again unseen.

    Attributes:
        extra: bytes above the start, after the block.
    """

    def __init__(self) -> None:
        self.extra = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not glibc: then it may hold some back
            ctypes.CDLL(None).malloc_trim(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._base = self._peak = 0
        self._thread.start()
        self._resets = _reset_high_water()
        self._base = self._peak = _resident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        marks = [self._peak, _resident(), _high_water() if self._resets else 0]
        self.extra = max(marks) - self._base

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _resident())
            time.sleep(_SAMPLE_EVERY)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


def _reset_high_water() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))
