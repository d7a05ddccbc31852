"""The log of what the library does to a disk: writes with their bytes, syncs, names made and gone.

A log is a list of events that `disk.Disk` replays. Marks say between which of them a save began and
was acknowledged.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests import faulty


@dataclass(frozen=True)
class Event:
    """One call that changed the disk, or a mark.

    Attributes:
        kind: ``make``, ``write``, ``size``, ``sync``, ``rename``, ``unlink``, ``rmdir``, ``mkdir``
            or ``mark``.
        path: what it was done to; of a mark its words.
        host: whose memory the bytes were in: a sync flushes those of its own host.
        other: the new name of a rename.
    """

    kind: str
    path: str
    at: int = 0
    data: bytes = b""
    other: str = ""
    host: int = 0
    time: int = 0


class Log:
    """Events of one process."""

    def __init__(self, host: int = 0) -> None:
        self.events: list[Event] = []
        self._host = host

    def add(self, kind: str, path: str, **fields: Any) -> None:
        self.events.append(Event(kind, path, host=self._host, time=time.monotonic_ns(), **fields))

    def mark(self, *words: str) -> None:
        """A moment in the life of a save."""
        self.add("mark", " ".join(words))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records the calls that the library makes inside."""
        with faulty.intercepted(self._call):
            yield

    def _call(self, name: str, real: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name in ("rename", "unlink", "rmdir", "mkdir", "open"):
            path = _place(args[0], options.get("dir_fd"))
            there = name == "open" and os.path.lexists(path)
            result = real(*args, **options)
            if name == "rename":
                self.add("rename", path, other=_place(args[1], None))
            elif name != "open":
                self.add(name, path)
            elif args[1] & os.O_CREAT and not there:
                self.add("make", path)
            return result
        if name not in ("pwrite", "fsync", "posix_fallocate"):
            return real(*args, **options)
        path = os.readlink(f"/proc/self/fd/{args[0]}")  # before: the name that it was opened by
        result = real(*args, **options)
        if name == "fsync":
            self.add("sync", path)
        elif name == "pwrite":
            self.add("write", path, at=args[2], data=bytes(args[1])[:result])
        else:
            self.add("size", path, at=args[1] + args[2])
        return result


def _place(path: Any, folder: int | None) -> str:
    name = os.fspath(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name) if folder else name
