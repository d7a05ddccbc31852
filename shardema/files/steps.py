"""The checkpoints of a run, one folder for each step, in a directory that one manager writes to.

::

    run/average/
        .lock                  held with flock by the manager that writes here
        manager.json           the steps that a manager saved, so that it removes nothing else
        step-00001000/         a checkpoint of ema.save
        step-00002000/
        .step-00003000.*.tmp   being written; locked as long as its writer runs

Everything in this file is local: the leader calls it. A directory in a store is another one, see
stored_steps.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable
from types import TracebackType
from typing import Any, TypeVar

from shardema.errors import CheckpointError, abbreviate, logger
from shardema.files.locks import abandoned, lock
from shardema.files.safetensors import (
    BROKEN,
    checked_int,
    close_quietly,
    make_folders,
    parse_json,
    read_whole,
    reporting,
    sync_path,
    write_file,
)

log = logger(__name__)

RECORD = "manager.json"
LOCK = ".lock"
MAX_STEP = 10**15
MAX_RECORD = 1 << 24  # bytes
STEP = re.compile(r"step-([0-9]{8,16})")
_TEMPORARY = re.compile(r"\.step-[0-9]{8,16}\.[0-9a-f]{8}\.(tmp|old)")
_TEMPORARY_RECORD = re.compile(r"manager\.json\.[0-9a-f]{8}\.tmp")


def name_of(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def surplus(made: Iterable[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """The steps, of all that a manager made, that it does not keep.

    >>> surplus([2, 4, 6, 8], keep_last=1, keep_every=6)
    [2, 4]
    """
    steps = sorted(made)
    kept = set(steps if keep_last is None else steps[-keep_last:])
    return [s for s in steps if s not in kept and (keep_every is None or s % keep_every)]


class Steps:
    """The steps in ``folder``, which `open` creates and locks."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._lock = -1

    def open(self, *, take_over: bool = True) -> None:
        """Creates the directory if needed, and locks it.

        Args:
            take_over: see `StoredSteps.open`; here the lock says whether another manager runs.

        Raises:
            CheckpointError: another manager writes to it, or it cannot be written.
        """
        if self._lock >= 0:
            return
        with reporting(self.folder, "opening"):
            self._make()
            fd = os.open(
                os.path.join(self.folder, LOCK),
                os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                0o666,
            )
            try:
                free = lock(fd)
            except BaseException:
                close_quietly(fd)
                raise
        if not free:
            close_quietly(fd)
            raise opened_elsewhere(self.folder)
        self._lock = fd

    def _make(self) -> None:
        """Creates the directory durably, or not at all."""
        made: list[str] = []
        try:
            make_folders(self.folder, made)
        except BaseException:
            for path in reversed(made):
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            raise

    def close(self) -> None:
        """Unlocks the directory."""
        if self._lock >= 0:
            close_quietly(self._lock)
            self._lock = -1

    def abandon(self) -> None:
        """`close`, without waiting for anything: after an error, or from a finalizer."""
        self.close()

    def path(self, step: int) -> str:
        """Path of the checkpoint of a step."""
        return os.path.join(self.folder, name_of(step))

    def present(self) -> list[int]:
        """All steps that have a folder, ascending; whether they are complete is not looked at.

        A symlink is none: it leads out of the directory.
        """
        with reporting(self.folder, "reading"):
            try:
                names = os.listdir(self.folder)
            except FileNotFoundError:
                return []
            found = [int(match[1]) for match in map(STEP.fullmatch, names) if match]
            return sorted({step for step in found if self._has_folder(step)})

    def _has_folder(self, step: int) -> bool:
        try:  # `is_folder` would take a disk that fails for a step that is not there
            return stat.S_ISDIR(os.lstat(self.path(step)).st_mode)
        except FileNotFoundError:  # removed since it was listed
            return False

    def recorded(self) -> list[int]:
        """The steps that a manager saved here, or began to save, ascending."""
        path = os.path.join(self.folder, RECORD)
        try:
            return steps_of(parse_json(read_whole(path, MAX_RECORD)))
        except CheckpointError as error:
            if error.errno != errno.ENOENT:
                raise
            return []
        except BROKEN as error:
            raise damaged_record(path, error) from error

    def record(self, steps: Iterable[int]) -> None:
        """Replaces the record, atomically and durably."""
        path = os.path.join(self.folder, RECORD)
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        with reporting(path, "writing"):
            try:
                write_file(temporary, json.dumps({"steps": sorted(set(steps))}).encode())
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            sync_path(self.folder)

    def remove(self, steps: Iterable[int]) -> list[int]:
        """Removes checkpoints and returns those removed; logs a warning for a failure.

        Each folder is renamed first, so no reader finds half a checkpoint.
        """
        gone = {}
        for step in steps:
            hidden = os.path.join(self.folder, f".{name_of(step)}.{secrets.token_hex(4)}.old")
            try:
                os.rename(self.path(step), hidden)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("%s: cannot be removed: %s", self.path(step), error.strerror)
                continue
            gone[step] = hidden
        if _durable(self.folder, list(gone.values())):
            for path in gone.values():
                _remove_tree(path)
        return list(gone)

    def sweep(self) -> None:
        """Removes what killed writers left; the temporary folders of running ones are locked."""
        for name in sweep(self.folder, _TEMPORARY):
            if _TEMPORARY_RECORD.fullmatch(name):  # only who has the lock writes it
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.folder, name))


