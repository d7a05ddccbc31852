"""`Snapshots`: saves averages during a run, so that another average can be chosen afterwards."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardema import saving
from shardema.ema import ShardedEMA
from shardema.errors import ArgumentError, ArgumentTypeError, CheckpointError, abbreviate, logger
from shardema.files import manifest
from shardema.files.background import PendingSave
from shardema.files.folder import absolute
from shardema.files.safetensors import local_path
from shardema.files.steps import MAX_STEP, Steps, StepsWriter, name_of, surplus
from shardema.posthoc.planning import Plan, default_targets, planned_profile, residuals
from shardema.profiles import Ledger
from shardema.schedules import block_mean
from shardema.update.average import Average

log = logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Snapshots(StepsWriter):
    """Saves averages at intervals, from which `shardema.posthoc` makes others after the run.

    ::

        ema = ShardedEMA(model, {"a": power(0.05), "b": power(0.10), "blocks": block_mean(1000)})
        with Snapshots(ema, "run/snapshots", every=5000) as snapshots:
            print(snapshots.plan(120_000))
            for step in range(1, 120_001):
                ...
                ema.update()
                snapshots.step(step)

    Each snapshot is a checkpoint of `ShardedEMA.save` with some of the averages, in a folder
    ``step-00005000`` of ``dir``; it names the one before it, so that those of different runs are
    told apart. A run that is resumed, or loads an older step, goes on in the same ``dir`` once its
    averages are loaded: snapshots that are later than its next one are removed. The first rank
    locks ``dir``. All methods but `plan` are collective; `close` is if a save is being written.

    Args:
        ema: the EMA.
        dir: the directory, created on first use; a local path. Only one run may write to it.
        names: which averages; None for all.
        every: steps between snapshots of the averages that are no block means. Those of
            `schedules.block_mean` are saved at the ends of their blocks.
        dtype: ``"float32"`` keeps the dtype of each average, ``"bfloat16"`` halves the bytes and
            keeps 8 bits of each value.
        keep: how many of the newest snapshots are kept; None keeps all.
        include_frozen: as for `ShardedEMA.save`.
        wait: if False, a thread writes; as for `CheckpointManager`.

    Raises:
        ValueError: an unknown name or dtype, a number below 1, or no ``every`` although an average
            is not a block mean.
        TypeError: ``ema`` is not a `ShardedEMA`.
    """

    def __init__(
        self,
        ema: ShardedEMA,
        dir: str | os.PathLike[str],
        *,
        names: Sequence[str] | None = None,
        every: int | None = None,
        dtype: str = "float32",
        keep: int | None = None,
        include_frozen: bool = False,
        wait: bool = True,
    ) -> None:
        if not isinstance(ema, ShardedEMA):
            raise ArgumentTypeError(f"Snapshots: got {type(ema).__name__}, expected a ShardedEMA")
        self._ema = ema
        self._averages = ema.internal.averages
        self._ranks = self._averages.ranks
        chosen = self._averages.names if names is None else tuple(names)
        if not chosen:
            raise ArgumentError("Snapshots: got no names, expected one average or more")
        self._chosen = [self._averages.named(name) for name in chosen]
        if dtype not in _DTYPES:
            raise ArgumentError(f"Snapshots: got dtype={dtype!r}, expected one of {list(_DTYPES)}")
        self._dtype = None if dtype == "float32" else _DTYPES[dtype]
        for label, value in (("every", every), ("keep", keep)):
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(
                    f"Snapshots: got {label}={value!r}, expected an integer of 1 or more, or None"
                )
        self._every, self._keep = every, keep
        others = [a.name for a in self._chosen if not isinstance(a.schedule, block_mean)]
        if others and every is None:
            raise ArgumentError(
                f"Snapshots: {abbreviate(others)}: no block means, whose ends are known, so give "
                "every=, the steps between snapshots"
            )
        self._include_frozen, self._wait = bool(include_frozen), bool(wait)
        self._steps = Steps(absolute(local_path("Snapshots", dir), "Snapshots"))
        self._pending: PendingSave | None = None
        self._last = -1
        self._ledgers: dict[str, Ledger] = {}  # at the last snapshot of each average
        self._times: dict[str, float] = {}  # their progress then

    def __repr__(self) -> str:
        names = [average.name for average in self._chosen]
        return f"Snapshots({self._steps.folder!r}, names={names}, every={self._every})"

    # ---- before the run -----------------------------------------------------------------------

    def plan(self, steps: int, *, dt: float = 1, targets: Mapping[str, Any] | None = None) -> Plan:
        """What the snapshots of a run of ``steps`` will cost and reach. Local; ``print`` it.

        The run is taken to begin now, at t = 0, and to update at every step.

        Args:
            steps: of the run.
            dt: progress of one step, in the schedules' unit.
            targets: by name, as for `posthoc.StoredRun.target`; None takes some widths and windows.

        Raises:
            ValueError: a run that is shorter than the first snapshot.
        """
        saves = self._saves(steps, dt)
        if not saves:
            raise ArgumentError(f"plan: got {steps} steps, and the first snapshot would be later")
        kept = dict(list(saves.items())[-(self._keep or len(saves)) :])
        sizes = {step: sum(self._nbytes(a) for a in due) for step, due in saves.items()}
        columns = [
            (a.name, planned_profile(a.schedule, step * dt, step, a.policy.update_every))
            for step, due in kept.items()
            for a in due
        ]
        unit = self._averages.unit
        wanted = default_targets(max(kept) * dt, unit) if targets is None else targets
        return Plan(
            steps,
            len(saves),
            len(kept),
            sum(sizes[step] for step in kept),
            max(sizes.values()),
            residuals(columns, wanted),
        )

    def _saves(self, steps: int, dt: float) -> dict[int, list[Average]]:
        """The averages to save at each step that has any."""
        marks = {self._every} if self._every else set()
        found: dict[int, list[Average]] = {}
        for average in self._chosen:
            rule = average.schedule
            if isinstance(rule, block_mean):
                length = rule.length / dt
                numbers = range(1, int(steps / length) + 1)
                due = {round(n * length) for n in numbers if (n * length).is_integer()}
            else:
                due = {s for every in marks for s in range(every, steps + 1, every)}
            for step in due:
                found.setdefault(step, []).append(average)
        return dict(sorted(found.items()))

    def _nbytes(self, average: Average) -> int:
        """Bytes of the full average, of the chunks that this rank has."""
        total = 0
        for shard in self._averages.weights.averaged_shards:
            dtype = self._dtype or average.policy.stored_dtype_for(shard.source.dtype)
            total += math.prod(shard.shape) * dtype.itemsize
        return total

    # ---- in the loop --------------------------------------------------------------------------

    def step(self, step: int) -> bool:
        """Saves the averages that are due after this step; returns whether any was.

        Collective then; call it after the update. If the step was skipped, so that no update was
        counted since the last snapshot, nothing is saved.

        Args:
            step: the number of optimizer steps so far, higher than at the last snapshot.

        Raises:
            ValueError: ``step`` is not above that or differs between ranks; or ``dir`` has
                snapshots of a run that this one does not continue.
            TypeError: ``step`` is not an integer.
            CheckpointError: a write failed, or another object uses ``dir``. Earlier snapshots are
                unchanged.
        """
        if type(step) is not int:
            raise ArgumentTypeError(f"Snapshots.step: got step {step!r}, expected an integer")
        if not 0 <= step < MAX_STEP:
            raise ArgumentError(
                f"Snapshots.step: got step {step}, expected 0 or more and below {MAX_STEP}"
            )
        clock = self._ema.t  # which closes an open round of updates
        due = [average for average in self._chosen if clock and self._due(average, step)]
        return bool(due) and self._save(step, due)

    def _due(self, average: Average, step: int) -> bool:
        if self._times.get(average.name) == average.t:
            return False  # no update was counted since the last snapshot
        rule = average.schedule
        if isinstance(rule, block_mean):
            return average.moved_at == average.t and average.t % rule.length == 0
        return self._every is not None and step % self._every == 0

    def _save(self, step: int, due: Sequence[Average]) -> bool:
        self._finish()
        if any(self._ledgers.get(a.name, a.ledger) is not a.ledger for a in due):
            self._last = -1  # loaded or reset since: as in a new process
        names = [average.name for average in due]

        def prepare(_: list[Any]) -> str | None:
            self._steps.open()
            self._steps.sweep()
            return self._prepare(step, due)

        same = {"step": step, "dir": self._steps.folder, "names": names, "keep": self._keep}
        before = self._ranks.agree("Snapshots.step", None, prepare, same=same)
        if before is None:
            return False
        self._pending = saving.save(
            self._ema.internal.calls,
            self._steps.path(step),
            include_frozen=self._include_frozen,
            overwrite=False,
            wait=self._wait,
            names=names,
            dtype=self._dtype,
            follows=lambda: str(before),
        )
        self._last = step
        self._ledgers.update({average.name: average.ledger for average in due})
        self._times.update({average.name: average.t for average in due})
        if self._pending is None and self._ranks.leader:
            self._rotate()
        return True

    def close(self) -> None:
        """Waits for a snapshot that is being written, and unlocks ``dir``. Collective if so."""
        try:
            self._finish()
        finally:
            self._steps.close()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if not pending.finished:
            pending.result()
        if self._ranks.leader:
            self._rotate()

    # ---- on the leader ------------------------------------------------------------------------

    def _prepare(self, step: int, due: Sequence[Average]) -> str | None:
        """Records the step; returns the id of the snapshot before it, or an empty string.

        None if that one has the averages as they are, so nothing is recorded.
        """
        if step <= self._last:
            raise ArgumentError(
                f"Snapshots.step: got step {step} after step {self._last}, expected a later one"
            )
        present, made = self._steps.present(), self._steps.recorded()
        if self._last < 0 and present:
            if not self._continue(step, due, present):
                return None
            present = [s for s in present if s < step]
        self._steps.record([*(s for s in made if s < step), step])
        return manifest.read(self._steps.path(present[-1]), "save").save_id if present else ""

    def _continue(self, step: int, due: Sequence[Average], present: Sequence[int]) -> bool:
        """Goes on after the snapshots of an earlier process; removes those that are later.

        Returns:
            Whether an update was counted since the snapshot before.
        """
        folder = self._steps.folder
        if not all(average.loaded for average in due):
            raise ArgumentError(
                f"Snapshots.step: {folder} has {name_of(present[-1])} of an earlier run, and "
                "this run's averages were not loaded from a checkpoint, or reset since; load it "
                "first (ema.load, manager.resume), or give a new directory"
            )
        earlier = [s for s in present if s < step]
        if earlier:
            kept = manifest.read(self._steps.path(earlier[-1]), "save").averages
            for average in due:
                before = kept.get(average.name)
                if before is not None and before.t == average.t:
                    return False
                if before is not None and before.t > average.t:
                    raise ArgumentError(
                        f"Snapshots.step: average {average.name!r} is at t={average.t:g}, and "
                        f"{name_of(earlier[-1])} in {folder} has it at t={before.t:g}: this run "
                        "does not continue that one; give a new directory"
                    )
        later = [s for s in present if s >= step]
        if later:
            log.warning(
                "%s: removes %s, which are later than step %d where this run goes on",
                folder,
                abbreviate([name_of(s) for s in later]),
                step,
            )
            self._steps.remove(later)
        return True

    def _rotate(self) -> None:
        if self._keep is None:
            return
        try:
            present = [s for s in self._steps.recorded() if s in self._steps.present()]
            gone = self._steps.remove(surplus(present, self._keep, None))
            self._steps.record(set(present) - set(gone))
        except (OSError, CheckpointError) as error:  # the snapshot is saved
            log.warning("%s: not cleaned up: %s", self._steps.folder, error)
