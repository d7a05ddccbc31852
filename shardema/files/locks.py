"""Folders that are locked while somebody writes to them, so that what a killed writer left is told.

The kernel releases a lock when its process ends, however it ends, so nothing here depends on
clocks, process ids or host names.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator

from shardema.files.safetensors import close_quietly

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_PAUSE = 0.001  # seconds
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY


def lock(fd: int) -> bool:
    """Locks an open file or folder until it is closed; False if it is locked already.

    True on a file system without locks (some network ones), where a second writer is not detected.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def make_locked(path: str) -> int:
    """Creates a folder; it is locked until the descriptor that is returned is closed.

    Between these two steps another process may take it for what a killed writer left.
    """
    os.mkdir(path)
    while True:
        try:
            fd = os.open(path, _FOLDER)
        except FileNotFoundError:  # it was removed
            os.mkdir(path)
            continue
        try:
            if lock(fd) and os.path.lexists(path):
                return fd
        except BaseException:
            close_quietly(fd)
            raise
        close_quietly(fd)
        time.sleep(_PAUSE)  # it is being removed


@contextlib.contextmanager
def abandoned(path: str) -> Iterator[bool]:
    """Whether the writer of a folder has ended; inside the block nobody else takes the lock.

    False where that is unknown: on a file system without locks.
    """
    try:
        fd = os.open(path, _FOLDER)
    except OSError:
        yield False
        return
    try:
        yield _locks(fd)
    finally:
        close_quietly(fd)


def _locks(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