class StepsWriter:
    """An object that writes steps, and unlocks their directory at the end of a ``with`` block.

    Attributes:
        _steps: the directory, set by the constructor.
    """

    _steps: Steps

    def close(self) -> None:
        """Waits for a step that is being written, and unlocks the directory."""
        raise NotImplementedError

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # the other ranks may not come; a thread goes on, and the interpreter waits for it
            self._steps.abandon()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # its constructor raised
            self._steps.abandon()


_Writer = TypeVar("_Writer", bound=StepsWriter)


def sweep(folder: str, temporary: re.Pattern[str]) -> list[str]:
    """Removes the temporary folders in ``folder`` whose writers were killed; returns all names.

    Args:
        temporary: matches their names; those on ".old" are being removed, and have no writer.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        log.warning("%s: cannot be cleaned up: %s", folder, error.strerror)
        return []
    paths = [os.path.join(folder, name) for name in filter(temporary.fullmatch, names)]
    if _durable(folder, paths):
        for path in paths:
            with abandoned(path) as free:
                if free or path.endswith(".old"):
                    _remove_tree(path)
    return names


def _durable(folder: str, hidden: list[str]) -> bool:
    """Whether there are folders whose names have changed, and no power failure can undo that."""
    if not hidden:
        return False
    try:
        sync_path(folder)
    except OSError as error:
        log.warning("%s: cannot be cleaned up: %s", folder, error.strerror)
        return False
    return True


def steps_of(record: Any) -> list[int]:
    """The steps that a record lists, ascending. Raises one of `BROKEN` if it does not."""
    return sorted({checked_int(step) for step in record["steps"]})


def damaged_record(path: str, error: Exception) -> CheckpointError:
    """A record that cannot be read."""
    return CheckpointError(
        f"reading {path}: {error!r:.300}: the file is damaged; remove it: the manager then "
        "keeps every step that is there now",
        path=path,
    )


def opened_elsewhere(folder: str, who: str = "") -> CheckpointError:
    """A directory that another manager has open."""
    return CheckpointError(
        f"opening {folder}: another CheckpointManager writes to it{who}; give each run a "
        "directory of its own, or close() the other manager first",
        path=folder,
    )


def is_folder(path: str) -> bool:
    """Whether it is a folder itself, and no symlink to one."""
    return os.path.isdir(path) and not os.path.islink(path)


def _remove_tree(path: str) -> None:
    if not is_folder(path):  # of no manager; rmtree would open it, and wait at a FIFO
        return
    failed: list[str] = []

    def note(_: object, name: str, error: object) -> None:
        failed.append(name)

    shutil.rmtree(path, onerror=note)
    if failed:
        log.warning("%s: cannot be removed: %s", path, abbreviate(failed))
