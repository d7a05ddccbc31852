"""Durable writes, careful reads, and the safetensors format.

Everything is written with pwrite to space that was reserved before (never through mmap, where a
full disk kills the process), synced, and renamed into place by the caller. Only regular files are
opened, and symlinks followed only with ``follow=True``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import reprlib
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardema.errors import ArgumentError, ArgumentTypeError, CheckpointError
from shardema.shards.boxes import Dims

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
MAX_NUMBER = 1 << 53  # of a count, size or offset: exact in JSON
_MAX_DIMS = 64
_METADATA = "__metadata__"  # the one key of a header that is no tensor
_MAX_DIGITS = 400  # of an integer in JSON; no float is longer
# pathlib reduces the // of a URL to one slash; a single letter before it is a Windows drive.
_URL = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.:_-]*://|[A-Za-z0-9][A-Za-z0-9+.:_-]+:/")
_FILE_URL = re.compile(r"file:(//(localhost)?(?=/))?", re.IGNORECASE)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def local_path(op: str, path: str | os.PathLike[str]) -> str:
    """A local path; a ``file:///`` URL is converted to one.

    Raises:
        ValueError: it is empty, or the URL of something that is not a local file.
        TypeError: it is not a path.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ArgumentTypeError(f"{op}: got {path!r}, expected a path as str or pathlib.Path")
    if not text:
        raise ArgumentError(f"{op}: got an empty path")
    if not _is_name(text):
        raise ArgumentError(f"{op}: got {text!r}, which no file system can hold")
    found = _FILE_URL.match(text) if _URL.match(text) else None
    if found is not None:
        if found[1] is None:
            raise ArgumentError(
                f"{op}: got {text!r}, expected file:/// and an absolute path, as a str since "
                "pathlib drops slashes, or the path alone"
            )
        return os.fsdecode(urllib.parse.unquote_to_bytes(text[found.end() :]))
    if _URL.match(text):
        raise ArgumentError(
            f"{op}: got {text!r}, expected a local path, or where URLs are possible one with two "
            "slashes, as a str since pathlib drops slashes"
        )
    return text


def _is_name(text: str) -> bool:
    """Whether the system's calls take it: they end at a null, and have no half characters."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_file_name(value: Any) -> bool:
    """Whether ``value`` may be the name of a file in a folder: no way out of it, and no path."""
    return isinstance(value, str) and os.path.basename(value) == value and _is_name(value)


@contextlib.contextmanager
def reporting(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Raises an OSError as a CheckpointError with the operation ``doing`` and the path."""
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
        path: its folder must exist.
        size: bytes to reserve, so that a full disk raises before the first byte is written.
    """

    def __init__(self, path: str, size: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.path = path
        self._fd = os.open(path, flags, 0o666)
        try:
            _reserve(self._fd, size)
        except BaseException:
            close_quietly(self._fd)
            raise

    def write_at(self, offset: int, data: memoryview | bytearray | bytes) -> None:
        """Writes all of ``data`` at ``offset``."""
        write_all(self._fd, offset, data)

    def sync(self) -> None:
        """Returns when the bytes are on the disk."""
        os.fsync(self._fd)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.close(self._fd)  # a network file system may report a full disk only here
        else:
            close_quietly(self._fd)


def close_quietly(fd: int) -> None:
    """Closes a descriptor and ignores errors: another one is raised, or nothing was written."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.ftruncate(fd, size)
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        # EINVAL: also for an empty file
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def write_all(fd: int, offset: int, data: memoryview | bytearray | bytes) -> None:
    """Calls pwrite until all bytes are written."""
    view = memoryview(data).cast("B")
    while view:
        n = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[n:], offset + n


def write_file(path: str, data: bytes | bytearray) -> None:
    """Creates a file with these bytes and syncs it."""
    with NewFile(path, len(data)) as file:
        file.write_at(0, data)
        file.sync()


