"""How fast this machine is: an update in memory, a file in a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardema import kernels
from shardema.files.safetensors import reporting
from shardema.scopes import writable

_NUMEL = 1 << 23  # of the scratch: 64 MiB for both tensors, more than caches hold
_FILE = 64 << 20  # bytes
_REPEATS = 3


@dataclass(frozen=True)
class Speeds:
    """Bytes per second; None where it is not known.

    Attributes:
        memory: read and written by an update.
        link: copied between host and device.
        disk: written to the folder of the checkpoints by all ranks together.
    """

    memory: float | None = None
    link: float | None = None
    disk: float | None = None


def memory_speed(device: torch.device, kernel: str = "auto") -> float:
    """Bytes per second that an update reads and writes on ``device``; takes 64 MiB of it."""
    with writable():
        shadow = torch.zeros(_NUMEL, device=device)
        param = torch.ones(_NUMEL, device=device)
        lerp_ = kernels.find(kernel)([shadow], [param], [0])
        lerp_([0.5])  # the first call may build tables
        seconds = _best(lambda: lerp_([0.5]), device)
    return (2 * shadow.nbytes + param.nbytes) / seconds


def link_speed(device: torch.device) -> float:
    """Bytes per second of a copy from ``device`` to host memory."""
    with writable():
        source = torch.ones(_NUMEL, device=device)
        target = torch.empty(_NUMEL, pin_memory=device.type == "cuda")
        seconds = _best(lambda: target.copy_(source, non_blocking=True), device)
    return source.nbytes / seconds


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def disk_speed(folder: str | os.PathLike[str]) -> tuple[float, float]:
    """Bytes per second written to and read from a new file in ``folder``, which is removed.

    The write includes the sync to the disk. Before the read the file is dropped from the page
    cache, where the system can do that.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = os.path.join(os.fspath(folder), f".shardema-speed-{secrets.token_hex(8)}")
    data = secrets.token_bytes(1 << 20)
    with reporting(path, "measuring the speed of"):
        try:
            wrote = _write(path, data)
            read = _read(path, len(data))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    return _FILE / wrote, _FILE / read


def _write(path: str, data: bytes) -> float:
    start = time.perf_counter()
    with open(path, "xb", buffering=0) as file:
        for _ in range(_FILE // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _read(path: str, size: int) -> float:
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        while file.read(size):
            pass
        return time.perf_counter() - start
