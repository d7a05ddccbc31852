"""`Reconstruction`: the average of a target, as a linear combination of snapshots.

::

    StoredRun    the snapshots of a run      .target(what, at=t)
    Reconstruction   coefficients, residual, profile; its tensors are computed when they are read:
                     by ema.load_full, ema.swap, reconstruction.export
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shardema.errors import ArgumentError, abbreviate
from shardema.files import sources
from shardema.files.blending import Blend, Stored, Value
from shardema.files.manifest import StoredTensor
from shardema.posthoc import directory, fitting, writing
from shardema.posthoc.directory import Snapshot
from shardema.posthoc.fitting import MAX_RESIDUAL, Fit, Vector
from shardema.posthoc.masses import solve
from shardema.posthoc.targets import Target, Wanted
from shardema.ranks.agree import Ranks
from shardema.schedules import Schedule


@dataclass(frozen=True)
class Reconstruction(sources.Imported):
    """An average chosen afterwards. Made by `StoredRun.target`.

    `ShardedEMA.load_full` and `ShardedEMA.swap` accept it, and it writes itself by `export`. The
    snapshots are read then: the directory must stay.

    Attributes:
        at: time of the average.
        unit: of the clock.
        fit: coefficients and masses, see `shardema.posthoc.fitting.Fit`.
        used: the snapshots with a coefficient, by time.
    """

    target: Any = None
    at: float = 0
    unit: str = "step"
    fit: Fit = field(repr=False, kw_only=True)
    used: tuple[tuple[float, Snapshot], ...] = field(repr=False, kw_only=True)
    last: Snapshot = field(repr=False, kw_only=True)

    @property
    def residual(self) -> float:
        """Share of the weight that is on other steps than wanted, 0 to 1."""
        return self.fit.residual

    @property
    def coefficients(self) -> dict[str, float]:
        """By snapshot, ``"step-00001000:ema"``; they sum to 1."""
        return {one.label: c for c, one in self.used}

    @property
    def profile(self) -> tuple[Vector, Vector, Vector]:
        """Edges of cells [n + 1], and the masses wanted and reached [n]."""
        count = len(self.fit.edges) - 1
        return self.fit.edges, self.fit.target[-count:], self.fit.reached[-count:]

    def export_as(self, arguments: Mapping[str, Any], dtype: Any, ranks: Ranks) -> None:
        """`export` with the arguments of ``ema.export``. Collective over ``ranks``.

        Args:
            arguments: its path, layout, mode and shard size.

        Raises:
            ValueError: arguments that only the averages of a running EMA can have.
        """
        layout, mode = arguments["layout"], arguments["mode"]
        if (layout, mode) != ("hf", "auto") or dtype == "model":
            raise ArgumentError(
                f"export of a reconstruction: got layout={layout!r}, mode={mode!r} and "
                f"dtype={dtype!r}, expected 'hf', 'auto' and a dtype or None"
            )
        size = arguments["max_shard_size"]
        self.export(arguments["path"], dtype=dtype, max_shard_size=size, ranks=ranks)

    def export(
        self,
        out: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        partial: bool = False,
        ranks: Ranks | None = None,
        done: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Writes the average in the Hugging Face layout. Collective if there are several ranks.

        The ranks of the default process group share the work and write side by side; no rank needs
        memory for more than a bucket. Buffers and frozen parameters are those of the snapshot at
        `at`.

        Args:
            out: the folder to write; must not exist.
            dtype: of averages and frozen parameters; None keeps the stored ones, but of a
                compensated average float32.
            max_shard_size: of a file: bytes, or a size such as ``"5GB"``.
            partial: export without the parameters that the snapshots lack.
            ranks: that call it; None for those of the default group.
            done: called with the number of bytes after each part.

        Raises:
            CheckpointError: a damaged snapshot, ``out`` exists, or a write failed. Raised on all
                ranks; nothing is left behind.
            ValueError: parameters that the snapshots lack.
        """
        stored = self.last.manifest
        if stored.left_out and not partial:
            raise ArgumentError(
                f"{self.path}: the snapshots lack {abbreviate(stored.left_out)}: parameters that "
                "are not averaged; take snapshots with include_frozen=True, or export without "
                "them (partial)"
            )
        outputs = [
            writing.Output(t.stem, t.file_name, self.tensors[t.fqn], t.role != "buffer")
            for t in _of(self.last)
            if t.stem
        ]
        writing.write(
            outputs,
            out,
            op="reconstruct",
            ranks=ranks or Ranks(),
            dtype=dtype,
            max_shard_size=max_shard_size,
            configs=stored.home,
            done=done,
        )


def _of(one: Snapshot) -> list[StoredTensor]:
    """The tensors of an average, and those that all averages share."""
    return [t for t in one.manifest.tensors if t.average in (one.name, None)]


