"""The directory of a manager in a store, which has no locks, no rename and no clock of ours.

::

    s3://bucket/run/average/
        manager.json                     the steps, who has the directory, who may still write
        step-00001000/shardema.json      put last: a step without one does not exist
        step-00001000/save-XXXXXXXXXXXXXXXX/...

Who opens the directory writes a mark of its own into the record, and every later call looks for it.
A manager whose process is known to run is not overtaken; one whose process has ended, or runs on
another host, is: there nothing can be known, and a run that was killed must be able to go on. If
that one still runs, its next call finds the other mark and raises, before it changes anything.

What unfinished saves left is removed on opening, if all who might still write it are known to have
ended, or if it is older than `AGE`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from shardema.errors import CheckpointError, logger
from shardema.files import manifest, remote, writers
from shardema.files.manifest import PLACE
from shardema.files.places import any_path, read_whole
from shardema.files.remote import is_remote
from shardema.files.safetensors import BROKEN, parse_json
from shardema.files.steps import (
    MAX_RECORD,
    RECORD,
    STEP,
    Steps,
    damaged_record,
    name_of,
    opened_elsewhere,
    steps_of,
)

log = logger(__name__)

AGE = timedelta(days=1)  # parts that are older are of no save that still runs
_CLEANING_S = 5.0  # seconds for what is done at the end
_open: set[str] = set()  # marks of the managers in this process


def steps_in(op: str, folder: str | os.PathLike[str]) -> Steps:
    """The steps in a local directory or in a store.

    Raises:
        ValueError: a URL that cannot be used, but for a missing package, which calls will raise.
    """
    path = any_path(op, folder, package=False)
    return StoredSteps(path) if is_remote(path) else Steps(path)


class StoredSteps(Steps):
    """As `Steps`, in a store."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._mark = ""  # of this manager, while it has the directory
        self._others: dict[str, dict[str, Any]] = {}  # who may still write, by mark
        self._unfinished: set[int] = set()  # steps with parts that were left alone
        self._swept = False

    @property
    def _record(self) -> str:
        return os.path.join(self.folder, RECORD)

    def open(self, *, take_over: bool = True) -> None:
        """Writes this manager's mark into the record.

        Args:
            take_over: also if a manager on another host has not closed the directory.

        Raises:
            CheckpointError: another manager has the directory, or it cannot be written.
        """
        if self._mark:
            return
        found = self._read()
        holder = found["holder"]
        process = found["writers"].get(holder, {})
        who = f" ({process.get('host')}, process {process.get('pid')})"
        elsewhere = bool(holder) and not writers.has_ended(process)
        if holder in _open or (holder and writers.is_running(process) and not _is_ours(process)):
            raise opened_elsewhere(self.folder, who)
        if elsewhere and not take_over:
            raise CheckpointError(
                f"opening {self.folder}: the CheckpointManager of {process.get('host')}, process "
                f"{process.get('pid')}, has not closed it; if that process has ended, take the "
                "directory over: --take-over",
                path=self.folder,
            )
        if elsewhere and not _is_ours(process):
            log.warning(
                "%s: the CheckpointManager of %s, process %s, has not closed it; if that process "
                "still runs, its next save raises",
                self.folder,
                process.get("host"),
                process.get("pid"),
            )
        self._others = {m: p for m, p in found["writers"].items() if not writers.has_ended(p)}
        mark = secrets.token_hex(8)
        self._put(found["steps"], mark, {**self._others, mark: writers.this_process()})
        self._mark, self._swept = mark, False
        _open.add(mark)

    def close(self) -> None:
        """Takes the mark out of the record, if that can be done soon."""
        if self._mark:
            with contextlib.suppress(CheckpointError), remote.patience(2 * _CLEANING_S):
                self._put(self.recorded(), "", self._others)
        self.abandon()

    def abandon(self) -> None:
        """Leaves the mark in the record; this process may open the directory again."""
        _open.discard(self._mark)
        self._mark = ""

    def present(self) -> list[int]:
        """All steps with a manifest, ascending."""
        return sorted(step for step, inside in self._inside().items() if manifest.NAME in inside)

    def _inside(self) -> dict[int, set[str]]:
        """The names in the folder of each step, and the paths in the folders in it."""
        found: dict[int, set[str]] = collections.defaultdict(set)
        for path in remote.tree(self.folder):
            name, _, rest = path.partition("/")
            match = STEP.fullmatch(name)
            if match and name == name_of(int(match[1])):
                found[int(match[1])].add(rest)
        return found

    def recorded(self) -> list[int]:
        """As `Steps.recorded`. Raises CheckpointError if another manager has the directory now."""
        found = self._read()
        if self._mark and found["holder"] != self._mark:
            process = found["writers"].get(found["holder"], {})
            raise CheckpointError(
                f"reading {self._record}: the CheckpointManager of {process.get('host')}, process "
                f"{process.get('pid')}, has taken {self.folder} over, so that this one no longer "
                "writes to it; end one of the two runs, and give each a directory of its own",
                path=self.folder,
            )
        steps: list[int] = found["steps"]
        return steps

    def record(self, steps: Iterable[int]) -> None:
        """Replaces the record, in one request."""
        self.recorded()  # is it still ours?
        mine = {self._mark: writers.this_process()}
        self._put({*steps, *self._unfinished}, self._mark, {**self._others, **mine})

    def _read(self) -> dict[str, Any]:
        """The record; what is missing in it is empty."""
        try:
            found = parse_json(read_whole(self._record, MAX_RECORD))
            return {
                "steps": steps_of(found),
                "holder": str(found.get("holder", "")),
                "writers": {str(m): dict(p) for m, p in dict(found.get("writers", {})).items()},
            }
        except CheckpointError as error:
            if error.errno != errno.ENOENT:
                raise
            return {"steps": [], "holder": "", "writers": {}}
        except BROKEN as error:
            raise damaged_record(self._record, error) from error

    def _put(self, steps: Iterable[int], holder: str, processes: dict[str, Any]) -> None:
        body = {"steps": sorted(set(steps)), "holder": holder, "writers": processes}
        remote.put(self._record, json.dumps(body).encode())

    def remove(self, steps: Iterable[int]) -> list[int]:
        """As `Steps.remove`; the manifest goes first, so no reader finds half a checkpoint."""
        gone = []
        for step in steps:
            try:
                remote.delete(os.path.join(self.path(step), manifest.NAME))
                self._unfinished.add(step)
                remote.delete(self.path(step), folder=True)
            except CheckpointError as error:
                log.warning("%s: cannot be removed: %s", self.path(step), error)
                continue
            self._unfinished.discard(step)
            gone.append(step)
        return gone

    def sweep(self) -> None:
        """Removes what unfinished saves left, once after opening: later none can come but ours."""
        if self._swept:
            return
        try:
            for step, places in self._left().items():
                for place, paths in places.items():
                    if self._may_go(step, paths):
                        remote.delete(os.path.join(self.path(step), place), folder=True)
                    else:
                        self._unfinished.add(step)
        except CheckpointError as error:
            log.warning("%s: cannot be cleaned up: %s", self.folder, error)
        self._swept = True

    def _left(self) -> dict[int, dict[str, list[str]]]:
        """By step and name of the folder, the objects of saves that no manifest names."""
        found: dict[int, dict[str, list[str]]] = {}
        for step, inside in self._inside().items():
            places: dict[str, list[str]] = collections.defaultdict(list)
            for path in inside:
                place = path.partition("/")[0]
                if PLACE.fullmatch(place):
                    places[place].append(os.path.join(self.path(step), path))
            if manifest.NAME in inside:
                # the manifest names one of them; it is read only if there are others
                named = self._named(step, set(places)) if len(places) > 1 else set(places)
                places = {name: places[name] for name in places.keys() - named}
            if places:
                found[step] = places
        return found

    def _named(self, step: int, places: set[str]) -> set[str]:
        """The folder that the manifest of a step names; all of them if it cannot be read."""
        try:
            return {manifest.read(self.path(step), "CheckpointManager", files=False).place}
        except CheckpointError:
            return places

    def _may_go(self, step: int, paths: list[str]) -> bool:
        if not self._others and step in self.recorded():
            return True
        now = remote.modified(self._record)  # by the clock of the store: it was written just now
        times = [remote.modified(path) for path in paths]
        return now is not None and all(time is not None and now - time > AGE for time in times)


def _is_ours(process: dict[str, Any]) -> bool:
    """Whether it is this process, which may still write for a manager that was abandoned."""
    return process == writers.this_process()