def open_existing(path: str, *, write: bool = False, follow: bool = False) -> int:
    """A descriptor of a regular file; a FIFO, device or folder is refused.

    Args:
        follow: follow symlinks.

    Raises:
        CheckpointError: it is not a regular file, or it cannot be opened.
    """
    # O_NONBLOCK: else opening a FIFO waits for a writer
    flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC
    with reporting(path, "opening"):
        # first, since opening a device or a FIFO may do something to whoever is at its other end
        _check_regular(os.stat(path, follow_symlinks=follow), path)
        fd = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
        try:
            _check_regular(os.fstat(fd), path)  # it may have been replaced meanwhile
        except BaseException:
            close_quietly(fd)
            raise
    return fd


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"opening {path}: not a regular file", path=path)


@contextlib.contextmanager
def opened(path: str, *, follow: bool = False) -> Iterator[int]:
    """`open_existing` for reading; reports an OSError of the block and closes the file."""
    with reporting(path, "reading"):
        fd = open_existing(path, follow=follow)
        try:
            yield fd
        finally:
            close_quietly(fd)


def read_at(fd: int, offset: int, size: int, path: str) -> bytearray:
    """``size`` bytes from ``offset``.

    Raises:
        CheckpointError: the file is shorter.
    """
    data = bytearray(size)
    read_into(fd, offset, memoryview(data), path)
    return data


def read_into(fd: int, offset: int, view: memoryview, path: str) -> None:
    """Fills ``view`` with the bytes from ``offset``.

    Raises:
        CheckpointError: the file is shorter.
    """
    size, done = len(view), 0
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


def read_whole(path: str, limit: int, *, follow: bool = False, start: bytes = b"") -> bytearray:
    """The bytes of a regular file, read only if it begins with ``start``, else no more than that.

    Raises:
        CheckpointError: it is not one, or it has more than ``limit`` bytes.
    """
    with opened(path, follow=follow) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CheckpointError(
                f"reading {path}: {size} bytes, expected at most {limit}", path=path
            )
        begins = read_at(fd, 0, min(size, len(start)), path)
        return read_at(fd, 0, size, path) if begins == start else begins


def start_sync(fd: int) -> None:
    """Has the system begin to write a file to its disk, so that a later fsync has less to do."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)  # only Linux has it
    if begin is not None:
        begin(ctypes.c_int(fd), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(2))  # WRITE


def sync_path(path: str) -> None:
    """Returns when the bytes of a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems cannot sync folders, and send their changes at once
        if error.errno not in _CANNOT_SYNC or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise
    finally:
        close_quietly(fd)


def sync_tree(path: str) -> None:
    """`sync_path` of a folder and of everything in it."""
    for name in os.listdir(path):
        inside = os.path.join(path, name)
        if stat.S_ISDIR(os.lstat(inside).st_mode):
            sync_tree(inside)
        else:
            sync_path(inside)
    sync_path(path)


