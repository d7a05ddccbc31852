"""Versions in the shared memory of one host, which readers map and do not copy."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator

from torch import Tensor

from shardema.errors import ArgumentError
from shardema.files.safetensors import (
    Entry,
    NewFile,
    close_quietly,
    make_header,
    open_existing,
    reporting,
    write_all,
)
from shardema.publishing.place import LOCK, Place, Reader, current, mapped
from shardema.publishing.publication import CURRENT, Publication, refuse_existing
from shardema.shards.strides import raw_bytes

_MEMORY = "/dev/shm"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class SharedMemorySink:
    """Writes each version to a file of the host's shared memory, ``/dev/shm/shardema-NAME``.

    It holds one version, while another is published two, and those that readers use: a version is
    freed when the last of its readers is done with it. It stays when this process ends, until
    `close` with ``remove=True`` or a restart of the host.

    Args:
        name: letters, digits, ``"."``, ``"_"`` and ``"-"``; the readers are given the same.

    Raises:
        ValueError: another name, or a host without ``/dev/shm``.
    """

    def __init__(self, name: str) -> None:
        self._place = Place(_folder(name))
        self._entries: dict[str, Entry] = {}
        self._hidden = ""  # path of a version that is being written

    def prepare(self, publication: Publication) -> None:
        """Reserves the memory."""
        self._place.open()
        if current(self._place.folder) == publication.version:
            refuse_existing(publication.version, self._place.folder)
        head, self._entries = make_header(publication.headers)
        path = os.path.join(self._place.folder, f".{publication.version}.tmp")
        with reporting(path, "publishing to"):
            with contextlib.suppress(FileNotFoundError):  # of a killed publisher
                os.unlink(path)
            # reserved, since a write to memory that the host does not have kills the process
            self._hidden = path
            with NewFile(path, len(head) + publication.nbytes) as file:
                file.write_at(0, head)

    def write(self, publication: Publication, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Copies the tensors."""
        fd = open_existing(self._hidden, write=True)
        try:
            for name, tensor in tensors:
                with reporting(self._hidden, "publishing to"):
                    write_all(fd, self._entries[name].start, raw_bytes(tensor))
        finally:
            close_quietly(fd)

    def commit(self, publication: Publication) -> None:
        """Renames the link to the new version, and removes the others."""
        folder, version = self._place.folder, publication.version
        with reporting(folder, "publishing to"):
            os.rename(self._hidden, os.path.join(folder, version))
            self._hidden = ""
        self._place.point(version, durable=False)
        with contextlib.suppress(OSError):  # readers have the new version all the same
            for name in set(os.listdir(folder)) - {version, CURRENT, LOCK}:
                os.unlink(os.path.join(folder, name))

    def discard(self, publication: Publication) -> None:
        """Frees what was reserved."""
        hidden, self._hidden = self._hidden, ""
        if hidden:
            with contextlib.suppress(OSError):
                os.unlink(hidden)

    def close(self, *, remove: bool = False) -> None:
        """Lets another publisher write here.

        Args:
            remove: free the memory; readers keep what they have mapped.
        """
        if remove:
            shutil.rmtree(self._place.folder, ignore_errors=True)
        self._place.close()


class SharedMemoryReader(Reader):
    """Reads the newest version that a `SharedMemorySink` of this host has written.

    Args:
        name: as given to the sink, which need not exist yet.
    """

    def __init__(self, name: str) -> None:
        super().__init__(_folder(name))

    def _read(self, path: str) -> dict[str, Tensor]:
        return mapped(path)


def _folder(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ArgumentError(
            f"publishing: got the name {name!r} of shared memory, expected letters, digits, '.', "
            "'_' and '-'"
        )
    if not os.path.isdir(_MEMORY):
        raise ArgumentError(f"publishing: this host has no {_MEMORY}; use a FolderSink")
    return os.path.join(_MEMORY, f"shardema-{name}")
