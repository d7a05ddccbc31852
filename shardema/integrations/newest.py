"""Which of a trainer's own checkpoints a run goes on from.

A trainer names and removes its checkpoints, and their averages are inside or beside them, so there
is no directory of a `CheckpointManager`. As `CheckpointManager.resume` does, `choose` takes the
newest one whose average is whole and belongs to its weights, and tells which it skipped and why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardema.errors import CheckpointError, logger
from shardema.files.steps import sweep
from shardema.files.verify import against, verify

log = logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a trainer.

    Attributes:
        path: as the trainer names it.
        averages: the folders of its averages.
        model: a folder or a file with its weights in the HF layout, or "".
        incomplete: why the trainer cannot have completed it, or "".
    """

    path: str
    averages: Sequence[str]
    model: str = ""
    incomplete: str = ""


def choose(op: str, candidates: Sequence[Candidate]) -> str:
    """The path of the first that can be resumed from; logs a warning for each before it. Local.

    Raises:
        CheckpointError: there is none.
    """
    skipped: list[tuple[str, str]] = []
    for candidate in candidates:
        problem = _problem(candidate)
        if not problem:
            for path, why in skipped:
                log.warning(
                    "%s: %s was skipped, %s is the newest that can be resumed from: %s",
                    op,
                    path,
                    candidate.path,
                    why,
                )
            return candidate.path
        skipped.append((candidate.path, problem))
    path, why = skipped[0]
    names = ", ".join(os.path.basename(path) for path, _ in skipped)
    raise CheckpointError(
        f"{op}: none of {names} can be resumed from; {path}: {why}; pass the path of a checkpoint "
        "that is to be loaded all the same",
        path=path,
    )


def _problem(candidate: Candidate) -> str:
    """Why a checkpoint cannot be resumed from; "" if it can, as far as its files tell."""
    if candidate.incomplete:
        return candidate.incomplete
    for average in candidate.averages:
        if interrupted(average):
            return f"its average {average} was being written when the run ended"
        if os.path.lexists(average):  # else it was saved without one, which the trainer's load says
            damages = verify(average).damages
            if damages:
                return f"its average is damaged: {damages[0].path}: {damages[0].reason}"
            torn = _torn(average, candidate.model) if candidate.model else ""
            if torn:
                return torn
    return ""


def _torn(average: str, model: str) -> str:
    try:
        found = against(average, model)
    except CheckpointError:  # in no format that is read here; `load` compares the model itself
        return ""
    torn = [one.reason for one in found if one.tensors]
    return f"its average is of other weights: {torn[0]}" if torn else ""


def interrupted(average: str) -> bool:
    """Whether a save to this folder was begun, and none is complete."""
    parent = os.path.dirname(average)
    if os.path.lexists(average) or not os.path.isdir(parent):
        return False
    return any(map(_temporary(average).fullmatch, os.listdir(parent)))


def sweep_beside(average: str) -> None:
    """Removes what killed saves to this folder have left beside it."""
    sweep(os.path.dirname(average), _temporary(average))


def _temporary(average: str) -> re.Pattern[str]:
    return re.compile(rf"\.{re.escape(os.path.basename(average))}\.[0-9a-f]{{8}}\.tmp")
