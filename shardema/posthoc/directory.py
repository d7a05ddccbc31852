"""The snapshots of a run: checkpoints by step in one directory, each saved after the one before.

::

    step-00001000  save_id a   follows -        all averages of it, with their profiles
    step-00002000  save_id b   follows a        a chain: a step that follows another save is of
    step-00003000  save_id c   follows b        another run, or one between them is missing
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files import manifest as manifests
from shardema.files.manifest import Manifest
from shardema.files.profiles import profile_in
from shardema.files.safetensors import local_path
from shardema.files.steps import Steps, name_of
from shardema.profiles import Profile
from shardema.schedules import restore


@dataclass(frozen=True)
class Snapshot:
    """One average of one step.

    Attributes:
        step: of its folder.
        name: of the average.
    """

    step: int
    name: str
    manifest: Manifest
    profile: Profile

    @property
    def t(self) -> float:
        """Time of the snapshot, in the unit of the clock."""
        return self.manifest.averages[self.name].t

    @property
    def label(self) -> str:
        return f"{name_of(self.step)}:{self.name}"


def read(folder: str | os.PathLike[str]) -> list[Snapshot]:
    """Every average of every step of a directory, by step. Local; reads the manifests only.

    Raises:
        CheckpointError: there is no step, one is damaged or incomplete, the steps are not of one
            run, or the averages of a step have different clocks.
        ValueError: an average whose tensors have different schedules; a path that is not local.
    """
    steps = Steps(local_path("posthoc.open", folder))
    if not os.path.isdir(steps.folder):
        raise CheckpointError(
            f"reading {steps.folder}: no such folder; give the directory of Snapshots",
            path=steps.folder,
        )
    present = steps.present()
    if not present:
        raise CheckpointError(
            f"reading {steps.folder}: no step in it, expected folders such as {name_of(1000)}; "
            "give the directory of Snapshots",
            path=steps.folder,
        )
    stored = {step: manifests.read(steps.path(step), "posthoc.open") for step in present}
    _check_chain(steps, stored)
    found = [
        Snapshot(step, name, one, _profile_of(one, steps.path(step), name))
        for step, one in stored.items()
        for name in one.averages
    ]
    _check_clocks(steps, stored)
    _check_times(steps.folder, found)
    return found


def _profile_of(stored: Manifest, path: str, name: str) -> Profile:
    if stored.averages[name].schedule["name"] == "by_pattern":
        raise ArgumentError(
            f"{path}: average {name!r} has several schedules (by_pattern), so no one profile; "
            "give Snapshots the names of averages with one schedule"
        )
    return profile_in(stored, path, name)


def unit_of(snapshots: Sequence[Snapshot]) -> str:
    """The unit of the clock."""
    first = snapshots[0]
    description = first.manifest.averages[first.name].schedule
    made = restore(description)
    return str(description["params"]["unit"] if made is None else made.unit)


def _check_chain(steps: Steps, stored: dict[int, Manifest]) -> None:
    for (before, one), (step, other) in itertools.pairwise(stored.items()):
        if other.follows and other.follows != one.save_id:
            raise CheckpointError(
                f"reading {steps.folder}: {name_of(step)} follows the save {other.follows}, but "
                f"{name_of(before)} before it is {one.save_id}: a snapshot between them is "
                "missing, or they are of different runs; give a directory with the snapshots of "
                "one run, all from some step on",
                path=steps.path(step),
            )


def _check_clocks(steps: Steps, stored: dict[int, Manifest]) -> None:
    for step, one in stored.items():
        clocks = {name: kept.t for name, kept in one.averages.items()}
        if len(set(clocks.values())) > 1:
            raise CheckpointError(
                f"reading {steps.path(step)}: its averages are at different times, {clocks}: one "
                "of them was added or reset later; save those of one clock (names=)",
                path=steps.path(step),
            )


def _check_times(folder: str, found: Sequence[Snapshot]) -> None:
    by_name: dict[str, list[Snapshot]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(one)
    for group in by_name.values():
        for before, one in itertools.pairwise(group):
            if not one.t > before.t:
                raise CheckpointError(
                    f"reading {folder}: {one.label} is at t={one.t:g} and {before.label} at "
                    f"t={before.t:g}, expected times that grow with the steps: they are of "
                    "different runs, or the average was reset between them",
                    path=folder,
                )


def check_same_tensors(snapshots: Sequence[Snapshot]) -> None:
    """Raises ValueError unless the averages have the same tensors of the same shapes."""
    *others, last = snapshots
    expected = _shapes(last)
    for one in others:
        there = _shapes(one)
        if there != expected:
            odd = sorted(dict(there.items() ^ expected.items()))
            raise ArgumentError(
                f"{one.label} and {last.label} differ in the shape or the presence of "
                f"{abbreviate(odd)}: they are of different models"
            )


def _shapes(one: Snapshot) -> dict[str, Any]:
    return {t.fqn: t.shape for t in one.manifest.tensors if t.average == one.name}
