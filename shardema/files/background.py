"""Saves that a thread writes while training goes on.

::

    call      the ranks agree, create the folder, and keep the values as they are
    thread    writes this rank's file, then .rank-00001.json beside it: its entry, or its error,
              or nothing where no room is left to say it
    leader's  writes its file, waits for the others' entries, and commits
    result    the ranks agree on whether it was committed

The threads use no collective and no message, which could mix with those of the training: they
exchange files in the new folder, local or in a store, which all ranks see.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from shardema.errors import CheckpointError, RankError
from shardema.files import places, remote
from shardema.files.folder import NewFolder
from shardema.files.manifest import MAX_MANIFEST
from shardema.files.prefix import NewPrefix
from shardema.files.safetensors import reporting
from shardema.ranks.agree import Ranks, patience
from shardema.ranks.messages import mark_shared, packed, unpacked

_BEAT = 1.0  # seconds between two signs that the first rank is alive
_PAUSES = (0.01, 1.0)  # seconds between two looks for the other ranks' files, at first and at most


class PendingSave:
    """A save that is being written; returned by ``ShardedEMA.save(folder, wait=False)``.

    Attributes:
        finished: whether all ranks have agreed that it is complete, or has failed.
    """

    def __init__(
        self,
        new: NewFolder | NewPrefix,
        ranks: Ranks,
        write: Callable[[], Any],
        commit: Callable[[Sequence[Any]], None],
        nbytes: int,
    ) -> None:
        self.finished: bool = False
        self._new, self._ranks, self._nbytes = new, ranks, nbytes
        self._work: tuple[Callable[[], Any], Callable[[Sequence[Any]], None]] | None
        self._work = write, commit
        self._error: BaseException | None = None
        self._late = False  # the thread has waited for other ranks in vain
        self._unsaid = False  # a rank has failed and could not write why
        _unfinished.append(self)
        # not a daemon: the interpreter waits for it
        self._thread = threading.Thread(target=self._run, name="shardema-save")
        self._thread.start()

    def __repr__(self) -> str:
        state = "finished on this rank" if self.done() else "being written"
        return f"PendingSave({self._new.folder!r}, {state})"

    def done(self) -> bool:
        """Whether this rank's thread has ended. Local.

        On the first rank: whether the checkpoint is complete, or has failed.
        """
        return not self._thread.is_alive()

    def result(self) -> None:
        """Waits until the checkpoint is complete. Collective; may be called again.

        Raises:
            CheckpointError: a rank could not write; nothing is left behind. Raised on all ranks.
            RankError: a rank did not write its part, or did not make this call, within the timeout.
        """
        # an interrupt on a rank is raised on all, and leaves the save unfinished
        errors = self._ranks.agree(
            "save (finishing)",
            self._outcome,
            self._reasons,
            nbytes=self._nbytes,
            known_late=lambda: self._late,
        )
        self.finished = True
        if errors:
            self._new.discard()  # again: a rank that was given up may have written since
            raise mark_shared(unpacked(errors[0], self._ranks.rank)) from self._error

    def join(self) -> None:
        """Waits for this rank's thread. Local. Raises what went wrong on this rank."""
        self._thread.join()
        if self in _unfinished:
            _unfinished.remove(self)
        if self._error is not None:
            raise self._error

    def _outcome(self) -> dict[str, Any] | None:
        while self._ranks.leader and self._ranks.size > 1 and self._thread.is_alive():
            self._ranks.beat()  # it may be waiting for a rank that is gone, and the others for it
            self._thread.join(_BEAT)
        try:
            self.join()
        except BaseException as error:
            if error is not self._error:
                raise
            return {**packed(error, self._ranks.rank), "unsaid": self._unsaid}
        return None

    def _reasons(self, told: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
        """The ranks' errors, the one that tells the cause first."""
        errors = [error for error in told if error is not None]
        return sorted(errors, key=lambda error: bool(error.get("unsaid")))

    def _run(self) -> None:
        try:
            with remote.patience(self._ranks.timeout):
                self._write()
        except BaseException as error:
            self._error = error
            self._new.discard()
        finally:
            self._work = None  # and with it the values
            self._new.close()

    def _write(self) -> None:
        assert self._work is not None
        write, commit = self._work
        if self._ranks.leader:
            commit([write(), *self._entries()])
            return
        try:
            self._tell(json.dumps({"told": write()}).encode())
        except BaseException as error:
            self._tell_failure(error)
            raise

    def _tell_failure(self, error: BaseException) -> None:
        """Where not even that can be written, the first rank waits in vain."""
        why = json.dumps({"error": packed(error, self._ranks.rank)}).encode()
        for entry in (why, b""):  # a full disk still takes a name
            with contextlib.suppress(CheckpointError):
                self._tell(entry)
                return

    def _entry(self, index: int) -> str:
        return os.path.join(self._new.path, f".rank-{index:05d}.json")

    def _tell(self, entry: bytes) -> None:
        """Writes this rank's entry, whole from the moment that it is there."""
        path = self._entry(self._ranks.index)
        with reporting(path, "writing"):
            places.put(path, entry)

    def _entries(self) -> list[Any]:
        """On the first rank: what the others have told of their files. Removes the entries."""
        found: dict[int, Any] = {}
        missing = list(range(1, self._ranks.size))
        end, pause = time.monotonic() + patience(self._ranks.timeout, self._nbytes), _PAUSES[0]
        while missing:
            with reporting(self._new.path, "reading"):
                names = places.names_in(self._new.path)
            for index in [i for i in missing if os.path.basename(self._entry(i)) in names]:
                entry = self._taken(self._entry(index))
                if not entry:
                    self._unsaid = True
                    raise self._of_failed(self._ranks.ranks[index])
                if "error" in entry:
                    raise unpacked(entry["error"], self._ranks.rank)
                found[index] = entry["told"]
                missing.remove(index)
            if missing:
                if time.monotonic() > end:
                    self._late = True
                    raise self._of_late(missing)
                time.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
        return [found[index] for index in sorted(found)]

    def _taken(self, path: str) -> dict[str, Any]:
        """A rank's entry, which is removed: left in a store that denies it, it does no harm.

        Empty from a rank that could not write why it has failed; `result` will tell.
        """
        data = places.read_whole(path, MAX_MANIFEST)
        entry: dict[str, Any] = json.loads(data) if data else {}
        with contextlib.suppress(OSError, CheckpointError):
            places.remove(path)
        return entry

    def _of_failed(self, rank: int) -> RankError:
        return RankError(
            f"rank {rank}: save to {self._new.folder}: it could not write its part, nor why; the "
            "checkpoint was abandoned, and earlier ones are unchanged",
            rank=rank,
            path=self._new.folder,
        )

    def _of_late(self, missing: list[int]) -> RankError:
        ranks = [self._ranks.ranks[index] for index in missing]
        return RankError(
            f"save to {self._new.folder}: ranks {ranks} did not write their part in time; the "
            "checkpoint was abandoned, and earlier ones are unchanged",
            rank=ranks[0],
            path=self._new.folder,
        )


_unfinished: list[PendingSave] = []


def _at_exit() -> None:
    """Ends the process with status 1 if a save that nobody waited for has failed."""
    failed = [one for one in _unfinished if one._error is not None]  # the threads have ended
    for one in failed:
        print(f"shardema: {one._error}", file=sys.stderr)
    if failed:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_at_exit)
