"""Versions by broadcast in a process group: to the ranks of another world.

::

    publisher   header, bytes     and a text: version, names, dtypes, shapes
                data, bytes       and a bucket of the tensors' bytes, end to end
                ...
                commit            all ranks of the training have agreed that it is complete
    receivers   keep what comes aside; return it at the commit, forget it at an abandon
"""

from __future__ import annotations

import atexit
import json
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from shardema.errors import ArgumentError, CallError, RankError, logger
from shardema.files.safetensors import (
    BROKEN,
    DTYPES,
    MAX_HEADER,
    NAMES,
    checked_shape,
    checked_text,
    parse_json,
)
from shardema.publishing.publication import Header, Publication, Version, refuse_existing
from shardema.ranks import transfer
from shardema.ranks.agree import device_for
from shardema.ranks.deadline import Task

log = logger(__name__)

_HEADER, _DATA, _COMMIT, _ABANDON, _END = range(5)  # the kinds of a word
_FORM = 0x53454D4101  # of a word: this module's, version 1
_ALIGN = 16  # bytes; alignment of the tensors, enough for any dtype
_LOOK = 0.5  # seconds between two checks for Ctrl-C


class Connection:
    """A group of processes that share no world: a publisher and its readers.

    Args:
        store: that all of them reach, such as ``TCPStore(host, port)``; a `PrefixStore` of its own
            if it has served another group.
        index: of this process; 0 is the publisher, the first rank of the training.
        size: number of processes.
        timeout: seconds that a reader waits for the next version.

    The constructor is collective over the processes.
    """

    def __init__(self, store: Store, index: int, size: int, *, timeout: float = 86_400.0) -> None:
        named = PrefixStore("shardema/publishing", store)
        group = ProcessGroupGloo(named, index, size, timedelta(seconds=timeout))
        self._group: ProcessGroupGloo | None = group
        self.index: int = index
        self.size: int = size
        _open.add(self)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Sends a tensor from process ``root`` to the others."""
        if self._group is None:
            raise CallError("the connection was closed")
        _broadcast(self._group, tensor, root)

    def close(self) -> None:
        """Ends it; happens at the end of the program, too."""
        self._group = None


_open: weakref.WeakSet[Connection] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:  # a group that outlives the interpreter aborts the process
    for connection in list(_open):
        connection.close()


class GroupSink:
    """Broadcasts each version to the other processes of a group, which call `receive`.

    After an error in a broadcast, such as of a reader that ended, the group cannot be used again:
    make another one with the readers that are left.

    Args:
        group: a `Connection`, or a process group of the first rank of the training and the readers,
            in which nothing else communicates.

    Raises:
        ValueError: a group without another process, or one that does not send from the CPU.
    """

    def __init__(self, group: Connection | dist.ProcessGroup) -> None:
        if isinstance(group, Connection):
            index, size = group.index, group.size
        else:
            index, size = group.rank(), group.size()
        if size < 2:
            raise ArgumentError("GroupSink: got a group of one process, expected one with readers")
        self._channel = _Channel(group, index)
        self._versions: set[str] = set()
        self._begun = False  # readers have the header of a version, and wait for the rest
        self._bucket = torch.empty(0, dtype=torch.uint8)

    def prepare(self, publication: Publication) -> None:
        """Allocates a bucket. Raises RankError if the group is broken."""
        self._channel.check()
        if publication.version in self._versions:
            refuse_existing(publication.version, "this group")
        for header in publication.headers:
            if header.dtype not in NAMES:
                raise ArgumentError(
                    f"publish: {header.name}: got {header.dtype}, which a GroupSink does not send; "
                    "give dtype="
                )
        size = min(transfer.BUCKET_BYTES, _place(publication.headers)[1])
        if size > self._bucket.numel():
            self._bucket = torch.empty(size, dtype=torch.uint8)

    def write(self, publication: Publication, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Broadcasts the tensors, bucket by bucket."""
        text = torch.frombuffer(bytearray(_header(publication)), dtype=torch.uint8)
        self._begun = True
        self._channel.say(_HEADER, text, publication.timeout)
        for piece in _pieces(tensors, self._bucket):
            self._channel.say(_DATA, piece, publication.timeout)

    def commit(self, publication: Publication) -> None:
        """Tells the readers that the version is complete."""
        self._channel.say(_COMMIT, timeout=publication.timeout)
        self._begun = False
        self._versions.add(publication.version)

    def discard(self, publication: Publication) -> None:
        """Tells the readers that they wait for the next version."""
        begun, self._begun = self._begun, False
        if begun and not self._channel.broken:
            self._channel.say(_ABANDON, timeout=publication.timeout)

    def close(self, timeout: float = 300.0) -> None:
        """Tells the readers that no more versions come: `receive` returns None."""
        if not self._channel.broken:
            self._channel.say(_END, timeout=timeout)


