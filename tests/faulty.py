"""Faults at one of the calls that the library makes to the system, chosen by its number."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shardema

_HOME = str(Path(shardema.__file__).parent)
_DEPTH = 5  # calls of the standard library between the library's and the system's
CHANGING = ("mkdir", "rename", "unlink", "rmdir", "symlink", "pwrite", "fsync", "posix_fallocate")
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
    "symlink",
    "pwrite",
    "preadv",
    "fsync",
    "posix_fallocate",
    "getcwd",
    "flock",
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


Instead = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def intercepted(instead: Instead) -> Iterator[None]:
    """Inside, ``instead(name, real, args, options)`` is what the library's calls come to."""
    homes = {name: fcntl if name == "flock" else os for name in CALLS}
    real = {name: getattr(homes[name], name) for name in CALLS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not _is_ours():
                return real[name](*args, **options)
            return instead(name, real[name], args, options)

        return call

    for name in CALLS:
        setattr(homes[name], name, wrapped(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(homes[name], name, real[name])


@contextlib.contextmanager
def at_call(
    number: int,
    fault: Callable[[], None] | None = None,
    *,
    sticky: bool = False,
    closes: bool = True,
) -> Iterator[list[str]]:
    """Inside, call ``number`` of the library to the system has a fault; none has without one.

    Args:
        sticky: so have all later ones.
        closes: a close that has a fault has closed its file all the same.

    Yields:
        The calls that were made, as ``name path``.
    """
    made: list[str] = []

    def instead(name: str, real: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        made.append(f"{name} {_path(args)}")
        at = len(made) - 1
        if fault is not None and (at == number or (sticky and at > number)):
            if name == "close" and closes:
                real(*args, **options)
            fault()
        return real(*args, **options)

    with intercepted(instead):
        yield made


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
