"""A folder in a store, which has no rename: what is in it counts once its manifest is there.

::

    NAME/save-XXXXXXXXXXXXXXXX/   the files of one save, each an object that is whole or not there
    NAME/shardema.json            put last, in one: it names the save that counts

A replacement writes its files beside the old ones, puts its manifest over the old one, and removes
the old files. What a killed save leaves is in no manifest, so no load sees it; the next save that
succeeds removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping

from shardema.errors import ArgumentError, CheckpointError
from shardema.files import manifest as manifests
from shardema.files import remote
from shardema.files.manifest import MAX_MANIFEST, NAME, PLACE, Manifest
from shardema.files.places import any_path, read_whole
from shardema.files.safetensors import reporting
from shardema.ranks.agree import Ranks


class NewPrefix:
    """A folder in a store that the ranks write into; as `NewFolder`; made by `new_prefix`.

    Attributes:
        folder: its URL.
        path: where they write.
        place: name of ``path`` in the folder of a checkpoint, else "".
        names: of the files that the leader wrote into a folder without a place.
    """

    def __init__(self, op: str, ranks: Ranks) -> None:
        self.path: str = ""
        self.place: str = ""
        self.names: list[str] = []
        self._op = op
        self._ranks = ranks
        self.folder = ""
        self._seen: bytes | bytearray | None = None  # the manifest that is there
        self._old: Manifest | None = None
        self._left: list[str] = []  # places of other saves
        self._counts = False  # the manifest may be there

    def begin(self, folder: str | os.PathLike[str], overwrite: bool) -> None:
        """Looks at what is there. Collective."""

        def propose() -> str:
            self.folder = any_path(self._op, folder)
            return self.folder

        def choose(proposals: list[str]) -> list[str]:
            for rank, proposal in zip(self._ranks.ranks, proposals, strict=True):
                if proposal != self.folder:
                    raise other_path(self._op, rank, proposal, self._ranks.ranks[0], self.folder)
            self._look(overwrite)
            place = f"save-{secrets.token_hex(8)}" if self._op == "save" else ""
            return [os.path.join(self.folder, place) if place else self.folder, place]

        self.path, self.place = self._ranks.agree(self._op, propose, choose)

    def _look(self, overwrite: bool) -> None:
        inside = remote.entries(self.folder)
        if self._op == "save":
            self._left = [name for name in inside if PLACE.fullmatch(name)]
        if len(inside) == len(self._left):
            return
        if not overwrite:
            raise exists_already(self._op, self.folder)
        if NAME not in inside:
            raise not_replaceable(self._op, self.folder, f"no {NAME} in it", None)
        try:
            self._old = manifests.read(self.folder, self._op)
            self._seen = self._manifest()
        except CheckpointError as error:
            raise not_replaceable(self._op, self.folder, str(error), error.errno) from error

    def _manifest(self) -> bytes | bytearray | None:
        try:
            return read_whole(os.path.join(self.folder, NAME), MAX_MANIFEST)
        except CheckpointError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def add(self, extra: Callable[[str], None]) -> None:
        """Writes what ``extra`` writes into a local folder that it is given. On the leader only."""
        with reporting(self.path, f"{self._op} to"), tempfile.TemporaryDirectory() as local:
            extra(local)
            for place, _, names in os.walk(local):
                for name in names:
                    found = os.path.join(place, name)
                    with open(found, "rb") as file:
                        self._put(os.path.relpath(found, local), file.read())

    def _put(self, name: str, data: bytes) -> None:
        self.names.append(name)
        remote.put(os.path.join(self.path, name), data)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """As `NewFolder.finish`; the manifest among ``files`` is what makes a checkpoint."""
        for name, data in files.items():
            if self.place and name == NAME:
                self._settle(data)
            else:
                self._put(name, data)

    def _settle(self, data: bytes) -> None:
        """Puts the manifest of a checkpoint, and removes what it replaces."""
        if self._manifest() != self._seen:
            raise CheckpointError(
                f"{self._op} to {self.folder}: it was written by another process during the "
                f"{self._op}",
                path=self.folder,
            )
        # A put that raised may still arrive, so from here on nothing that it names is removed.
        self._counts = True
        try:
            remote.put(os.path.join(self.folder, NAME), data)
        except CheckpointError:
            if not self._arrived(data):
                raise
        for place in self._left:
            remote.remove(os.path.join(self.folder, place), folder=True)
        if self._old is not None and not self._old.place:
            for file in self._old.files:
                remote.remove(os.path.join(self.folder, file.name))

    def _arrived(self, data: bytes) -> bool:
        with contextlib.suppress(CheckpointError):
            return self._manifest() == data
        return False

    def hand_over(self) -> None:
        """Another thread goes on with it."""

    def close(self) -> None:
        """Nothing is open here."""

    def discard(self) -> None:
        """Removes what was written, after a failure. The leader does it."""
        if not self._ranks.leader or not self.path or self._counts:
            return
        if self.place:
            remote.remove(self.path, folder=True)
        for name in () if self.place else self.names:
            remote.remove(os.path.join(self.path, name))


@contextlib.contextmanager
def new_prefix(
    folder: str | os.PathLike[str], op: str, ranks: Ranks, *, overwrite: bool = False
) -> Iterator[NewPrefix]:
    """As `new_folder`, for a URL."""
    new = NewPrefix(op, ranks)
    with remote.patience(ranks.timeout):
        try:
            new.begin(folder, overwrite)
            yield new
        except BaseException:
            new.discard()
            raise


# ---- what is wrong with a path, local or not -----------------------------------------------------


def other_path(op: str, rank: int, got: str, first: int, expected: str) -> ValueError:
    """Ranks that name different folders."""
    return ArgumentError(
        f"{op}: rank {rank} got {got}, rank {first} got {expected}; give the same path on "
        "every rank"
    )


def exists_already(op: str, folder: str) -> CheckpointError:
    """Something is there."""
    replace = ", replace a checkpoint by save(..., overwrite=True)" if op == "save" else ""
    return CheckpointError(
        f"{op} to {folder}: it already exists, and {op} does not write into an existing path: give "
        f"a new one, such as one with the step in its name{replace}, or remove it first",
        path=folder,
    )


def not_replaceable(op: str, folder: str, reason: str, number: int | None) -> CheckpointError:
    """What is there is no whole checkpoint."""
    return CheckpointError(
        f"{op} to {folder}: overwrite=True replaces only a complete checkpoint of ema.save, and "
        f"this is not one ({reason}); give a new path, or remove it first",
        path=folder,
        errno=number,
    )