class StoredRun:
    """The snapshots of a run; made by `open`.

    Attributes:
        folder: the directory.
        unit: of the clock.
        snapshots: every average of every step.
    """

    def __init__(self, folder: str, snapshots: Sequence[Snapshot]) -> None:
        self.folder = folder
        self.snapshots: tuple[Snapshot, ...] = tuple(snapshots)
        self.unit: str = directory.unit_of(snapshots)

    def __repr__(self) -> str:
        return (
            f"StoredRun({self.folder!r}, averages {list(self.names)}, {len(self.times)} times up "
            f"to t={self.times[-1]:g} {self.unit}s)"
        )

    @property
    def times(self) -> tuple[float, ...]:
        """The times of the snapshots, ascending."""
        return tuple(sorted({one.t for one in self.snapshots}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages."""
        return tuple(dict.fromkeys(one.name for one in self.snapshots))

    def target(
        self,
        target: Target,
        at: float | None = None,
        *,
        names: Sequence[str] | None = None,
        allow_residual: bool | float = MAX_RESIDUAL,
    ) -> Reconstruction:
        """The average with the profile ``target`` at a time, from the snapshots up to then. Local.

        Args:
            target: a schedule (`schedules.power`, `schedules.half_life`), as if it had been kept
                from the start; `window`; or a callable, the weight of the step at time t.
            at: the time of a snapshot; None for the last one.
            names: use these averages only.
            allow_residual: the largest `Reconstruction.residual`; True allows any, and also
                coefficients that amplify rounding errors.

        Raises:
            ValueError: no snapshot at that time, a window longer than the run or begun before the
                first snapshot, a target that cannot be reached, snapshots of different models, an
                unknown name, another unit.
        """
        at = self._time(at)
        if isinstance(target, Schedule) and target.unit != self.unit:
            raise ArgumentError(
                f"target {target}: it counts {target.unit}s, the snapshots count {self.unit}s; "
                f"give it unit={self.unit!r}"
            )
        wanted = Wanted.of(target, at)
        usable = [one for one in self.snapshots if one.t <= at and self._named(one, names)]
        if not usable:
            raise ArgumentError(f"target at t={at:g}: no snapshot of {names} up to this time")
        usable.sort(key=lambda one: one.t)
        allowed = math.inf if allow_residual is True else float(allow_residual)
        columns = [(one.name, one.profile) for one in usable]
        found = solve(columns, wanted, limited=allow_residual is not True)
        if allow_residual is not True:
            labels = [one.label for one in usable]
            fitting.check(found, labels, f"{wanted.target} at t={at:g}", allowed)
        pairs = zip(found.coefficients.tolist(), usable, strict=True)
        used = tuple((c, one) for c, one in pairs if c)
        last = next(one for one in self.snapshots if one.t == at)
        directory.check_same_tensors([*(one for _, one in used), last])
        return Reconstruction(
            "posthoc",
            _tensors(used, last),
            path=self.folder,
            target=target,
            at=at,
            unit=self.unit,
            fit=found,
            used=used,
            last=last,
        )

    def _named(self, one: Snapshot, names: Sequence[str] | None) -> bool:
        for name in names or ():
            if name not in self.names:
                raise ArgumentError(f"names: got {name!r}, expected some of {list(self.names)}")
        return names is None or one.name in names

    def _time(self, at: float | None) -> float:
        times = self.times
        if at is None:
            return times[-1]
        if at not in times:
            near = sorted(times, key=lambda t: abs(t - at))[:2]
            raise ArgumentError(
                f"at: got t={at:g}, and there is no snapshot then; the nearest are at "
                f"{' and '.join(f'{t:g}' for t in sorted(near))}"
            )
        return at


def _tensors(used: Sequence[tuple[float, Snapshot]], last: Snapshot) -> dict[str, Value]:
    """The averaged tensors as blends, the others as they are in the last snapshot."""
    numbers = [
        {t.fqn: n for n, t in enumerate(one.manifest.tensors) if t.average == one.name}
        for _, one in used
    ]
    found: dict[str, Value] = {}
    for number, tensor in enumerate(last.manifest.tensors):
        if tensor.average is None:
            found[tensor.fqn] = Stored(last.manifest, number)
        elif tensor.average == last.name:
            parts = tuple(
                (c, Stored(one.manifest, where[tensor.fqn]))
                for (c, one), where in zip(used, numbers, strict=True)
            )
            found[tensor.fqn] = Blend(parts) if len(parts) > 1 else parts[0][1]
    return found


def open_run(folder: str | os.PathLike[str]) -> StoredRun:
    """The snapshots of a run in a directory of `Snapshots`, or of a `CheckpointManager`. Local.

    Raises:
        CheckpointError: there is none, one is damaged, or they are of different runs.
        ValueError: an average with several schedules; a path that is not local.
    """
    return StoredRun(os.fspath(folder), directory.read(folder))


def described(found: Reconstruction) -> dict[str, Any]:
    """The facts of a reconstruction as JSON."""
    kept = np.abs(found.fit.coefficients).sum()
    return {
        "target": str(found.target),
        "at": found.at,
        "unit": found.unit,
        "residual": found.residual,
        "root_residual": found.fit.root_residual,
        "amplification": float(kept),
        "ridge": found.fit.ridge,
        "coefficients": found.coefficients,
    }
