"""A folder that a server watches: each version is an export, and a link leads to the newest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shardema.errors import ArgumentError, CheckpointError, logger
from shardema.files import export as exporter
from shardema.files.folder import absolute
from shardema.files.locks import lock
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    BROKEN,
    checked_int,
    close_quietly,
    parse_json,
    read_whole,
    reporting,
    write_file,
)
from shardema.files.steps import is_folder, sweep
from shardema.publishing.place import Place, Reader, current, mapped
from shardema.publishing.publication import refuse_existing

log = logger(__name__)

_NOTE = "published.json"  # in the folder of a version
_MAX_NOTE = 10_000  # bytes
_TEMPORARY = re.compile(r"\.[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.[0-9a-f]{8}\.(tmp|old)")


class FolderSink:
    """Exports each version to ``folder/VERSION``, then renames the link ``folder/current`` to it.

    ``from_pretrained(folder/current)`` of the model's library loads the newest version; a server
    that holds a `Watched` reads one that is not removed meanwhile. Every rank writes its own
    shards, as in `ShardedEMA.export`. Each rank needs one, for the same folder.

    Args:
        folder: on a local or network file system; created if needed. One publisher at a time.
        keep: how many versions stay, the newest ones; None keeps all. One that a `Watched` holds
            stays until it does not.
        max_shard_size, mode: as for `ShardedEMA.export`.

    Raises:
        ValueError: a URL of an object store, which has no links; ``keep`` below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 2,
        max_shard_size: int | str = "5GB",
        mode: exporter.Mode = "auto",
    ) -> None:
        self.folder: str = absolute(folder, "publish")
        if is_remote(self.folder):
            raise ArgumentError(
                f"FolderSink: got {self.folder}, expected a folder of a file system: an object "
                "store has no links that are renamed; use ema.export() with a name per version"
            )
        if keep is not None and keep < 1:
            raise ArgumentError(f"FolderSink: got keep={keep}, expected 1 or more, or None")
        self.max_shard_size: int | str = max_shard_size
        self.mode: exporter.Mode = mode
        self._keep = keep
        self._place = Place(self.folder)

    def prepare(self, version: str) -> None:
        """On the first rank: locks the folder, removes what killed publishers left."""
        self._place.open()
        sweep(self.folder, _TEMPORARY)
        numbers = self._numbers()
        shown = numbers.get(current(self.folder) or "", 0)
        for name in [name for name, number in numbers.items() if number > shown]:
            self._remove(name)  # its publisher was killed before the link led to it
        if os.path.lexists(self.path(version)):
            refuse_existing(version, self.folder)

    def path(self, version: str) -> str:
        """Of the folder of a version."""
        return os.path.join(self.folder, version)

    def note(self, version: str, average: str, place: str) -> None:
        """On the first rank: adds to the files of a version what `commit` needs to know of it."""
        number = max(self._numbers().values(), default=0) + 1
        fields = {"version": version, "average": average, "number": number}
        write_file(os.path.join(place, _NOTE), json.dumps(fields).encode())

    def commit(self, version: str) -> None:
        """On the first rank: renames the link, and removes old versions."""
        try:
            self._place.point(version, durable=True)
        except BaseException:
            if current(self.folder) != version:
                self._remove(version)
            raise
        try:
            numbers = self._numbers()
        except CheckpointError as error:  # readers have the new version all the same
            log.warning("%s: old versions are not removed: %s", self.folder, error)
            return
        by_age = sorted(numbers, key=numbers.__getitem__, reverse=True)
        for old in by_age[self._keep :] if self._keep is not None else ():
            if old != version:
                self._remove(old)

    def close(self) -> None:
        """Unlocks the folder, for another publisher."""
        self._place.close()

    def _numbers(self) -> dict[str, int]:
        """The versions here and their places in the order of publishing."""
        numbers = {}
        with reporting(self.folder, "reading"):
            names = [name for name in os.listdir(self.folder) if not name.startswith(".")]
        for name in names:
            path = self.path(name)
            with contextlib.suppress(CheckpointError, *BROKEN):  # a folder of somebody else
                if is_folder(path):
                    found: Any = parse_json(read_whole(os.path.join(path, _NOTE), _MAX_NOTE))
                    numbers[name] = checked_int(found["number"])
        return numbers

    def _remove(self, version: str) -> None:
        """Removes a version, unless a reader holds it."""
        hidden = os.path.join(self.folder, f".{version}.{secrets.token_hex(4)}.old")
        with contextlib.suppress(OSError):
            fd = os.open(self.path(version), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                if lock(fd):  # until it has another name: a reader looks at that once it has locked
                    os.rename(self.path(version), hidden)
                    shutil.rmtree(hidden, ignore_errors=True)
            finally:
                close_quietly(fd)


class Watched(Reader):
    """Reads the newest version of a folder that a `FolderSink` writes to.

    Args:
        folder: as given to the sink; need not exist yet.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(absolute(folder, "publish"))

    @contextlib.contextmanager
    def hold(self) -> Iterator[str | None]:
        """Context manager: the path of the newest version, which stays until the block ends.

        For what reads files itself, such as ``from_pretrained``. None if there is no version yet.
        Where a file system has no locks, the publisher does not see it: let it keep more versions
        than are published in the time of a block.

        Raises:
            CheckpointError: the link leads to a version that is not there.
        """
        path, fd = None, -1
        while fd < 0 and (version := self.version) is not None:
            path = os.path.join(self.folder, version)
            try:
                fd = _held(path)
            except CheckpointError:  # removed, as another version was published since
                if self.version == version:
                    raise
        try:
            yield path
        finally:
            if fd >= 0:
                close_quietly(fd)

    def _read(self, path: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        fd = _held(path)
        try:
            with reporting(path, "reading"):
                files = sorted(_files(path))
            for file in files:
                folder, slash, _ = os.path.relpath(file, path).rpartition("/")
                named = mapped(file).items()  # of a subfolder, such as an adapter's, by its name
                tensors |= {f"{folder}{slash}{name}": value for name, value in named}
        finally:
            close_quietly(fd)
        return tensors


def _files(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder, onerror=_raise):
        yield from (os.path.join(parent, name) for name in names if name.endswith(".safetensors"))


def _raise(error: OSError) -> None:
    raise error


def _held(path: str) -> int:
    """A descriptor with a shared lock on the folder of a version, which stays until it is closed.

    Raises:
        CheckpointError: it was removed, or is about to be; with ENOENT.
    """
    with reporting(path, "reading"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # the publisher is removing it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
            except OSError:  # no locks here
                pass
            if not os.path.samestat(os.fstat(fd), os.stat(path)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        except BaseException:
            close_quietly(fd)
            raise
    return fd
