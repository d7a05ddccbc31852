"""Removes the steps of a manager's directory that its rotation would, without the run's code."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from shardema.errors import CheckpointError
from shardema.files.places import is_there
from shardema.files.steps import RECORD, Steps, surplus
from shardema.files.stored_steps import steps_in
from shardema.files.verify import verify


@dataclass(frozen=True)
class Pruning:
    """What is removed of a directory, and what stays.

    Attributes:
        surplus: steps to remove, ascending.
        kept: the other steps, ascending.
        whole: the newest step that verifies, which always stays; -1 where there is nothing to
            remove, so that nothing was verified.
        removed: those that are gone.
    """

    folder: str
    surplus: tuple[int, ...]
    kept: tuple[int, ...]
    whole: int = -1
    removed: tuple[int, ...] = ()


def prune(
    folder: str | os.PathLike[str],
    *,
    keep_last: int,
    keep_every: int | None = None,
    remove: bool = False,
    take_over: bool = False,
    done: Callable[[int], object] = lambda n: None,
) -> Pruning:
    """Which steps a `CheckpointManager` with this policy would not keep; removes them if asked.

    The newest step that verifies, to its last block, stays whatever the policy says.

    Args:
        folder: a manager's directory.
        keep_last, keep_every: as of the manager.
        remove: remove them. The directory is locked meanwhile, as by a manager.
        take_over: in a store, also if a manager on another host has not closed the directory.
        done: told the number of bytes after each block that was verified.

    Raises:
        CheckpointError: no manager's directory, a manager has it open, or no step verifies.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    steps = steps_in("prune", folder)
    if not is_there(os.path.join(steps.folder, RECORD)):
        raise CheckpointError(
            f"reading {steps.folder}: no {RECORD} in it, so no CheckpointManager made what is "
            "there; give the directory of a manager",
            path=steps.folder,
        )
    if not remove:
        return _plan(steps, keep_last, keep_every, done)
    steps.open(take_over=take_over)
    try:
        plan = _plan(steps, keep_last, keep_every, done)
        gone = steps.remove(plan.surplus)
        if gone:
            steps.record(set(steps.recorded()) - set(gone))
    finally:
        steps.close()
    return Pruning(plan.folder, plan.surplus, plan.kept, plan.whole, tuple(gone))


def _plan(
    steps: Steps, keep_last: int, keep_every: int | None, done: Callable[[int], object]
) -> Pruning:
    present = steps.present()
    made = [step for step in steps.recorded() if step in present]
    unwanted = surplus(made, keep_last, keep_every)
    if not unwanted:
        return Pruning(steps.folder, (), tuple(present))
    whole = next((s for s in reversed(present) if not verify(steps.path(s), done).damages), None)
    if whole is None:
        raise CheckpointError(
            f"reading {steps.folder}: no step of it verifies, so none is removed; `shardema "
            "verify` says what is damaged",
            path=steps.folder,
        )
    going = tuple(step for step in unwanted if step != whole)
    kept = tuple(step for step in present if step not in going)
    return Pruning(steps.folder, going, kept, whole)
