"""Averages to a new folder: as a checkpoint, or as an export."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardema.backends.tree import unwrap
from shardema.calls import Call, Calls
from shardema.files import checkpoint, companions, layouts, pretrained
from shardema.files import export as exporter
from shardema.files.background import PendingSave
from shardema.files.folder import absolute
from shardema.schedules import describe
from shardema.scopes import writable
from shardema.update.averages import Readable
from shardema.update.mixture import MixedAverage, Mixture


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
    """Writes averages, their progress and their schedules; see `ShardedEMA.save`. Collective.

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
        if include_frozen:
            calls.refuse_merged("save")
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


def export_call(
    calls: Calls,
    op: str,
    name: str | Mixture | None,
    dtype: Any,
    given: Callable[[], dict[str, Any]],
) -> Call:
    """The call that `export` follows."""

    def prepare(average: Readable) -> None:
        if not calls.merged_state.files:  # else only adapters are written
            calls.refuse_merged(op)

    return Call(
        op,
        name,
        dtype=dtype,
        given=given,
        files=True,
        compared=lambda average: average.components,
        prepare=prepare,
    )


def export(
    calls: Calls,
    op: str,
    average: Readable,
    path: str | os.PathLike[str],
    dtype: Any,
    *,
    layout: str = "hf",
    max_shard_size: int | str = "5GB",
    mode: exporter.Mode = "auto",
    progress: bool = False,
    tokenizer: Any = False,
    also: Callable[[str], None] = lambda place: None,
) -> None:
    """Writes an average as safetensors; see `ShardedEMA.export`. Collective.

    Args:
        op: the method's name.
        average: what the call of `export_call` gave.
        path, dtype, layout, max_shard_size, mode, progress, tokenizer: as for `ShardedEMA.export`.
        also: called on the leader with the temporary folder, to write further files.

    Raises:
        As `ShardedEMA.export`.
    """
    with writable(), calls.ranks.together(op):
        calls.merged_state.check_export()
        unit = calls.averages.unit
        fields = layouts.fields_of(average, layout, calls.merged_state.stem, unit)
        module, contents = unwrap(calls.weights.models[0]), calls.contents(average, dtype)
        exported_dtype = next((contents.dtype(i) for i in contents.items if i.averaged), None)

        def extra(place: str) -> None:
            layouts.write_config(module, place, exported_dtype, fields)
            companions.write_tokenizer(module, tokenizer, place)
            also(place)

        exporter.export(
            path,
            contents,
            max_shard_size=exporter.parse_size(max_shard_size),
            mode=mode,
            progress=progress,
            extra=extra,
            told=_told(average),
        )


def _told(average: Readable) -> dict[str, str]:
    """What the files of an average say of themselves."""
    rule = None if isinstance(average, MixedAverage) else describe(average.schedule)
    return exporter.about(average.name, average.t, average.num_updates, rule)
