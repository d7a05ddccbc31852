"""The fastest variant of the compiled CPU kernel: measured once on each host, and kept in a file.

All variants give the same bits. Which is fastest depends on the host: on one, prefetching saves a
tenth of the time, and on another it costs a quarter. Streaming stores are not among them: the
line that they would write past the caches has just been read (``benchmarks/triads.py`` has them).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """How the kernel goes through memory.

    Attributes:
        ahead: how many elements ahead it prefetches; 0: not at all.
        block: how many elements of a parameter its averages, if it has several, are moved by before
            the next ones are read.
        width: bits of its vectors, where the CPU has 512 and nothing is rounded at random.
    """

    ahead: int = 0
    block: int = 1024
    width: int = 256


DEFAULT = Variant()
VARIANTS = tuple(
    Variant(ahead, block, width)
    for ahead in (0, 512)
    for block in (512, 1024, 4096)
    for width in (256, 512)
)


def fastest(library: Path, threads: int, measure: Callable[[], dict[Variant, float]]) -> Variant:
    """That of the file beside ``library``; without one, what ``measure`` finds, in seconds."""
    path = file_of(library, threads)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = Variant(**json.loads(path.read_text())["variant"])
        if kept in VARIANTS:
            return kept
    times = measure()
    best = min(times, key=lambda variant: times[variant])
    log.info("the fastest variant of %s with %d threads is %s", library.name, threads, best)
    found = {
        "cpu": cpu_model(),
        "threads": threads,
        "variant": asdict(best),
        "measured": [{**asdict(one), "ms": round(1000 * s, 3)} for one, s in times.items()],
    }
    with contextlib.suppress(OSError):  # a folder that is read only: it is measured each time
        _write(path, json.dumps(found, indent=1) + "\n")
    return best


def file_of(library: Path, threads: int) -> Path:
    """Where the variant of this CPU is kept: hosts of several kinds may share a home directory."""
    of = hashlib.sha256(cpu_model().encode()).hexdigest()[:8]
    return library.with_name(f"{library.stem}-{of}-{threads}.json")


def cpu_model() -> str:
    """The name of the processor."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _write(path: Path, text: str) -> None:
    """Creates a file whole: other ranks may read it at the same time."""
    descriptor, temporary = tempfile.mkstemp(prefix=".variant-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
