"""A disk that may lose what was not synced: every state in which a loss of power can leave it.

::

    a file    bytes that are safe, and writes since its last sync, each block of which is kept, lost
              or garbled
    a folder  names that are safe, and names made or gone since its last sync, each kept or lost

It is stricter than a file system with a journal: nothing but a sync of that very file or folder
makes anything safe, and names are kept in any order. A rename is one thing, though: what it moved
is never lost under both names.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Union

from tests.torture.recorder import Event

BLOCK = 512  # bytes that a disk writes as a whole


@dataclass
class File:
    safe: bytes = b""
    pending: list[Event] = field(default_factory=list)


@dataclass
class Move:
    """A rename: both of its halves, in one folder or in two."""

    within: bool
    safe: bool = False  # its new name can not be lost any more


@dataclass(frozen=True)
class Change:
    """A name that was made (with what it names) or is gone (None)."""

    name: str
    inode: Inode | None
    move: Move | None = None


@dataclass
class Folder:
    safe: dict[str, Inode] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    now: dict[str, Inode] = field(default_factory=dict)  # as a running system sees it


Inode = Union[File, Folder]  # noqa: UP007 (also read at run time)
Tree = dict[str, bytes | None]  # path: bytes of a file, None for a folder


class Disk:
    """What the events of a log leave below ``root``."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._top = Folder()

    def replay(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.kind == "mark":
                if event.path == "settled":
                    self._settle(self._top)
                continue
            if not event.path.startswith(self._root):
                continue
            getattr(self, f"_{event.kind}")(event)

    # ---- events -----------------------------------------------------------------------------

    def _make(self, event: Event) -> None:
        self._name(event.path, File())

    def _mkdir(self, event: Event) -> None:
        self._name(event.path, Folder())

    def _write(self, event: Event) -> None:
        self._file(event.path).pending.append(event)

    _size = _write

    def _unlink(self, event: Event) -> None:
        self._name(event.path, None)

    _rmdir = _unlink

    def _rename(self, event: Event) -> None:
        inode = self._find(event.path)
        move = Move(os.path.dirname(event.path) == os.path.dirname(event.other))
        self._name(event.other, inode, move)
        self._name(event.path, None, move)

    def _sync(self, event: Event) -> None:
        inode = self._find(event.path)
        if isinstance(inode, File):
            own = [one for one in inode.pending if one.host == event.host]
            inode.safe = written(inode.safe, own)
            inode.pending = [one for one in inode.pending if one.host != event.host]
            return
        for change in inode.pending:
            _apply(inode.safe, change)
            if change.move is not None:
                change.move.safe = True
        inode.pending.clear()

    def _settle(self, inode: Inode) -> None:
        """All of it is safe: the power was on for long."""
        if isinstance(inode, File):
            inode.safe, inode.pending = written(inode.safe, inode.pending), []
            return
        inode.safe, inode.pending = dict(inode.now), []
        for inner in inode.now.values():
            self._settle(inner)

    # ---- names ------------------------------------------------------------------------------

    def _find(self, path: str) -> Inode:
        inode: Inode = self._top
        for name in os.path.relpath(path, self._root).split("/"):
            if name != ".":
                assert isinstance(inode, Folder), path
                inode = inode.now[name]
        return inode

    def _file(self, path: str) -> File:
        inode = self._find(path)
        assert isinstance(inode, File), path
        return inode

    def _name(self, path: str, inode: Inode | None, move: Move | None = None) -> None:
        folder = self._find(os.path.dirname(path))
        assert isinstance(folder, Folder), path
        change = Change(os.path.basename(path), inode, move)
        _apply(folder.now, change)
        folder.pending.append(change)

    # ---- after a loss of power ----------------------------------------------------------------

    def lost_power(self, random: random.Random) -> Tree:
        """What is found afterwards, drawn."""
        moved: dict[int, bool] = {}  # by id of a `Move`: its new name was kept
        folders: list[Folder] = []
        _collect(self._top, folders)
        for folder in folders:
            for change in folder.pending:
                if change.move is not None and change.inode is not None:
                    moved[id(change.move)] = change.move.safe or random.random() < 0.5
        found: Tree = {}
        for path, inode in self._left(self._top, "", random, moved):
            found[path] = None if isinstance(inode, Folder) else torn(inode, random)
        return found

    def _left(
        self, folder: Folder, path: str, random: random.Random, moved: dict[int, bool]
    ) -> Iterator[tuple[str, Inode]]:
        names = dict(folder.safe)
        share = random.choice((0.0, 0.5, 0.9, 1.0))  # of names that were kept
        for change in folder.pending:
            if _kept(change, random, share, moved):
                _apply(names, change)
        for name, inode in names.items():
            yield f"{path}{name}", inode
            if isinstance(inode, Folder):
                yield from self._left(inode, f"{path}{name}/", random, moved)


def _collect(folder: Folder, found: list[Folder]) -> None:
    found.append(folder)
    inner = [*folder.safe.values(), *(c.inode for c in folder.pending), *folder.now.values()]
    for inode in inner:
        if isinstance(inode, Folder) and not any(inode is one for one in found):
            _collect(inode, found)


def _apply(names: dict[str, Inode], change: Change) -> None:
    if change.inode is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.inode


def _kept(change: Change, random: random.Random, share: float, moved: dict[int, bool]) -> bool:
    if change.move is None:
        return random.random() < share
    new = moved.get(id(change.move), True)  # synced where the new name is
    if change.inode is not None:
        return new
    return new and (change.move.within or random.random() < share)


def written(data: bytes, events: Iterable[Event]) -> bytes:
    """Bytes of a file after writes."""
    out = bytearray(data)
    for event in events:
        end = event.at + len(event.data)
        out.extend(bytes(max(0, end - len(out))))
        if event.kind == "write":
            out[event.at : end] = event.data
    return bytes(out)


def torn(file: File, random: random.Random) -> bytes:
    """Bytes of a file after a loss of power: of what was not synced any block may be lost."""
    how = random.choice(("kept", "lost", "torn", "garbled"))
    if not file.pending or how == "lost":
        return file.safe
    whole = written(file.safe, file.pending)
    if how == "kept":
        return whole
    out = bytearray(whole)
    for start in range(0, len(out), BLOCK):
        stop = min(start + BLOCK, len(out))
        if random.random() < 0.5:
            before = file.safe[start:stop].ljust(stop - start, b"\0")
            out[start:stop] = before if how == "torn" else random.randbytes(stop - start)
    # the size is a fact of its own
    return bytes(out) if random.random() < 0.8 else bytes(out[: max(len(file.safe), 0)])
