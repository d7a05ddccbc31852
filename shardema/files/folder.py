"""A local folder that appears complete under its name or not at all, or replaces a checkpoint.

::

    a new one        .NAME.XXXXXXXX.tmp/           written, synced, renamed to NAME
    a replacement    NAME/save-XXXXXXXXXXXXXXXX/   written, synced; its manifest is renamed over
                                                   NAME/shardema.json, then the old files go

Both turn on one rename, which every file system makes in one: whoever looks, and whenever a rank is
killed, finds the old state or the new one. After an error the old state is there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping

from shardema.errors import CheckpointError
from shardema.files import manifest as manifests
from shardema.files.manifest import MAX_MANIFEST, NAME, PLACE, Manifest
from shardema.files.places import any_path
from shardema.files.prefix import (
    NewPrefix,
    exists_already,
    new_prefix,
    not_replaceable,
    other_path,
)
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    close_quietly,
    make_folders,
    read_whole,
    reporting,
    sync_path,
    sync_tree,
    write_file,
)
from shardema.files.steps import lock
from shardema.ranks.agree import Ranks

_REPLACED = "replaced.json"  # the old manifest, until the new one is durable
_LONGEST = 100  # bytes of the name that a temporary one has; file systems take 143 or 255 in all


class NewFolder:
    """A folder that the ranks write into; made by `new_folder`.

    Attributes:
        path: where they write.
        place: name of ``path`` where it stays in the folder that it replaces, else "".
    """

    def __init__(self, op: str, ranks: Ranks) -> None:
        self.path = ""
        self.place = ""
        self._op = op
        self._ranks = ranks
        self._folder = ""
        self._made: list[str] = []  # folders above it
        self._lock = -1  # of the temporary folder: a manager removes one that nobody holds
        self._moving = False  # the manifest of a replacement may have been renamed

    def begin(self, folder: str | os.PathLike[str], overwrite: bool) -> None:
        """Makes the folder to write into. Collective."""
        op, ranks = self._op, self._ranks

        def propose() -> str:
            self._folder = absolute(folder, op)
            with reporting(self._folder, f"{op} to"):
                if _exists(self._folder) and not overwrite:
                    raise exists_already(op, self._folder)
            return self._folder

        def choose(proposals: list[str]) -> list[str]:
            for rank, proposal in zip(ranks.ranks, proposals, strict=True):
                if proposal != self._folder:
                    raise other_path(op, rank, proposal, ranks.ranks[0], self._folder)
            with reporting(self._folder, f"{op} to"):
                self._make()
            return [self.path, self.place]

        self.path, self.place = ranks.agree(op, propose, choose)

        def look() -> None:
            with reporting(self.path, f"{op} to"):
                if not _exists(self.path):
                    raise CheckpointError(
                        f"{op} to {self._folder}: rank {ranks.rank} does not see the folder that "
                        f"rank {ranks.ranks[0]} made; give a path on a file system that all ranks "
                        "share",
                        path=self._folder,
                    )

        ranks.agree(f"{op} (looking)", look)

    def _make(self) -> None:
        parent, name = os.path.split(self._folder)
        if _exists(self._folder):
            _replaceable(self._folder, self._op)
            place = f"save-{secrets.token_hex(8)}"
            path = os.path.join(self._folder, place)
        else:
            make_folders(parent, self._made)
            sync_path(parent)  # where that fails, the rename could not be made durable either
            cut = os.fsencode(name)[:_LONGEST].decode(errors="ignore")
            place, path = "", os.path.join(parent, f".{cut}.{secrets.token_hex(4)}.tmp")
        self.path, self.place = path, place
        os.mkdir(path)
        self._lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        lock(self._lock)

    def finish(self, files: Mapping[str, bytes], extra: Callable[[str], None]) -> None:
        """Writes the last files and makes all that was written count, durably. On the leader only.

        Args:
            files: their bytes by name.
            extra: given a local folder, writes what else belongs there.

        Raises:
            CheckpointError: it could not; what was there before is there.
        """
        with reporting(self.path, f"{self._op} to"):
            extra(self.path)
            for name, data in files.items():
                write_file(os.path.join(self.path, name), data)
        with reporting(self._folder, f"{self._op} to"):
            sync_tree(self.path)  # the model's config was written by its own code
            if self.place:
                self._replace()
            else:
                self._rename()

    def _rename(self) -> None:
        if _exists(self._folder):
            raise CheckpointError(
                f"{self._op} to {self._folder}: it was created by another process during the "
                f"{self._op}",
                path=self._folder,
            )
        os.rename(self.path, self._folder)
        self._settle(os.path.dirname(self._folder), lambda: os.rename(self._folder, self.path))

    def _replace(self) -> None:
        old = _replaceable(self._folder, self._op)
        shown, hidden = os.path.join(self._folder, NAME), os.path.join(self.path, NAME)
        kept = os.path.join(self.path, _REPLACED)
        write_file(kept, read_whole(shown, MAX_MANIFEST))
        sync_path(self.path)
        sync_path(self._folder)  # the files are to be found before anything says that they count

        def undo() -> None:
            os.rename(kept, shown)
            self._moving = False

        self._moving = True
        os.rename(hidden, shown)
        self._settle(self._folder, undo)
        self._clear(old, kept)

    def _settle(self, parent: str, undo: Callable[[], None]) -> None:
        """Makes a rename in ``parent`` durable, or undoes it."""
        try:
            sync_path(parent)
        except OSError as error:
            try:
                undo()
            except OSError:
                raise CheckpointError(
                    f"{self._op} to {self._folder}: it is complete, but {parent} could not "
                    f"be synced ({error.strerror}), so a power failure may still take it away",
                    path=self._folder,
                    errno=error.errno,
                ) from error
            raise

    def _clear(self, old: Manifest, kept: str) -> None:
        """Removes the files of the checkpoint that was replaced, and what killed saves left."""
        with contextlib.suppress(OSError):
            os.unlink(kept)
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                if PLACE.fullmatch(name) and name != self.place:
                    shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)
        for file in () if old.place else old.files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._folder, file.name))

    def close(self) -> None:
        """Unlocks what was written."""
        if self._lock >= 0:
            close_quietly(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Removes what was written, after a failure. The leader does it."""
        if not self._ranks.leader:
            return
        moved = self._moving and not os.path.lexists(os.path.join(self.path, NAME))
        if self.path and not moved:
            shutil.rmtree(self.path, ignore_errors=True)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(path)


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike[str], op: str, ranks: Ranks, *, overwrite: bool = False
) -> Iterator[NewFolder | NewPrefix]:
    """A folder to write into and to finish; after an error nothing of it is left. Collective.

    Args:
        folder: its name, or its URL in a store; must not exist. Its parent is made.
        overwrite: a complete checkpoint may be there, and is replaced.

    Raises:
        CheckpointError: ``folder`` exists, or cannot be made or seen by a rank.
        ValueError: the ranks name different folders, or a URL that cannot be used.
    """
    if is_remote(any_path(op, folder)):
        with new_prefix(folder, op, ranks, overwrite=overwrite) as prefix:
            yield prefix
        return
    new = NewFolder(op, ranks)
    try:
        new.begin(folder, overwrite)
        yield new
    except BaseException:
        new.discard()
        raise
    finally:
        new.close()


def absolute(folder: str | os.PathLike[str], op: str) -> str:
    """``folder`` from the root on, its last part a name; links, and URLs, stay what they are."""
    path = any_path(op, folder)
    if is_remote(path):
        return path
    with reporting(path, f"{op} to"):
        path = os.path.join(os.getcwd(), path).rstrip("/") or "/"
        return os.path.realpath(path) if os.path.basename(path) in ("", ".", "..") else path


def _exists(path: str) -> bool:
    """Whether there is anything of this name. Raises OSError where that cannot be told."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _replaceable(folder: str, op: str) -> Manifest:
    """The manifest of what is there. Raises CheckpointError unless it is a whole checkpoint."""
    reason = "not a folder"
    if stat.S_ISDIR(os.lstat(folder).st_mode):
        try:
            return manifests.read(folder, op)
        except CheckpointError as error:
            reason, number = str(error), error.errno
    else:
        number = None
    raise not_replaceable(op, folder, reason, number)