def receive(group: Connection | dist.ProcessGroup, *, root: int = 0) -> Version | None:
    """The next version that a `GroupSink` publishes; None if no more come. Collective.

    Called by every process of the group but the publisher. Needs memory for all tensors, so that a
    version that is not completed leaves the caller with the one before; such versions are skipped,
    with a warning.

    Args:
        group: as given to `GroupSink`.
        root: index of the publisher in it.

    Raises:
        RankError: the publisher or another reader is gone.
    """
    channel = _Channel(group, root)
    while True:
        kind, nbytes = channel.hear()
        if kind == _END:
            return None
        text = torch.empty(_within(nbytes, MAX_HEADER), dtype=torch.uint8)
        channel.move(text)
        version, headers = _parsed(bytes(text.numpy()))
        starts, size = _place(headers)
        data, at = torch.empty(size, dtype=torch.uint8), 0
        while (word := channel.hear())[0] == _DATA:
            piece = data[at : at + _within(word[1], size - at)]
            channel.move(piece)
            at += len(piece)
        if word[0] == _COMMIT and at == size:
            return Version(version, _tensors(headers, starts, data))
        log.warning("version %s was not completed by its publisher: waiting for another", version)


class _Channel:
    """Words and data from one process of a group to all others.

    Attributes:
        broken: why the group must not be used again, else "".
    """

    def __init__(self, group: Connection | dist.ProcessGroup, root: int) -> None:
        if isinstance(group, dist.ProcessGroup) and device_for(group, "cpu").type != "cpu":
            raise ArgumentError(
                f"publishing: got a group of backend {dist.get_backend(group)}, expected one that "
                "sends tensors of the CPU, such as gloo"
            )
        self.broken = ""
        self._group, self._root = group, root

    def _broadcast(self, tensor: Tensor) -> None:
        if isinstance(self._group, Connection):
            self._group.broadcast(tensor, self._root)
        else:
            _broadcast(self._group, tensor, self._root)

    def check(self) -> None:
        """Raises RankError if the group is broken."""
        if self.broken:
            raise RankError(
                f"publish: the group of this GroupSink is broken ({self.broken}); make another one "
                "with the readers that are left"
            )

    def say(self, kind: int, data: Tensor | None = None, timeout: float | None = None) -> None:
        """Sends a word, and the bytes that it announces."""
        nbytes = 0 if data is None else len(data)
        self.move(torch.tensor([_FORM, kind, nbytes]), timeout)
        if data is not None:
            self.move(data, timeout)

    def hear(self) -> tuple[int, int]:
        """The next word: its kind, and the number of bytes that follow."""
        word = torch.zeros(3, dtype=torch.int64)
        self.move(word)
        form, kind, nbytes = word.tolist()
        if form != _FORM or not 0 <= kind <= _END:
            raise RankError(
                "receive: got what is no publication of this version of shardema; give the group "
                "to nothing else, and root= the index of the publisher in it"
            )
        return kind, nbytes

    def move(self, tensor: Tensor, timeout: float | None = None) -> None:
        """Broadcasts a tensor.

        Raises:
            RankError: a process of the group is gone, or did not take part in time.
        """
        task = Task(lambda: self._broadcast(tensor))
        waited, seconds = 0.0, min(_LOOK, timeout or _LOOK)
        while not task.done(seconds):
            waited += seconds
            if timeout is not None and waited >= timeout:
                self.broken = f"a broadcast did not end within {timeout:g} s"
                self.check()
        try:
            task.result()
        except RuntimeError as error:  # torch's
            self.broken = str(error).partition("\n")[0]
            raise RankError(
                f"publishing: a process of the group is gone ({self.broken}); the version before "
                "stays; make another group with those that are left"
            ) from error


def _broadcast(group: Any, tensor: Tensor, root: int) -> None:
    """In a group or backend of torch's."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    group.broadcast([tensor], options).wait()


def _header(publication: Publication) -> bytes:
    tensors = [[h.name, NAMES[h.dtype], list(h.shape)] for h in publication.headers]
    return json.dumps({"version": publication.version, "tensors": tensors}).encode()


def _parsed(text: bytes) -> tuple[str, list[Header]]:
    try:
        found = parse_json(text)
        headers = [
            Header(checked_text(name), DTYPES[dtype], checked_shape(shape))
            for name, dtype, shape in found["tensors"]
        ]
        return checked_text(found["version"]), headers
    except BROKEN as error:
        raise RankError(f"receive: got a header that cannot be read ({error!r:.300})") from error


def _within(nbytes: int, most: int) -> int:
    """``nbytes``, checked to be a number of bytes that may follow."""
    if not 0 <= nbytes <= most:
        raise RankError(f"receive: got {nbytes} bytes, expected at most {most}")
    return nbytes


def _place(headers: Sequence[Header]) -> tuple[list[int], int]:
    """The first byte of each tensor in the stream, and the number of bytes in all."""
    starts, end = [], 0
    for header in headers:
        starts.append(end)
        end += -(-header.nbytes // _ALIGN) * _ALIGN
    return starts, end


def _tensors(headers: Sequence[Header], starts: Sequence[int], data: Tensor) -> dict[str, Tensor]:
    return {
        h.name: data[start : start + h.nbytes].view(h.dtype).view(h.shape)
        for h, start in zip(headers, starts, strict=True)
    }


def _pieces(tensors: Iterator[tuple[str, Tensor]], bucket: Tensor) -> Iterator[Tensor]:
    """The bytes of the tensors, end to end, in pieces of a bucket at most."""
    used, size = 0, len(bucket)
    for _, tensor in tensors:
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        while len(data):
            if not used and len(data) >= size:  # no copy
                piece, data = data[:size], data[size:]
                yield piece
                continue
            n = min(len(data), size - used)
            bucket[used : used + n].copy_(data[:n])
            used, data = used + n, data[n:]
            if not len(data):
                used += -used % _ALIGN
            if used == size:
                yield bucket
                used = 0
    if used:
        yield bucket[:used]
