"""`CheckpointManager`: saves checkpoints by step, removes old ones, resumes from the newest."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from shardema.ema import ShardedEMA
from shardema.errors import CheckpointError, abbreviate
from shardema.files import manifest
from shardema.files.background import PendingSave
from shardema.files.folder import absolute
from shardema.files.safetensors import local_path
from shardema.files.steps import MAX_STEP, Steps, surplus

log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves averages every ``every`` steps, removes old checkpoints, and resumes from the newest.

    ::

        with CheckpointManager(ema, "run/average", every=1000, keep_last=3) as manager:
            start = manager.resume() or 0
            for step in range(start + 1, stop + 1):
                ...
                ema.update()
                manager.step(step)

    Each step has a folder ``step-00001000`` in ``dir``, a checkpoint of `ShardedEMA.save`. The
    first rank locks ``dir`` while the manager is open. All methods are collective; `close` is if a
    save is being written.

    Args:
        ema: the EMA to save and load.
        dir: the directory, created on first use. Only one run may write to it at a time.
        every: `step` saves at multiples of it.
        keep_last: how many of the newest steps are kept; None keeps all.
        keep_every: steps that are multiples of it are never removed.
        include_frozen: as for `ShardedEMA.save`.
        wait: if False, a save returns once the averages are copied to host memory, and a thread
            writes them; see `ShardedEMA.save`. The next save, `resume` and `close` wait for it and
            raise its error; steps are removed only after it.

    Raises:
        ValueError, TypeError: a number that is not an integer of 1 or more, a path that is not
            local, or ``ema`` is not a `ShardedEMA`.
    """

    def __init__(
        self,
        ema: ShardedEMA,
        dir: str | os.PathLike[str],
        *,
        every: int = 1,
        keep_last: int | None = None,
        keep_every: int | None = None,
        include_frozen: bool = False,
        wait: bool = True,
    ) -> None:
        if not isinstance(ema, ShardedEMA):
            raise TypeError(f"CheckpointManager: got {type(ema).__name__}, expected a ShardedEMA")
        self._ema = ema
        self._ranks = ema.internal.averages.ranks
        self._every = _positive_int("every", every)
        self._keep_last = None if keep_last is None else _positive_int("keep_last", keep_last)
        self._keep_every = None if keep_every is None else _positive_int("keep_every", keep_every)
        self._include_frozen, self._wait = include_frozen, bool(wait)
        self._pending: _Pending | None = None
        self._steps = Steps(absolute(local_path("CheckpointManager", dir), "CheckpointManager"))
        self._last = -1  # the step that was saved or resumed from
        self._resumed = False
        self._abandoned: list[int] = []  # steps beyond the one that was resumed from

    def __repr__(self) -> str:
        keep = f"keep_last={self._keep_last}, keep_every={self._keep_every}"
        return f"CheckpointManager({self._steps.folder!r}, every={self._every}, {keep})"

    def step(self, step: int) -> bool:
        """Saves if ``step`` is a multiple of ``every``; returns whether it did. Collective then.

        Args:
            step: the number of optimizer steps so far, higher than at the last save.

        Raises:
            As `save`.
        """
        if _checked_step("step", step) % self._every:
            return False
        self.save(step)
        return True

    def save(self, step: int) -> None:
        """Saves now, then removes the steps that are not kept. Collective.

        A step that this run, or the one that it resumed, saved before is replaced atomically. A
        step that cannot be removed is logged as a warning.

        Args:
            step: an integer of 0 or more, above the step of the last save.

        Raises:
            ValueError: ``step`` is not above that, or differs between ranks; or ``dir`` has steps
                of a run that was not resumed.
            TypeError: ``step`` is not an integer.
            CheckpointError: a write failed, another manager uses ``dir``, or it has a folder of
                this name that no manager saved. Earlier steps are unchanged, and the next save may
                follow at once.
        """
        _checked_step("save", step)
        self._finish()
        path = self._steps.path(step)

        def prepare(_: list[Any]) -> bool:
            self._steps.open()
            self._steps.sweep()
            return self._prepare(step)

        same = {"step": step, "dir": self._steps.folder, **self._policy()}
        replace = self._ranks.agree("CheckpointManager.save", None, prepare, same=same)
        pending = self._ema.save(
            path, include_frozen=self._include_frozen, overwrite=replace, wait=self._wait
        )
        before, abandoned = self._last, self._abandoned
        self._last, self._abandoned = step, []
        if pending is not None:
            self._pending = _Pending(pending, step, before, abandoned)
        elif self._ranks.leader:
            self._rotate(step, abandoned)

    def _finish(self) -> None:
        """Waits for the save that is being written. Collective if there is one."""
        saving = self._pending
        if saving is None:
            return
        try:
            if not saving.save.finished:
                saving.save.result()
        except BaseException:
            if saving.save.finished:  # it has failed, and may be made again
                self._last, self._abandoned = saving.before, saving.abandoned
                self._pending = None
            raise
        self._pending = None
        if self._ranks.leader:
            self._rotate(saving.step, saving.abandoned)

    def resume(
        self, step: int | None = None, *, model: Literal["check"] | None = "check"
    ) -> int | None:
        """Loads the newest step that is undamaged and belongs to the model's weights. Collective.

        Load the model's own checkpoint first. A step that is damaged or incomplete, or that was
        saved with other weights than the model has now, is skipped, with a warning that gives the
        reason. The next save removes the steps after the loaded one: they belong to a run that is
        not continued.

        Args:
            step: load only this one, for instance the step of the trainer's own checkpoint.
            model: None does not compare the model's weights.

        Returns:
            The step; None if ``dir`` has none.

        Raises:
            CheckpointError: there are steps and none can be loaded, or ``step`` cannot; another
                manager uses ``dir``.
            ValueError: as `ShardedEMA.load`, for instance for a checkpoint of another model.
        """
        if step is not None:
            _checked_step("resume", step)

        self._finish()

        def look(_: list[Any]) -> list[list[int]]:
            self._steps.open()
            self._steps.sweep()
            return [self._steps.present(), self._steps.recorded()]

        same = {"step": step, "dir": self._steps.folder, "model": model}
        present, made = self._ranks.agree("CheckpointManager.resume", None, look, same=same)
        wanted = present if step is None else [step]
        skipped: list[tuple[int, CheckpointError]] = []
        for candidate in reversed(wanted):
            try:
                self._ema.load(self._steps.path(candidate), model=model)
            except CheckpointError as error:  # the same on all ranks
                skipped.append((candidate, error))
                continue
            self._warn_skipped(skipped, candidate)
            self._last, self._resumed = candidate, True
            self._abandoned = [s for s in made if s > candidate]
            return int(candidate)
        if not skipped:
            self._resumed = True
            return None
        first, reason = skipped[0]
        raise CheckpointError(
            f"resume from {self._steps.folder}: none of the steps "
            f"{abbreviate([str(s) for s, _ in skipped])} can be loaded; step {first}: {reason}",
            rank=reason.rank,
            path=self._steps.folder,
            errno=reason.errno,
        ) from reason

    def close(self) -> None:
        """Waits for a save that is being written, and unlocks ``dir``. Collective if there is one.

        The manager may be used again, and locks ``dir`` then.

        Raises:
            CheckpointError, RankError: the save failed.
        """
        try:
            self._finish()
        finally:
            self._steps.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # the other ranks may not come; the thread goes on, and the interpreter waits for it
            self._steps.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # its constructor raised
            self._steps.close()

    # ---- on the leader ------------------------------------------------------------------------

    def _policy(self) -> dict[str, Any]:
        return {"keep_last": self._keep_last, "keep_every": self._keep_every}

    def _prepare(self, step: int) -> bool:
        """Records the step before it is written; returns whether it replaces a checkpoint."""
        if step <= self._last:
            raise ValueError(
                f"CheckpointManager.save: got step {step} after step {self._last}, expected a "
                "later one; to continue from an earlier step call resume(step=...) first"
            )
        present, made = self._steps.present(), self._steps.recorded()
        later = [s for s in made if s >= step and s in present]
        if later and not self._resumed and self._last < 0:
            raise ValueError(
                f"CheckpointManager.save: got step {step}, and {self._steps.folder} has step "
                f"{later[-1]} of an earlier run; call resume() before the first save, or give a "
                "new directory"
            )
        if step not in made:
            if step in present:
                path = self._steps.path(step)
                raise CheckpointError(
                    f"save to {path}: it exists already, and no CheckpointManager made it; move "
                    "it, or give the manager a directory of its own",
                    path=path,
                )
            self._steps.record([*made, step])
        if step in present and not self._is_complete(step):  # save() replaces only complete ones
            self._steps.remove([step])
            return False
        return step in present

    def _is_complete(self, step: int) -> bool:
        try:
            manifest.read(self._steps.path(step))
        except CheckpointError:
            return False
        return True

    def _rotate(self, newest: int, abandoned: list[int]) -> None:
        """Removes the steps that are not kept, unless the newest one is incomplete."""
        try:
            present = self._steps.present()  # a save that failed was recorded too
            made = [s for s in self._steps.recorded() if s in present]
            current = [s for s in made if s == newest or s not in abandoned]
            kept = set(current) - set(surplus(current, self._keep_last, self._keep_every))
            unwanted = [s for s in made if s not in kept]
            if unwanted and self._is_complete(newest):
                gone = self._steps.remove(unwanted)
                self._steps.record(set(made) - set(gone))
        except (OSError, CheckpointError) as error:  # the step is saved
            log.warning("%s: not cleaned up: %s", self._steps.folder, error)

    def _warn_skipped(self, skipped: list[tuple[int, CheckpointError]], step: int) -> None:
        if self._ranks.leader:
            for other, error in skipped:
                log.warning(
                    "resume from %s: step %d was skipped, step %d is the newest that can be "
                    "loaded: %s",
                    self._steps.folder,
                    other,
                    step,
                    error,
                )


@dataclass(frozen=True)
class _Pending:
    """A save that is being written: its step, the one before it, and those not continued from."""

    save: PendingSave
    step: int
    before: int
    abandoned: list[int]


def _positive_int(name: str, value: Any) -> int:
    text = f"CheckpointManager: got {name}={value!r}, expected an integer of 1 or more"
    if type(value) is not int:
        raise TypeError(text)
    if value < 1:
        raise ValueError(text)
    return value


def _checked_step(op: str, value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"CheckpointManager.{op}: got step {value!r}, expected an integer")
    if not 0 <= value < MAX_STEP:
        raise ValueError(
            f"CheckpointManager.{op}: got step {value}, expected 0 or more and below {MAX_STEP}"
        )
    return value
