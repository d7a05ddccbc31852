"""Files to read and to write, each on a local disk or in a store: the only place that asks which.

Local paths are opened by the system's own calls, see `safetensors`; URLs by fsspec, see `remote`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from shardema.errors import CheckpointError
from shardema.files import remote, safetensors
from shardema.files.remote import is_remote
from shardema.files.safetensors import Entry, NewFile, parse_header, reporting


def any_path(op: str, path: str | os.PathLike[str], *, package: bool = True) -> str:
    """A local path as by `local_path`, or the URL of a folder in a store.

    Args:
        package: as for `remote.check_scheme`.

    Raises:
        ValueError: it is empty, or a URL that cannot be used here.
        TypeError: it is no path.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, str) and is_remote(text) and not text.lower().startswith("file:"):
        remote.check_scheme(op, text, package=package)
        return text.rstrip("/")
    return safetensors.local_path(op, path)


class OpenFile:
    """A file to read from.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str, fd: int | None) -> None:
        self.path = path
        self._fd = fd  # None: in a store

    @property
    def size(self) -> int:
        """Its bytes."""
        return remote.size_of(self.path) if self._fd is None else os.fstat(self._fd).st_size

    def read_at(self, offset: int, size: int) -> bytearray:
        """``size`` bytes from ``offset``.

        Raises:
            CheckpointError: the file ends before.
        """
        if self._fd is None:
            return remote.read_at(self.path, offset, size)
        return safetensors.read_at(self._fd, offset, size, self.path)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills ``view`` with the bytes from ``offset``.

        Raises:
            CheckpointError: the file ends before.
        """
        if self._fd is None:
            view[:] = remote.read_at(self.path, offset, len(view))
        else:
            safetensors.read_into(self._fd, offset, view, self.path)

    def header(self) -> dict[str, Entry]:
        """As `safetensors.read_header`."""
        return parse_header(self.read_at, self.size, self.path)


@contextlib.contextmanager
def reading(path: str, *, follow: bool = False) -> Iterator[OpenFile]:
    """A file to read, closed after it; a local one as by `safetensors.opened`."""
    if is_remote(path):
        yield OpenFile(path, None)
        return
    with safetensors.opened(path, follow=follow) as fd:
        yield OpenFile(path, fd)


def read_whole(path: str, limit: int, *, follow: bool = False, start: bytes = b"") -> bytearray:
    """As `safetensors.read_whole`."""
    if not is_remote(path):
        return safetensors.read_whole(path, limit, follow=follow, start=start)
    size = remote.size_of(path)
    if size > limit:
        raise CheckpointError(f"reading {path}: {size} bytes, expected at most {limit}", path=path)
    return remote.read_at(path, 0, size)


def exists(path: str) -> bool:
    """Whether there is a file of this name, or anything that is no file on a local disk."""
    if is_remote(path):
        return remote.exists(path)
    with reporting(path, "reading"):
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def is_there(path: str) -> bool:
    """Whether there is a file or a folder, or anything else, of this name."""
    if is_remote(path):
        return remote.exists(path) or bool(remote.entries(path))
    return os.path.lexists(path)


def is_file(path: str) -> bool:
    """Whether it is a file and no folder. OSError where a local one is not there."""
    return remote.exists(path) if is_remote(path) else not stat.S_ISDIR(os.stat(path).st_mode)


def names_in(folder: str) -> set[str]:
    """The names in a folder. OSError, or CheckpointError, where there is none."""
    return set(remote.entries(folder)) if is_remote(folder) else set(os.listdir(folder))


def put(path: str, data: bytes) -> None:
    """Makes a file, whole from the moment that it is there. OSError, or CheckpointError."""
    if is_remote(path):
        remote.put(path, data)
        return
    temporary = f"{path}.tmp"
    try:
        safetensors.write_file(temporary, data)
        os.rename(temporary, path)
    except FileExistsError:  # another's
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove(path: str) -> None:
    """Removes a file. OSError, or CheckpointError."""
    if is_remote(path):
        remote.delete(path)
    else:
        os.unlink(path)


def new_file(path: str, size: int) -> NewFile | remote.NewObject:
    """A file that does not exist yet, to be written from its first byte to its last."""
    return remote.NewObject(path, size) if is_remote(path) else NewFile(path, size)
