"""Faults at one of the calls that the library makes to the system, chosen by its number."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shardema

_HOME = str(Path(shardema.__file__).parent)
_DEPTH = 5  # calls of the standard library between the library's and the system's
CHANGING = ("mkdir", "rename", "unlink", "rmdir", "pwrite", "fsync", "posix_fallocate")
CALLS = (
    "open",
    "close",
    "stat",
    "lstat",
    "fstat",
    "mkdir",
    "rename",
    "listdir",
    "scandir",
    "unlink",
    "rmdir",
    "pwrite",
    "preadv",
    "fsync",
    "posix_fallocate",
    "getcwd",
)


def raising(number: int) -> Callable[[], None]:
    """A fault: the system's error of this number."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def killing() -> None:
    """A fault: the process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupting() -> None:
    """A fault: Ctrl-C."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def at_call(number: int, fault: Callable[[], None] | None = None) -> Iterator[list[str]]:
    """Inside, call ``number`` of the library to the system has a fault; none has without one.

    Yields:
        The calls that were made, as ``name path``.
    """
    made: list[str] = []
    real = {name: getattr(os, name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not _is_ours():
                return real[name](*args, **options)
            made.append(f"{name} {_path(args)}")
            if fault is not None and len(made) - 1 == number:
                if name == "close":
                    real[name](*args, **options)  # it is closed, whatever it reports
                fault()
            return real[name](*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name))
    try:
        yield made
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


def _is_ours() -> bool:
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame.f_code.co_filename.startswith(_HOME):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _path(args: tuple[Any, ...]) -> str:
    first = args[0] if args else ""
    if isinstance(first, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{first}")
    return str(first)


def killed(work: Callable[[], object]) -> bool:
    """Whether a child process that does ``work`` ends by SIGKILL; otherwise it ends well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
