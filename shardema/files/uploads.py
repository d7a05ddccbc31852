"""Safetensors files that go into a store, each tensor by tensor, from first byte to last."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shardema.files.remote import NewObject
from shardema.files.safetensors import Entry
from shardema.shards.boxes import split_box, whole
from shardema.shards.strides import raw_bytes

_CHUNK = 4 << 20  # bytes that are converted at a time


class Uploads:
    """Writes one file after the other; one that is not complete at the end is aborted.

    Args:
        done: told the number of bytes after each chunk.
    """

    def __init__(self, done: Callable[[int], object]) -> None:
        self._done = done
        self._file: NewObject | None = None

    def write(self, path: str, size: int, head: bytes, entry: Entry, values: Tensor) -> None:
        """Writes the next tensor ``[*shape]`` of the file at ``path``, in the file's order."""
        if self._file is None or self._file.path != path:
            self.sync()
            self._file = NewObject(path, size)
            self._file.write_at(0, head)
        at = entry.start
        for box in whole(entry.shape):
            for part in split_box(box, _CHUNK // entry.dtype.itemsize):
                chunk = part.view(values).to(device="cpu", dtype=entry.dtype)
                data = raw_bytes(chunk)
                self._file.write_at(at, data)
                at += len(data)
                self._done(len(data))

    def sync(self) -> None:
        """Returns when the store has all files."""
        if self._file is not None:
            self._file.sync()
            self._file = None

    def __enter__(self) -> Uploads:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.__exit__(*error)
