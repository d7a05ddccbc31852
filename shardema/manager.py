"""`CheckpointManager`: the checkpoints of a run, by step: when, which to keep, where to resume."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal

from shardema.ema import ShardedEMA
from shardema.errors import CheckpointError, abbreviate
from shardema.files import manifest
from shardema.files.folder import absolute
from shardema.files.safetensors import local_path
from shardema.files.steps import MAX_STEP, Steps

log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves averages every so many steps, keeps the ones you want, and resumes from the newest.

    ::

        with CheckpointManager(ema, "run/average", every=1000, keep_last=3) as manager:
            start = manager.resume() or 0
            for step in range(start + 1, stop + 1):
                ...
                ema.update()
                manager.step(step)

    Each step has a folder ``step-00001000`` in ``dir``, a checkpoint of `ShardedEMA.save`. The
    first rank locks ``dir`` while the manager is open. All methods but `close` are collective.

    Args:
        ema: what is saved and loaded.
        dir: the directory; made when it is first used. One run writes to it at a time.
        every: `step` saves at multiples of it.
        keep_last: how many of the newest steps are kept; None keeps all.
        keep_every: steps that are multiples of it are kept for ever, beside the newest.
        include_frozen: as for `ShardedEMA.save`.

    Raises:
        ValueError, TypeError: a number that is no integer of 1 or more, or a path that is not
            local.
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
    ) -> None:
        if not isinstance(ema, ShardedEMA):
            raise TypeError(f"CheckpointManager: got {type(ema).__name__}, expected a ShardedEMA")
        self._ema = ema
        self._ranks = ema.internal.averages.ranks
        self._every = _whole("every", every)
        self._keep_last = None if keep_last is None else _whole("keep_last", keep_last)
        self._keep_every = None if keep_every is None else _whole("keep_every", keep_every)
        self._include_frozen = include_frozen
        self._steps = Steps(absolute(local_path("CheckpointManager", dir), "CheckpointManager"))
        self._last = -1  # the step that was saved or resumed from
        self._resumed = False
        self._abandoned: list[int] = []  # steps beyond the one that was resumed from

    def __repr__(self) -> str:
        keep = f"keep_last={self._keep_last}, keep_every={self._keep_every}"
        return f"CheckpointManager({self._steps.folder!r}, every={self._every}, {keep})"

    def step(self, step: int) -> bool:
        """Saves if ``step`` is a multiple of ``every``; whether it did. Collective if it does.

        Args:
            step: the number of optimizer steps so far, rising from call to call.

        Raises:
            As `save`.
        """
        if _checked_step("step", step) % self._every:
            return False
        self.save(step)
        return True

    def save(self, step: int) -> None:
        """Saves now, then removes the steps that are not to be kept. Collective.

        A step that this run, or the one that it resumes, saved before is replaced atomically. A
        step that cannot be removed is a warning.

        Raises:
            ValueError: no integer of 0 or more, not above the step of the last save, differing
                between ranks, or ``dir`` has steps of a run that was not resumed.
            CheckpointError: a write failed, ``dir`` belongs to another manager, or has a folder of
                this name that no manager saved. Earlier steps are as before, and the next save
                needs no cleaning up.
        """
        _checked_step("save", step)
        path = self._steps.path(step)

        def prepare(_: list[Any]) -> bool:
            self._steps.open()
            self._steps.sweep()
            return self._prepare(step)

        same = {"step": step, "dir": self._steps.folder, **self._policy()}
        replace = self._ranks.agree("CheckpointManager.save", None, prepare, same=same)
        self._ema.save(path, include_frozen=self._include_frozen, overwrite=replace)
        self._last, abandoned, self._abandoned = step, self._abandoned, []
        if self._ranks.leader:
            self._rotate(step, abandoned)

    def resume(
        self, step: int | None = None, *, model: Literal["check"] | None = "check"
    ) -> int | None:
        """Loads the newest step that is undamaged and belongs to the model's weights. Collective.

        Load the model's own checkpoint first. A step that is damaged or incomplete, or that was
        saved with other weights than the model has now, is skipped with a warning that says why.
        The next save removes the steps after the one that was loaded: they belong to a run that is
        not continued.

        Args:
            step: this one and no other, for instance the step of the trainer's own checkpoint.
            model: None does not compare the model's weights.

        Returns:
            The step; None if ``dir`` has none.

        Raises:
            CheckpointError: there are steps and none can be loaded, or ``step`` cannot; ``dir``
                belongs to another manager.
            ValueError: as `ShardedEMA.load`: a checkpoint of another model, for instance.
        """
        if step is not None:
            _checked_step("resume", step)

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
            self._tell_skipped(skipped, candidate)
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
        """Unlocks ``dir``; the manager may be used again, and locks it then. Local."""
        self._steps.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # its constructor raised
            self.close()

    # ---- on the leader ------------------------------------------------------------------------

    def _policy(self) -> dict[str, Any]:
        return {"keep_last": self._keep_last, "keep_every": self._keep_every}

    def _prepare(self, step: int) -> bool:
        """Records the step before it is written; whether there is a checkpoint to replace."""
        if step <= self._last:
            raise ValueError(
                f"CheckpointManager.save: got step {step} after step {self._last}, expected a "
                "later one; to go on from an earlier step call resume(step=...) first"
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
        if step in present and not self._is_whole(step):  # a replacement needs a whole one
            self._steps.remove([step])
            return False
        return step in present

    def _is_whole(self, step: int) -> bool:
        try:
            manifest.read(self._steps.path(step))
        except CheckpointError:
            return False
        return True

    def _rotate(self, newest: int, abandoned: list[int]) -> None:
        """Removes what is not kept, unless the step that was just saved cannot be read."""
        try:
            present = self._steps.present()  # a save that failed was recorded too
            made = [s for s in self._steps.recorded() if s in present]
            surplus = list(self._surplus(made, abandoned, newest))
            if surplus and self._is_whole(newest):
                gone = self._steps.remove(surplus)
                self._steps.record(set(made) - set(gone))
        except (OSError, CheckpointError) as error:  # the step is saved
            log.warning("%s: not cleaned up: %s", self._steps.folder, error)

    def _surplus(self, made: list[int], abandoned: list[int], newest: int) -> Iterator[int]:
        current = [s for s in made if s == newest or s not in abandoned]
        kept = set(current if self._keep_last is None else current[-self._keep_last :])
        for step in made:
            multiple = self._keep_every is not None and step % self._keep_every == 0
            if step not in current or not (step in kept or multiple):
                yield step

    def _tell_skipped(self, skipped: list[tuple[int, CheckpointError]], step: int) -> None:
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


def _whole(name: str, value: Any) -> int:
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
