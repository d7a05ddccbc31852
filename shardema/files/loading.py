"""Reads new values of averages into staging; they are copied once all ranks have read theirs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardema.arguments import progress
from shardema.errors import ArgumentError, CheckpointError, abbreviate
from shardema.files import checkpoint, histories, manifest, pairing, remote, sources
from shardema.files.dcp import BoxedTensor
from shardema.files.manifest import Manifest, ReadRequest
from shardema.files.sources import Imported
from shardema.policy import ShadowPolicy
from shardema.profiles import History
from shardema.ranks.plan import Plan
from shardema.schedules import constant, describe
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.shadows import Shadows, allocate


@dataclass(frozen=True)
class StagedAverage:
    """New values of an average, in staging.

    Attributes:
        clock: arguments of `Average.restart`; None leaves the clock unchanged.
        history: of the new values.
        loaded: the values were loaded, not copied from the weights.
    """

    average: Average
    shadows: Shadows
    clock: tuple[float, int, float | None] | None
    history: History
    loaded: bool

    def apply(self) -> None:
        """Copies the values and sets the clock. Idempotent."""
        self.average.shadows.copy_all(self.shadows)
        if self.clock is not None:
            self.average.restart(*self.clock)
        self.average.remember(self.history)
        self.average.loaded = self.loaded


# ---- what `save` wrote ------------------------------------------------------------------------


def read_checkpoint(
    folder: str | os.PathLike[str],
    averages: Averages,
    plan: Plan,
    *,
    check_model: bool,
    new_schedule: bool,
    add: Sequence[str],
    drop: Sequence[str],
) -> list[StagedAverage]:
    """Reads every average of a checkpoint. Collective.

    Args:
        plan: of the model.
        check_model: raise unless the model has the weights that it had at the save.
        new_schedule, add, drop: as for `ShardedEMA.load`.
    """
    found: list[tuple[Manifest, dict[str, list[ReadRequest]]]] = []

    def look() -> tuple[str, int]:
        stored = manifest.read(folder)
        check_checkpoint(str(folder), stored, averages, plan, new_schedule, add, drop)
        requests = {
            average.name: checkpoint.read_requests(stored, average.name, averages.held(average))
            for average in averages.values()
            if average.name in stored.averages
        }
        found.append((stored, requests))
        blocks = sum(len(part.blocks) for parts in requests.values() for part in parts)
        return stored.save_id, blocks * manifest.BLOCK

    def same(found: list[tuple[str, int]]) -> int:
        if len({save_id for save_id, _ in found}) > 1:
            raise CheckpointError(
                f"load from {folder}: the ranks see different checkpoints at this path; give a "
                "path on a file system that all ranks share",
                path=str(folder),
            )
        return max(nbytes for _, nbytes in found)

    with remote.patience(averages.ranks.timeout):
        nbytes = averages.ranks.agree("load (looking)", look, same)
    if check_model:
        shards = averages.weights.averaged_shards
        pairing.check(str(folder), found[0][0], plan, shards, averages.ranks)
    staged: dict[str, StagedAverage] = {}

    def read() -> None:
        stored, requests = found[0]
        for average in averages.values():
            staged[average.name] = _read_average(stored, average, averages, requests)

    with remote.patience(averages.ranks.timeout):
        averages.ranks.agree("load (reading)", read, nbytes=nbytes)
    return list(staged.values())


def _read_average(
    stored: Manifest,
    average: Average,
    averages: Averages,
    requests: Mapping[str, list[ReadRequest]],
) -> StagedAverage:
    held = averages.held(average)
    staging = allocate(held, average.policy, pin=False)
    if average.name not in requests:
        staging.copy_from(held)
        begun = History(0, imported=False)
        return StagedAverage(average, staging, (0, 0, None), begun, loaded=False)
    checkpoint.read_average(stored, average.name, requests[average.name], held, staging)
    kept = stored.averages[average.name]
    clock = kept.t, kept.num_updates, kept.moved_at
    return StagedAverage(average, staging, clock, kept.history, loaded=True)


def check_checkpoint(
    folder: str,
    stored: Manifest,
    averages: Averages,
    plan: Plan,
    new_schedule: bool = False,
    add: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """Raises ValueError unless the checkpoint is of this model, these averages and schedules."""
    _check_names(folder, set(stored.averages), set(averages), add, drop)
    items = [item for item in plan.items if item.averaged]
    for average in (a for a in averages.values() if a.name in stored.averages):
        dtype = averages.stored_dtype_of(average)
        checkpoint.check_same_tensors(folder, stored, average.name, items, dtype)
        _check_seed(f"load from {folder}", average, stored.averages[average.name].seed)
        if not new_schedule:
            was = stored.averages[average.name].schedule
            otherwise = ", or load(..., new_schedule=True) to continue with the new one"
            _check_schedule(f"load from {folder}", average, was, otherwise)


def _check_names(
    folder: str, stored: set[str], kept: set[str], add: Sequence[str], drop: Sequence[str]
) -> None:
    lacking, surplus = kept - stored, stored - kept
    if lacking == set(add) and surplus == set(drop):
        return
    call = ", ".join(
        f"{word}={sorted(names)}" for word, names in (("add", lacking), ("drop", surplus)) if names
    )
    raise ArgumentError(
        f"load from {folder}: it holds averages {sorted(stored)}, this object keeps "
        f"{sorted(kept)}, and got add={sorted(add)}, drop={sorted(drop)}; build the EMA "
        "with the same names" + (f", or load(..., {call})" if call else " and add or drop none")
    )


def _check_seed(op: str, average: Average, seed: int | None) -> None:
    """Raises ValueError unless an average goes on with its random numbers of before."""
    if average.policy.stochastic and seed not in (None, average.policy.seed):
        raise ArgumentError(
            f"{op}: average {average.name!r} was rounded with seed {seed}, this object has "
            f"{average.policy.seed}; build it with ShadowPolicy(dtype=torch.bfloat16, seed={seed})"
        )


def _check_schedule(op: str, average: Average, was: dict[str, Any], otherwise: str = "") -> None:
    now = describe(average.schedule)
    if was != now:
        raise ArgumentError(
            f"{op}: average {average.name!r} was saved with schedule {was!s:.1000}, this object "
            f"has {now}; build it with the same schedule{otherwise}"
        )


# ---- full tensors -----------------------------------------------------------------------------


def read_full(
    source: Imported,
    average: Average,
    averages: Averages,
    plan: Plan,
    *,
    beside: Collection[str],
    clock: tuple[float | None, int | None],
) -> StagedAverage:
    """Reads this rank's slices of full tensors. Local.

    Args:
        plan: of the model.
        beside: names that are allowed in the source and not used.
        clock: ``t`` and ``num_updates``, as for `ShardedEMA.load_full`.
    """
    label = f"load_full from {source.path}" if source.path else "load_full"
    unit = averages.unit
    known = progress(*clock, unit)
    if known is None and unit == "step":
        known = progress(None, source.num_updates, unit)
    restart = average.check_seed(label, known)
    staging = _read_values(label, source, average.policy, averages, plan, beside)
    begin = average.moved_at if restart is None else restart[0]
    history = History(begin, imported=True)
    seed = restart and (*restart, None)
    return StagedAverage(average, staging, seed, history, loaded=True)


def read_beside(
    label: str, source: Imported, averages: Averages, plan: Plan, beside: Collection[str]
) -> Average:
    """An average of the same model that no update changes, from full tensors. Local.

    Args:
        label: begins the error messages.
        plan, beside: as for `read_full`.
    """
    policy, schedule = ShadowPolicy(), constant(1.0, averages.unit)
    shadows = _read_values(label, source, policy, averages, plan, beside)
    return Average(source.path, schedule, policy, shadows, loaded=True)


def _read_values(
    label: str,
    source: Imported,
    policy: ShadowPolicy,
    averages: Averages,
    plan: Plan,
    beside: Collection[str],
) -> Shadows:
    chunked = len(averages.weights.models) > 1
    names = sources.match(label, source, plan, beside, chunked)
    held = averages.weights.local_slices(policy)
    staging = allocate(held, policy, pin=False)
    with remote.patience(averages.ranks.timeout):
        sources.read_shards(source, names, held, staging.views)
    return staging


# ---- a state dict -----------------------------------------------------------------------------


def check_state(state: Mapping[str, Any], averages: Averages) -> None:
    """Raises ValueError unless ``state`` has the form of ``ema.state_dict()`` of these averages."""
    op = "load_state_dict"
    parts = ["averages", "progress", "schedules"]
    missing = {*parts, *(["companions"] if _compensated(averages) else [])} - set(state)
    if missing:
        raise ArgumentError(
            f"{op}: missing keys {sorted(missing)}, expected a dict as ema.state_dict() returns"
        )
    for part in parts:
        if set(state[part]) != set(averages):
            got, expected = sorted(state[part]), sorted(averages.names)
            raise ArgumentError(f"{op}: got {part} {got}, expected averages {expected}")
    for average in averages.values():
        _check_tensors(op, average, state["averages"][average.name], average.shadows.views)
        if average.policy.compensated:
            lost = state["companions"].get(average.name, {})
            _check_tensors(op, average, lost, average.shadows.companions)
        _check_schedule(op, average, dict(state["schedules"][average.name]))
        _check_seed(op, average, state["progress"][average.name].get("seed"))


def _history(state: Mapping[str, Any], name: str, end: float) -> History:
    """The stored history of an average; an unknown one if there is none that ends at ``end``."""
    try:
        return histories.from_text(state["histories"][name], end)
    except (KeyError, TypeError, ValueError):
        return History(end, imported=True)


def _compensated(averages: Averages) -> bool:
    return any(average.policy.compensated for average in averages.values())


def _check_tensors(
    op: str, average: Average, given: Mapping[str, Any], views: Mapping[str, Tensor]
) -> None:
    if set(given) != set(views):
        odd = sorted(set(given) ^ set(views))
        raise ArgumentError(
            f"{op}: average {average.name!r} differs in {abbreviate(odd)}; "
            "the state is of another model, or of another select= or buffers="
        )
    for fqn, value in given.items():
        local = value.local if isinstance(value, BoxedTensor) else None
        if local is None or local.shape != views[fqn].shape:
            raise ArgumentError(
                f"{op}: {fqn}: got {type(value).__name__}, expected a local shard as "
                "ema.state_dict() returns; use ema.load_full for full tensors"
            )


def _copy_in(given: Mapping[str, Any], views: Mapping[str, Tensor]) -> None:
    for fqn, value in given.items():
        if value.local.data_ptr() != views[fqn].data_ptr():
            views[fqn].copy_(value.local)


def apply_state(state: Mapping[str, Any], averages: Averages) -> None:
    """Copies in a state that `check_state` accepted. Idempotent."""
    for average in averages.values():
        _copy_in(state["averages"][average.name], average.shadows.views)
        if average.policy.compensated:
            _copy_in(state["companions"][average.name], average.shadows.companions)
        clock = state["progress"][average.name]
        average.restart(clock["t"], clock["num_updates"], clock.get("moved_at"))
        average.remember(_history(state, average.name, average.moved_at))
        average.loaded = True
