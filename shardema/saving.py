"""Saves averages to a new folder; see `ShardedEMA.save`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardema.backends.tree import unwrap
from shardema.calls import Call, Calls
from shardema.files import checkpoint, pretrained
from shardema.files.background import PendingSave
from shardema.files.folder import absolute
from shardema.scopes import writable


def save(
    calls: Calls,
    folder: str | os.PathLike[str],
    *,
    include_frozen: bool,
    overwrite: bool,
    wait: bool,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    follows: Callable[[], str] = str,
) -> PendingSave | None:
    """Writes averages, their progress and their schedules. Collective.

    Args:
        folder, include_frozen, overwrite, wait: as for `ShardedEMA.save`.
        names: which averages; None writes all.
        dtype: that they are written in; None keeps their own.
        follows: returns the id of the save before in a chain of snapshots; called on the leader.

    Returns, raises:
        As `ShardedEMA.save`.
    """
    averages = calls.averages
    chosen = [averages.named(name) for name in averages.names if names is None or name in names]

    def given() -> dict[str, Any]:
        return {
            "path": absolute(folder, "save"),
            "include_frozen": bool(include_frozen),
            "overwrite": bool(overwrite),
            "wait": bool(wait),
            "names": [average.name for average in chosen],
            "stored dtype": str(dtype),
        }

    calls.finish_save()
    calls.begin(Call("save", every=True, given=given, files=True, compared=lambda _: chosen))
    with writable(), calls.ranks.together("save"):
        module = unwrap(averages.weights.models[0])
        calls.pending = checkpoint.save_averages(
            folder,
            [calls.stored_contents(average, dtype) for average in chosen],
            calls.own_contents(),
            {a.name: checkpoint.progress_of(a, dtype) for a in chosen},
            calls.merged_state,
            averages.weights.averaged_shards,
            include_frozen=include_frozen,
            overwrite=overwrite,
            extra=lambda place: pretrained.write_config(module, place, None),
            shared=None if wait else averages,
            follows=follows() if calls.ranks.leader else "",
        )
    return calls.pending
