"""Objects in a store that fsspec opens by ``scheme://``: reading, writing and removing them.

fsspec and the store's package are imported when the first such URL is used, and never for a local
path. Retries are theirs. Whatever the store raises, or does not answer in time, is a
CheckpointError here. A multi-part upload that fails is aborted, so a store has whole objects only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, TypeVar

from shardema.errors import ArgumentError, CheckpointError
from shardema.ranks.deadline import Task

_URL = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.:_-]*://")
PART_BYTES = 32 << 20  # bytes of a part of an upload, which stays in memory until it is sent
_MOST_PARTS = 9_000  # stores take 10,000
_CLEANING_S = 5.0  # seconds for what is done after an error
_patience: ContextVar[float] = ContextVar("patience", default=150.0)

_T = TypeVar("_T")


def is_remote(path: str) -> bool:
    """Whether it is a URL. Only for what `any_path` has checked."""
    return _URL.match(path) is not None


@contextlib.contextmanager
def patience(timeout: float) -> Iterator[None]:
    """How long one call to a store may take: less than the other ranks wait for this one."""
    token = _patience.set(timeout / 2)
    try:
        yield
    finally:
        _patience.reset(token)


def check_scheme(op: str, url: str, *, package: bool = True) -> None:
    """Raises ValueError unless fsspec has a scheme like that of ``url``, with its package.

    Args:
        package: also look whether the package is installed, which may differ between ranks.
    """
    scheme, _, rest = url.partition("://")
    if "::" in url or scheme in ("file", "local") or not rest.strip("/"):
        raise ArgumentError(
            f"{op}: got {url!r}, expected the URL of one store and a folder in it, such as "
            "s3://bucket/folder, or a local path"
        )
    try:
        from fsspec.registry import get_filesystem_class

        get_filesystem_class(scheme)
    except ImportError as error:
        if not package:
            return
        raise ArgumentError(
            f"{op}: got {url!r}: a package for {scheme}:// is missing: {error}; install it on "
            "every host"
        ) from error
    except ValueError as error:
        raise ArgumentError(
            f"{op}: got {url!r}: fsspec has no scheme {scheme!r}; give one that it has, such as "
            "s3, gs, az or hf, or a local path"
        ) from error


def _ask(url: str, doing: str, call: Callable[[Any, str], _T], seconds: float | None = None) -> _T:
    """``call(file system, path)``; all that goes wrong in it is a CheckpointError."""
    limit = _patience.get() if seconds is None else seconds
    try:
        from fsspec.core import url_to_fs

        # fsspec keeps one for each process and thread; what it keeps of listings would be stale
        store, path = url_to_fs(url, use_listings_cache=False)
        task = Task(lambda: call(store, path))
        if not task.done(limit):
            raise TimeoutError(errno.ETIMEDOUT, f"the store has not answered for {limit:g} s")
        return task.result()
    except CheckpointError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        for kind, known in ((FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)):
            if isinstance(error, kind):
                number, text = known, os.strerror(known)
        raise CheckpointError(f"{doing} {url}: {text}", path=url, errno=number) from error


def size_of(url: str) -> int:
    """Bytes of an object.

    Raises:
        CheckpointError: there is none, with ``errno.ENOENT``, or it cannot be told.
    """

    def ask(store: Any, path: str) -> int:
        store.invalidate_cache()
        found = store.info(path)
        if found["type"] != "file":
            raise FileNotFoundError
        return int(found["size"])

    return _ask(url, "reading", ask)


def exists(url: str) -> bool:
    """Whether there is an object of this name."""
    try:
        size_of(url)
    except CheckpointError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def entries(url: str) -> dict[str, int | None]:
    """Names and sizes of what is in a folder; folders in it have none. Empty if there is none."""

    def ask(store: Any, path: str) -> dict[str, int | None]:
        store.invalidate_cache()
        try:
            listed = store.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        found = {}
        for entry in listed:
            place, _, name = entry["name"].rstrip("/").rpartition("/")
            if place.strip("/") == path.strip("/") and name:  # not the folder, or an object itself
                found[name] = int(entry["size"]) if entry["type"] == "file" else None
        return found

    return _ask(url, "reading", ask)


def tree(url: str) -> list[str]:
    """The objects in a folder and in the folders in it, by their paths below ``url``."""

    def ask(store: Any, path: str) -> list[str]:
        store.invalidate_cache()
        begin = f"{path.strip('/')}/"
        names = (name.strip("/") for name in store.find(path))
        return sorted(name.removeprefix(begin) for name in names if name.startswith(begin))

    return _ask(url, "reading", ask)


def modified(url: str) -> datetime | None:
    """When an object was written, by the store's clock; None if the store does not say."""

    def ask(store: Any, path: str) -> datetime | None:
        try:
            found: datetime | None = store.modified(path)
        except (NotImplementedError, FileNotFoundError):
            return None
        return found

    return _ask(url, "reading", ask)


def read_at(url: str, offset: int, size: int) -> bytearray:
    """``size`` bytes of an object from ``offset``.

    Raises:
        CheckpointError: it ends before.
    """
    if not size:
        return bytearray()
    end = offset + size
    data = _ask(url, "reading", lambda store, path: store.cat_file(path, start=offset, end=end))
    if len(data) != size:
        raise CheckpointError(
            f"reading {url}: it ends at byte {offset + len(data)}, expected {end} or "
            "more: the file was cut short",
            path=url,
        )
    return bytearray(data)


def put(url: str, data: bytes) -> None:
    """Makes or replaces an object: there is the old one, or the whole new one."""
    _ask(url, "writing", lambda store, path: store.pipe_file(path, data))


def delete(url: str, *, folder: bool = False, seconds: float | None = None) -> None:
    """Removes an object, or a folder with all that is in it; one that is gone is no error.

    Args:
        seconds: how long it may take; else as `patience` says.
    """

    def ask(store: Any, path: str) -> None:
        store.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            store.rm(path, recursive=folder)

    _ask(url, "removing", ask, seconds)


def remove(url: str, *, folder: bool = False) -> None:
    """`delete`, if that can be done soon."""
    with contextlib.suppress(CheckpointError):
        delete(url, folder=folder, seconds=_CLEANING_S)


class NewObject:
    """An object that is written from its first byte to its last, and is there after `sync`.

    Args:
        url: where.
        size: its bytes, or more.
    """

    def __init__(self, url: str, size: int) -> None:
        self.path = url
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        self._file = _ask(
            url, "writing", lambda store, path: store.open(path, "wb", block_size=part)
        )
        self._written = 0
        self._synced = False

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Writes ``data`` behind what was written."""
        assert offset == self._written, (offset, self._written)
        _ask(self.path, "writing", lambda store, path: self._file.write(data))
        self._written += len(data)

    def sync(self) -> None:
        """Returns when the store has the object."""
        _ask(self.path, "writing", lambda store, path: self._file.close())
        self._synced = True

    def __enter__(self) -> NewObject:
        return self

    def __exit__(self, *_: object) -> None:
        if self._synced:
            return
        with contextlib.suppress(AttributeError):  # of files in memory
            self._file.closed = True  # else its destructor would complete the upload
        with contextlib.suppress(CheckpointError):
            _ask(self.path, "removing", lambda store, path: self._file.discard(), _CLEANING_S)
