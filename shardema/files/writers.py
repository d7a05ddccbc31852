"""Which process writes, told so that a later one can find out whether it still runs.

A process is known to have ended only on its own machine: by boot, namespace of process ids, id and
start time together, which no later process has again. Elsewhere nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

_BOOT = "/proc/sys/kernel/random/boot_id"


def this_process() -> dict[str, Any]:
    """What tells this process from all others, as JSON; ``host`` is for people."""
    pid = os.getpid()
    return {"host": socket.gethostname(), **_machine(), "pid": pid, "started": _started(pid)}


def has_ended(writer: dict[str, Any]) -> bool:
    """Whether the process is known to have ended."""
    return _is_here(writer) and not _runs(writer)


def is_running(writer: dict[str, Any]) -> bool:
    """Whether the process is known to run."""
    return _is_here(writer) and _runs(writer)


def _is_here(writer: dict[str, Any]) -> bool:
    machine = _machine()
    known = "" not in machine.values() and type(writer.get("pid")) is int
    return known and all(writer.get(key) == value for key, value in machine.items())


def _machine() -> dict[str, str]:
    """This boot of this machine, and the namespace of process ids; "" without /proc."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        with open(_BOOT) as file:
            boot = file.read().strip()
    return {"boot": boot, "namespace": namespace}


def _runs(writer: dict[str, Any]) -> bool:
    try:
        os.kill(writer["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return _started(writer["pid"]) in ("", writer.get("started"))


def _started(pid: int) -> str:
    """When a process began, in clock ticks since the boot; "" where that cannot be read."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # a name may have spaces and brackets
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
