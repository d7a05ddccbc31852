"""`CheckpointManager`: saves checkpoints by step, removes old ones, resumes from the newest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shardema.ema import ShardedEMA
from shardema.errors import ArgumentError, ArgumentTypeError, CheckpointError, abbreviate, logger
from shardema.files import manifest, remote, verify
from shardema.files.background import PendingSave
from shardema.files.folder import absolute
from shardema.files.places import any_path
from shardema.files.steps import MAX_STEP, StepsWriter, surplus
from shardema.files.stored_steps import steps_in

log = logger(__name__)


class CheckpointManager(StepsWriter):
    """Saves averages every ``every`` steps, removes old checkpoints, and resumes from the newest.

    ::

        with CheckpointManager(ema, "run/average", every=1000, keep_last=3) as manager:
            start = manager.resume() or 0
            for step in range(start + 1, stop + 1):
                ...
                ema.update()
                manager.step(step)

    Each step has a folder ``step-00001000`` in ``dir``, a checkpoint of `ShardedEMA.save`. The
    first rank locks ``dir`` while the manager is open; in an object store, where there are no
    locks, a manager of another host that opens it later takes it over, and this one raises. All
    methods are collective; `close` is if a save is being written.

    Args:
        ema: the EMA to save and load.
        dir: the directory, or its URL in an object store, created on first use. Only one run may
            write to it at a time.
        every: `step` saves at multiples of it.
        keep_last: how many of the newest steps are kept; None keeps all.
        keep_every: steps that are multiples of it are never removed.
        include_frozen: as for `ShardedEMA.save`.
        wait: if False, a thread writes the averages as they are at the call while training goes on;
            see `ShardedEMA.save`. The next save, `resume`, `latest` and `close` wait for it and
            raise its error; steps are removed only after it.

    Raises:
        ValueError, TypeError: a number that is not an integer of 1 or more, a URL that cannot be
            used, or ``ema`` is not a `ShardedEMA`. A package that the URL needs and that is missing
            is a ValueError of the calls, on all ranks.
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
            raise ArgumentTypeError(
                f"CheckpointManager: got {type(ema).__name__}, expected a ShardedEMA"
            )
        self._ema = ema
        self._ranks = ema.internal.averages.ranks
        self._every = _positive_int("every", every)
        self._keep_last = None if keep_last is None else _positive_int("keep_last", keep_last)
        self._keep_every = None if keep_every is None else _positive_int("keep_every", keep_every)
        self._include_frozen, self._wait = include_frozen, bool(wait)
        self._pending: _Pending | None = None
        op = "CheckpointManager"
        self._steps = steps_in(op, absolute(dir, op, package=False))
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
        same = {"step": step, **self._policy()}
        replace = self._open("save", lambda: self._prepare(step), same)
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

        present, made = self._open("resume", self._look, {"step": step, "model": model})
        if step is not None and step not in present:
            raise CheckpointError(
                f"resume from {self._steps.folder}: there is no step {step}, only "
                f"{abbreviate([str(s) for s in present]) or 'an empty directory'}",
                path=self._steps.folder,
            )
        wanted = present if step is None else [step]

        def load(candidate: int) -> None:
            self._ema.load(self._steps.path(candidate), model=model)

        newest = self._newest("resume from", wanted, load)
        self._resumed = True
        if newest is not None:
            self._last = newest
            self._abandoned = [s for s in made if s > newest]
        return newest

    def latest(self) -> int | None:
        """The newest step that is undamaged, to its last byte; nothing is loaded. Collective.

        For a trainer that asks which of its own checkpoints to load before `resume`. The ranks
        share the reading. A step that is damaged or incomplete is skipped, with a warning.

        Returns:
            The step, on all ranks; None if ``dir`` has none.

        Raises:
            CheckpointError: there are steps and none is undamaged; another manager uses ``dir``.
        """
        self._finish()
        present, _ = self._open("latest", self._look, {})
        return self._newest("latest step of", present, self._verify)

    def _look(self) -> list[list[int]]:
        return [self._steps.present(), self._steps.recorded()]

    def _open(self, op: str, then: Callable[[], Any], same: dict[str, Any]) -> Any:
        """Opens ``dir`` on the leader and returns what ``then`` does there. Collective."""
        op, folder = f"CheckpointManager.{op}", self._steps.folder

        def reply(_: list[Any]) -> Any:
            self._steps.open()
            self._steps.sweep()
            return then()

        with remote.patience(self._ranks.timeout):
            return self._ranks.agree(
                op, lambda: any_path(op, folder), reply, same={"dir": folder, **same}
            )

    def _newest(self, op: str, steps: list[int], use: Callable[[int], None]) -> int | None:
        """The newest of the steps that ``use`` does not raise a CheckpointError for."""
        skipped: list[tuple[int, CheckpointError]] = []
        for step in reversed(steps):
            try:
                use(step)
            except CheckpointError as error:  # the same on all ranks
                skipped.append((step, error))
                continue
            self._warn_skipped(op, skipped, step)
            return step
        if not skipped:
            return None
        _, reason = skipped[0]
        raise CheckpointError(
            f"{op} {self._steps.folder}: {_none_of(skipped)}",
            rank=reason.rank,
            path=self._steps.folder,
            errno=reason.errno,
        ) from reason

    def _verify(self, step: int) -> None:
        """Raises CheckpointError unless a step is undamaged; each rank reads some of its files."""
        path, ranks = self._steps.path(step), self._ranks

        def read() -> None:
            stored = manifest.read(path, "latest")
            for file in stored.files[ranks.index :: ranks.size]:
                for damage in verify.damages(stored, file):
                    raise CheckpointError(f"reading {damage.path}: {damage.reason}", path=path)

        with remote.patience(ranks.timeout):
            nbytes = ranks.agree("latest (looking)", None, lambda _: verify.size_of(path))
            ranks.agree("latest (reading)", read, nbytes=nbytes)

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

    # ---- on the leader ------------------------------------------------------------------------

    def _policy(self) -> dict[str, Any]:
        return {"keep_last": self._keep_last, "keep_every": self._keep_every}

    def _prepare(self, step: int) -> bool:
        """Records the step before it is written; returns whether it replaces a checkpoint."""
        if step <= self._last:
            raise ArgumentError(
                f"CheckpointManager.save: got step {step} after step {self._last}, expected a "
                "later one; to continue from an earlier step call resume(step=...) first"
            )
        present, made = self._steps.present(), self._steps.recorded()
        later = [s for s in made if s >= step and s in present]
        if later and not self._resumed and self._last < 0:
            raise ArgumentError(
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
            with remote.patience(self._ranks.timeout):
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

    def _warn_skipped(self, op: str, skipped: list[tuple[int, CheckpointError]], step: int) -> None:
        if self._ranks.leader:
            for other, error in skipped:
                log.warning(
                    "%s %s: step %d was skipped, step %d is the newest that can be loaded: %s",
                    op,
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


def _none_of(skipped: list[tuple[int, CheckpointError]]) -> str:
    """That none of the steps can be loaded, and why the newest two cannot: they may differ."""
    (first, reason), *others = skipped
    if not others:
        return f"step {first} cannot be loaded: {reason}"
    second, other = others[0]
    steps = abbreviate([str(step) for step, _ in skipped])
    return (
        f"none of the steps {steps} can be loaded; step {first}: {reason}; step {second}: {other}"
    )


def _positive_int(name: str, value: Any) -> int:
    text = f"CheckpointManager: got {name}={value!r}, expected an integer of 1 or more"
    if type(value) is not int:
        raise ArgumentTypeError(text)
    if value < 1:
        raise ArgumentError(text)
    return value


def _checked_step(op: str, value: Any) -> int:
    if type(value) is not int:
        raise ArgumentTypeError(f"CheckpointManager.{op}: got step {value!r}, expected an integer")
    if not 0 <= value < MAX_STEP:
        raise ArgumentError(
            f"CheckpointManager.{op}: got step {value}, expected 0 or more and below {MAX_STEP}"
        )
    return value