def make_folders(path: str, made: list[str]) -> None:
    """Creates a folder and its missing parents, each durably.

    Args:
        made: each created folder is appended to it.
    """
    try:
        os.stat(path)
        return
    except FileNotFoundError:
        parent = os.path.dirname(path)
        if parent != path:
            make_folders(parent, made)
    try:
        os.mkdir(path)
    except FileExistsError:  # another process created it
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise
        return
    made.append(path)
    sync_path(os.path.dirname(path))


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a safetensors file: ``start`` is its first byte in the file."""

    dtype: torch.dtype
    shape: Dims
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def make_header(
    tensors: Sequence[tuple[str, torch.dtype, Dims]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Entry]]:
    """The head of a safetensors file (length and header) and its entries by name.

    The same bytes as the safetensors package writes: widest dtype first, then by name.

    Raises:
        ValueError: a dtype or a name that the format does not have, or a header over its limit.
    """
    for name, dtype, _ in tensors:
        if name == _METADATA:
            raise ArgumentError(
                f"{name}: safetensors keeps its metadata under this name; rename it"
            )
        if dtype not in NAMES:
            raise ArgumentError(
                f"{name}: safetensors has no dtype for {dtype}; give dtype=, or leave the tensor "
                'out of the model\'s state, a buffer by buffers={name: "ignore"}'
            )
    place = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    order = sorted(tensors, key=lambda t: (-place[t[1]], t[0]))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in order:
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ArgumentError(
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
    """The tensors of a safetensors file, checked as the safetensors package does.

    Raises:
        CheckpointError: it is not a complete, valid safetensors file.
    """
    size = os.fstat(fd).st_size
    return parse_header(lambda offset, nbytes: read_at(fd, offset, nbytes, path), size, path)


def parse_header(read: Callable[[int, int], bytearray], size: int, path: str) -> dict[str, Entry]:
    """The same, of a file of ``size`` bytes that ``read(offset, nbytes)`` reads."""
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else MAX_NUMBER
    if length > min(MAX_HEADER, size - 8):
        raise CheckpointError(f"reading {path}: not a safetensors file", path=path)
    try:
        return _entries(parse_json(read(8, length)), 8 + length, size)
    except BROKEN as error:
        raise CheckpointError(
            f"reading {path}: its safetensors header is broken ({error!r:.300})", path=path
        ) from error


def _entries(header: Any, begin: int, size: int) -> dict[str, Entry]:
    """The entries of a header, checked: the tensors are contiguous and fill the file."""
    _check_metadata(header.pop(_METADATA, {}))
    places = []
    for name, value in header.items():
        start, stop = (checked_int(n) for n in value["data_offsets"])
        places.append((start, stop, checked_text(name), value))
    entries = {}
    at = 0
    for start, stop, name, value in sorted(places):  # names differ: no values are compared
        if start != at:
            raise ValueError(f"{name:.100}: it begins at byte {start}, expected {at}")
        if value["dtype"] not in DTYPES:
            raise ValueError(f"{name:.100}: dtype {reprlib.repr(value['dtype'])} is not known")
        entry = Entry(DTYPES[value["dtype"]], checked_shape(value["shape"]), begin + start)
        if start + entry.nbytes != stop:
            raise ValueError(f"{name:.100}: offsets do not match its shape")
        entries[name] = entry
        at = stop
    if begin + at != size:
        raise ValueError(f"the file has {size} bytes, expected {begin + at}")
    return entries


# Stems of the safetensors files of transformers, diffusers and PEFT; PEFT saves every adapter but
# "default" to a folder of its name.
MODEL = "model"
DIFFUSERS = "diffusion_pytorch_model"
ADAPTER = "adapter_model"
WHOLE = (MODEL, DIFFUSERS)
STEM = re.compile(rf"{MODEL}|{DIFFUSERS}|(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?{ADAPTER}")


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    for key, value in metadata.items():
        checked_text(key)
        checked_text(value)


# Raised by parsing and checking untrusted data.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def parse_json(data: bytes | bytearray | memoryview) -> Any:
    """Parses strict JSON: parsers differ in how they read anything else, or take minutes.

    Raises:
        ValueError: a duplicate key, NaN, infinity, a number over 400 digits, or invalid JSON.
    """
    return json.loads(
        str(data, "utf-8"),
        object_pairs_hook=_object,
        parse_int=_integer,
        parse_constant=_constant,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a duplicate key")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> float:
    raise ValueError(f"the number {name}")


def checked_int(value: Any) -> int:
    """``value``, checked to be a count.

    Raises:
        ValueError: it is not an integer in [0, 2^53].
    """
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"expected a count, got {reprlib.repr(value)}")
    return value


def checked_shape(value: Any) -> Dims:
    """``value`` as a shape.

    Raises:
        ValueError: a size is no count, or there are too many dimensions or elements.
    """
    numel = 1
    for count, size in enumerate(checked_list(value), start=1):
        numel *= checked_int(size)
        if count > _MAX_DIMS or numel > MAX_NUMBER:
            raise ValueError(f"shape {reprlib.repr(value)} is too large")
    return tuple(value)


def checked_list(value: Any) -> list[Any]:
    """``value`` if it is a list, not another thing that can be iterated.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not list:
        raise ValueError(f"expected a list, got {reprlib.repr(value)}")
    return value


def checked_text(value: Any) -> str:
    """``value``, checked to be a string that UTF-8 can encode.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not str:
        raise ValueError(f"expected a string, got {reprlib.repr(value)}")
    value.encode()
    return value
