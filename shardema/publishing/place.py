"""A folder with versions and a link to the newest one, and reading it.

::

    folder/
        .lock                  held with flock by the publisher that writes here
        .41.3f2a9c10.tmp       being written
        40                     a version: a folder of an export, or a file
        current -> 40          renamed over the old link: a reader finds 40 or what was before it

A version does not change once it has its name, so who follows the link once reads one version.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import mmap
import os
import time

import torch
from torch import Tensor

from shardema.errors import CheckpointError, linked
from shardema.files.locks import lock
from shardema.files.safetensors import (
    close_quietly,
    is_file_name,
    opened,
    read_header,
    reporting,
    sync_path,
)
from shardema.publishing.publication import CURRENT, Version

LOCK = ".lock"
_NEW_LINK = f".{CURRENT}.tmp"
_LOOK = 0.01  # seconds between two looks at the link


class Place:
    """The folder as its one writer has it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._lock = -1

    def open(self) -> None:
        """Creates the folder if needed and locks it; raises CheckpointError if another one has."""
        if self._lock >= 0:
            return
        with reporting(self.folder, "publishing to"):
            os.makedirs(self.folder, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(os.path.join(self.folder, LOCK), flags, 0o666)
        if not lock(fd):
            close_quietly(fd)
            raise CheckpointError(
                f"publishing to {self.folder}: another publisher writes to it; give each run a "
                "place of its own, or close() the other sink first",
                path=self.folder,
            )
        self._lock = fd

    def point(self, version: str, *, durable: bool) -> None:
        """Renames the link, so that it leads to a version that is complete.

        Args:
            durable: sync the folder, so that the link survives a power failure.

        Raises:
            CheckpointError: a system call failed; the link leads to where it led before.
        """
        before = current(self.folder)
        with reporting(self.folder, "publishing to"):
            self._lead_to(version)
            try:
                if durable:
                    sync_path(self.folder)
            except OSError:
                if before is None:
                    os.unlink(os.path.join(self.folder, CURRENT))
                else:
                    self._lead_to(before)
                raise

    def _lead_to(self, version: str) -> None:
        new = os.path.join(self.folder, _NEW_LINK)
        with contextlib.suppress(FileNotFoundError):  # of a killed publisher
            os.unlink(new)
        os.symlink(version, new)
        os.rename(new, os.path.join(self.folder, CURRENT))

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock >= 0:
            close_quietly(self._lock)
            self._lock = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # its constructor raised
            self.close()


class Reader(abc.ABC):
    """Reads the newest version of a folder that a publisher writes to.

    Attributes:
        folder: need not exist yet.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @property
    def version(self) -> str | None:
        """The newest version; None if there is none yet."""
        return current(self.folder)

    def latest(self, after: str | None = None) -> Version | None:
        """The newest version; None if there is none, or if it is ``after``.

        Its tensors are pages of its files, which are read when they are used and stay what they
        are when the version is removed; what is written into a tensor is seen by this process only.

        Raises:
            CheckpointError: its files are damaged.
        """
        while True:
            version = self.version
            if version is None or version == after:
                return None
            try:
                return Version(version, self._read(os.path.join(self.folder, version)))
            except CheckpointError as error:
                # removed by the publisher, who has published another one since
                if error.errno != errno.ENOENT or self.version == version:
                    raise

    def wait(self, after: str | None = None, timeout: float = 300.0) -> Version:
        """`latest`, once there is one.

        Raises:
            TimeoutError: there was none within ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while (found := self.latest(after)) is None:
            if time.monotonic() >= end:
                than = "" if after is None else f" other than {after!r}"
                raise linked(
                    TimeoutError(
                        f"{self.folder}: no version{than} was published within {timeout:g} s"
                    )
                )
            time.sleep(_LOOK)
        return found

    @abc.abstractmethod
    def _read(self, path: str) -> dict[str, Tensor]:
        """The tensors of a version. Raises CheckpointError, with ENOENT if it was removed."""


def current(folder: str) -> str | None:
    """The version that the link leads to. Raises CheckpointError if it is no such link."""
    path = os.path.join(folder, CURRENT)
    try:
        with reporting(path, "reading"):
            target = os.readlink(path)
    except CheckpointError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    if not is_file_name(target) or target in (".", ".."):
        raise CheckpointError(f"reading {path}: it leads out of the folder", path=path)
    return target


def mapped(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its pages, copied when they are written to."""
    with opened(path) as fd:
        entries = read_header(fd, path)
        pages = mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_COPY)
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    return {
        name: flat[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.shape)
        for name, entry in entries.items()
    }
