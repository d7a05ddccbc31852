"""Files that are either whole or not there, and the safetensors layout.

Everything is written with pwrite into space that was reserved before (never through mmap, where
a full disk kills the process), synced, and renamed into place by the caller. Files are opened
only if they are regular files, never through a symlink.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardema.errors import CheckpointError
from shardema.shard import Dims

# In the order of the safetensors format: tensors are laid out from the last dtype to the first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
MAX_NUMBER = 1 << 53  # no count, size or offset in a file of ours is larger


@contextlib.contextmanager
def reporting(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turns an OSError into a CheckpointError that says what was done to which path."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise CheckpointError(
            f"{doing} {name}: {error.strerror or error}", path=str(name), errno=error.errno
        ) from error


class NewFile:
    """A file that must not exist yet, with its space reserved.

    Args:
        path: where; its folder must exist.
        size: bytes to reserve, so that a full disk shows before the first byte is written.
    """

    def __init__(self, path: str, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.path = path
        self._fd = os.open(path, flags, 0o666)
        try:
            _reserve(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise

    def write_at(self, offset: int, data: memoryview | bytes) -> None:
        """Writes all of ``data`` at ``offset``."""
        write_all(self._fd, offset, data)

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _reserve(fd: int, size: int) -> None:
    if size == 0:
        return
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(fd, size)
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def write_all(fd: int, offset: int, data: memoryview | bytes) -> None:
    """pwrite, until all bytes are written."""
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[n:], offset + n


def write_file(path: str, data: bytes) -> None:
    """A new file with these bytes, synced."""
    with NewFile(path, len(data)) as file:
        file.write_at(0, data)
        file.sync()


def open_existing(path: str, *, write: bool = False) -> int:
    """A descriptor of a regular file; a FIFO, device, folder or symlink is refused.

    Raises:
        CheckpointError: it is not a regular file, or it cannot be opened.
    """
    mode = os.O_RDWR if write else os.O_RDONLY
    with reporting(path, "opening"):
        # O_NONBLOCK: opening a FIFO would wait for a writer
        fd = os.open(path, mode | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"opening {path}: not a regular file", path=path)
    return fd


def read_at(fd: int, offset: int, size: int, path: str) -> bytearray:
    """``size`` bytes from ``offset``.

    Raises:
        CheckpointError: the file ends before.
    """
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    with reporting(path, "reading"):
        while done < size:
            n = os.preadv(fd, [view[done:]], offset + done)
            if n == 0:
                raise CheckpointError(
                    f"reading {path}: it ends at byte {offset + done}, expected "
                    f"{offset + size} or more: the file was cut short",
                    path=path,
                )
            done += n
    return data


def read_whole(path: str, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        CheckpointError: it is not one, or it has more than ``limit`` bytes.
    """
    fd = open_existing(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(
                f"reading {path}: {size} bytes, expected at most {limit}", path=path
            )
        return bytes(read_at(fd, 0, size, path))
    finally:
        os.close(fd)


def sync_path(path: str) -> None:
    """Returns when the bytes of a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a safetensors file: ``start`` is its first byte in the file."""

    dtype: torch.dtype
    shape: Dims
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(
    tensors: Sequence[tuple[str, torch.dtype, Dims]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The head of a safetensors file (length and header) and where each tensor lies behind it.

    The same bytes as the safetensors package writes: widest dtype first, then by name.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    for name, dtype, _ in tensors:
        if dtype not in NAMES:
            raise ValueError(
                f"{name}: safetensors has no dtype for {dtype}; give dtype=, or leave the tensor "
                "out of the model's state"
            )
    place = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    order = sorted(tensors, key=lambda t: (-place[t[1]], t[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in order:
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"a safetensors header of {len(text)} bytes is over the format's limit of "
            f"{MAX_HEADER}; give a smaller max_shard_size"
        )
    head = len(text).to_bytes(8, "little") + text
    entries = {
        name: Entry(dtype, shape, len(head) + header[name]["data_offsets"][0])
        for name, dtype, shape in order
    }
    return head, entries


def read_header(fd: int, path: str) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is not a whole safetensors file.
    """
    size = os.fstat(fd).st_size
    length = int.from_bytes(read_at(fd, 0, 8, path), "little") if size >= 8 else MAX_NUMBER
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"reading {path}: not a safetensors file", path=path)
    try:
        header = json.loads(read_at(fd, 8, length, path).decode())
        entries = {}
        for name, value in header.items():
            if name == "__metadata__":
                continue
            start, stop = value["data_offsets"]
            shape = tuple(checked_int(n) for n in value["shape"])
            entry = Entry(DTYPES[value["dtype"]], shape, 8 + length + checked_int(start))
            if entry.start + entry.nbytes != 8 + length + checked_int(stop):
                raise ValueError(f"{name}: offsets do not fit its shape")
            if entry.start + entry.nbytes > size:
                raise ValueError(f"{name}: the file was cut short")
            entries[str(name)] = entry
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"reading {path}: its safetensors header is broken ({error})", path=path
        ) from error
    return entries


# Stems of the safetensors files of a model, as transformers, diffusers and PEFT call them; PEFT
# keeps a further adapter in a folder of its name.
MODEL = "model"
DIFFUSERS = "diffusion_pytorch_model"
ADAPTER = "adapter_model"
WHOLE = (MODEL, DIFFUSERS)
STEM = re.compile(rf"{MODEL}|{DIFFUSERS}|(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?{ADAPTER}")


def checked_int(value: Any) -> int:
    """``value`` if it is a count that can be true.

    Raises:
        ValueError: it is not an integer in [0, 2^53].
    """
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"expected a count, got {value!r}")
    return value
