"""Creates or replaces a local folder atomically.

::

    new              .NAME.XXXXXXXX.tmp/           written, synced, renamed to NAME
    a replacement    NAME/save-XXXXXXXXXXXXXXXX/   written, synced; its manifest is renamed over
                                                   NAME/shardema.json, then old files are removed

Either takes effect with one atomic rename: a reader finds the old state or the new one at any time,
also after a rank was killed. After an error it is the old state.
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
from shardema.files.locks import abandoned, make_locked
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
from shardema.ranks.agree import Ranks

_REPLACED = "replaced.json"  # the old manifest, until the new one is durable
_LONGEST = 100  # bytes of NAME in a temporary name; file systems allow 143 or 255 in all


class NewFolder:
    """A folder that the ranks write into; made by `new_folder`.

    Attributes:
        folder: its name.
        path: the folder to write to.
        place: of a replacement, the name of ``path`` in the checkpoint's folder, else "".
    """

    def __init__(self, op: str, ranks: Ranks) -> None:
        self.path: str = ""
        self.place: str = ""
        self._op = op
        self._ranks = ranks
        self.folder = ""
        self._handed_over = False  # another thread will call `close`
        self._made: list[str] = []  # parent folders that were created
        self._lock = -1  # on the temporary folder: a manager removes those that are not locked
        self._moving = False  # the manifest of a replacement may have been renamed
        self._undone = False  # a rename was undone, and the disk may have either of the two

    def begin(self, folder: str | os.PathLike[str], overwrite: bool) -> None:
        """Creates the folder to write to. Collective."""
        op, ranks = self._op, self._ranks

        def propose() -> str:
            self.folder = absolute(folder, op)
            with reporting(self.folder, f"{op} to"):
                if _exists(self.folder) and not overwrite:
                    raise exists_already(op, self.folder)
            return self.folder

        def choose(proposals: list[str]) -> list[str]:
            for rank, proposal in zip(ranks.ranks, proposals, strict=True):
                if proposal != self.folder:
                    raise other_path(op, rank, proposal, ranks.ranks[0], self.folder)
            with reporting(self.folder, f"{op} to"):
                self._make()
            return [self.path, self.place]

        self.path, self.place = ranks.agree(op, propose, choose)

        def look() -> None:
            with reporting(self.path, f"{op} to"):
                if not _exists(self.path):
                    raise CheckpointError(
                        f"{op} to {self.folder}: rank {ranks.rank} does not see the folder that "
                        f"rank {ranks.ranks[0]} made; give a path on a file system that all ranks "
                        "share",
                        path=self.folder,
                    )

        ranks.agree(f"{op} (looking)", look)

    def _make(self) -> None:
        parent, name = os.path.split(self.folder)
        if _exists(self.folder):
            _replaceable(self.folder, self._op)
            place = f"save-{secrets.token_hex(8)}"
            path = os.path.join(self.folder, place)
        else:
            make_folders(parent, self._made)
            sync_path(parent)  # if this fails, the rename could not be made durable either
            cut = os.fsencode(name)[:_LONGEST].decode(errors="ignore")
            place, path = "", os.path.join(parent, f".{cut}.{secrets.token_hex(4)}.tmp")
        self.path, self.place = path, place
        self._lock = make_locked(path)

    def add(self, extra: Callable[[str], None]) -> None:
        """Calls ``extra`` with a local folder, to write further files. On the leader only."""
        with reporting(self.path, f"{self._op} to"):
            extra(self.path)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Writes the last files and renames all into place, durably. On the leader only.

        Raises:
            CheckpointError: a system call failed; the previous state is unchanged.
        """
        with reporting(self.path, f"{self._op} to"):
            for name, data in files.items():
                write_file(os.path.join(self.path, name), data)
        with reporting(self.folder, f"{self._op} to"):
            sync_tree(self.path)  # config.save_pretrained does not sync
            if self.place:
                self._replace()
            else:
                self._rename()

    def _rename(self) -> None:
        if _exists(self.folder):
            raise CheckpointError(
                f"{self._op} to {self.folder}: it was created by another process during the "
                f"{self._op}",
                path=self.folder,
            )
        os.rename(self.path, self.folder)
        self._settle(os.path.dirname(self.folder), lambda: os.rename(self.folder, self.path))

    def _replace(self) -> None:
        old = _replaceable(self.folder, self._op)
        shown, hidden = os.path.join(self.folder, NAME), os.path.join(self.path, NAME)
        kept = os.path.join(self.path, _REPLACED)
        write_file(kept, read_whole(shown, MAX_MANIFEST))
        sync_path(self.path)
        sync_path(self.folder)  # the files must be durable before the manifest refers to them

        def undo() -> None:
            os.rename(kept, shown)
            self._moving = False

        self._moving = True
        os.rename(hidden, shown)
        self._settle(self.folder, undo)
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
                    f"{self._op} to {self.folder}: it is complete, but {parent} could not "
                    f"be synced ({error.strerror}), so a power failure may still lose it",
                    path=self.folder,
                    errno=error.errno,
                ) from error
            self._undone = not _synced(parent)
            raise

    def _clear(self, old: Manifest, kept: str) -> None:
        """Removes the files of the replaced checkpoint, and those of killed saves."""
        with contextlib.suppress(OSError):
            os.unlink(kept)
        with contextlib.suppress(OSError, CheckpointError):
            names = {name for name in os.listdir(self.folder) if PLACE.fullmatch(name)}
            paths = {name: os.path.join(self.folder, name) for name in names - {self.place}}
            for name, path in paths.items():
                with abandoned(path) as free:
                    if (free or name == old.place) and not self._is_current(name):
                        shutil.rmtree(path, ignore_errors=True)
        for file in () if old.place else old.files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, file.name))

    def _is_current(self, place: str) -> bool:
        """Whether another save has replaced this one since; while it did that, it was locked."""
        return manifests.read(self.folder, self._op, files=False).place == place

    def hand_over(self) -> None:
        """Another thread goes on with it, and calls `close`: `new_folder` does not."""
        self._handed_over = True

    def close(self) -> None:
        """Unlocks the temporary folder."""
        if self._lock >= 0:
            close_quietly(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Removes what was written, after a failure. On the leader; a no-op elsewhere."""
        if not self._ranks.leader:
            return
        moved = self._moving and not os.path.lexists(os.path.join(self.path, NAME))
        # else a power failure could bring the new name back, without its files
        if self.path and not moved and not self._undone:
            shutil.rmtree(self.path, ignore_errors=True)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                os.rmdir(path)


@contextlib.contextmanager
def new_folder(
    folder: str | os.PathLike[str], op: str, ranks: Ranks, *, overwrite: bool = False
) -> Iterator[NewFolder | NewPrefix]:
    """Yields a folder to write to and to finish; removes it after an error. Collective.

    Args:
        folder: must not exist, unless ``overwrite``; its parent is created.
        overwrite: replace a complete checkpoint at ``folder``.

    Raises:
        CheckpointError: ``folder`` exists, cannot be created, or is not visible on some rank.
        ValueError: the ranks got different folders, or a URL that cannot be used.
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
        new.close()
        raise
    if not new._handed_over:
        new.close()


def absolute(folder: str | os.PathLike[str], op: str, *, package: bool = True) -> str:
    """``folder`` as an absolute path; symlinks are resolved only if it ends in "", "." or "..".

    A URL stays what it is; ``package`` as for `any_path`.
    """
    path = any_path(op, folder, package=package)
    if is_remote(path):
        return path
    with reporting(path, f"{op} to"):
        path = os.path.join(os.getcwd(), path).rstrip("/") or "/"
        return os.path.realpath(path) if os.path.basename(path) in ("", ".", "..") else path


def _exists(path: str) -> bool:
    """Whether the path exists, also as a broken symlink. Raises OSError if that is unknown."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _synced(path: str) -> bool:
    try:
        sync_path(path)
    except OSError:
        return False
    return True


def _replaceable(folder: str, op: str) -> Manifest:
    """The manifest in ``folder``. Raises CheckpointError unless it is a complete checkpoint."""
    reason = "not a folder"
    if stat.S_ISDIR(os.lstat(folder).st_mode):
        try:
            return manifests.read(folder, op)
        except CheckpointError as error:
            reason, number = str(error), error.errno
    else:
        number = None
    raise not_replaceable(op, folder, reason, number)
