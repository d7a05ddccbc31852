"""Gathers the full tensors of an average, one by one, or into one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardema.calls import Call, Calls
from shardema.errors import CallError
from shardema.files import layouts
from shardema.ranks import transfer
from shardema.ranks.plan import Contents, Item
from shardema.ranks.transfer import Iteration, Prepared
from shardema.scopes import writable
from shardema.update.averages import Readable
from shardema.update.mixture import Mixture


@dataclass(frozen=True)
class Full:
    """The full tensors of an average that a collective call has begun to gather.

    Attributes:
        contents: the tensors that are gathered.
        names: the keys of each of them.
        tensors: by key; collective, and every rank must exhaust it, or begin and close it.
    """

    average: Readable
    contents: Contents
    names: Callable[[Item], Sequence[str]]
    tensors: Generator[tuple[str, Any]]


def full_tensors(
    calls: Calls, op: str, name: str | Mixture | None, dtype: Any, *, all_ranks: bool
) -> Iterator[tuple[str, Any]]:
    """See `ShardedEMA.iter_full`. Collective, from the first ``next`` on."""
    given = {"all_ranks": bool(all_ranks)}
    yield from begin_full(calls, op, name, dtype, all_ranks=all_ranks, given=lambda: given).tensors


def export_file(
    calls: Calls,
    path: str | os.PathLike[str],
    layout: str,
    name: str | Mixture | None,
    dtype: Any,
    given: Callable[[], dict[str, Any]],
) -> None:
    """`ShardedEMA.export` in a layout of one file, which the first rank writes. Collective."""
    full = begin_full(calls, "export", name, dtype, given=given, files=True)
    with writable(), calls.ranks.together("export"):
        nbytes = sum(full.contents.loads())
        num_updates = full.average.num_updates
        layouts.write_file(path, layout, full.tensors, num_updates, calls.ranks, nbytes)


def begin_full(
    calls: Calls,
    op: str,
    name: str | Mixture | None,
    dtype: Any,
    *,
    given: Callable[[], dict[str, Any]],
    all_ranks: bool = False,
    files: bool = False,
    adapters: bool = False,
) -> Full:
    """Prepares the gathering of an average; its tensors are collective too. Collective.

    Args:
        given, files: as of a `Call`.
        all_ranks: gather to all ranks, not to the first one only.
        adapters: of a model whose averages are all of its PEFT adapters, gather these alone,
            under the names of PEFT's files; needs ``files``.
    """
    made: list[tuple[Contents, Contents, Prepared]] = []

    def names() -> Callable[[Item], Sequence[str]]:
        state = calls.merged_state
        alone = adapters and state.averages_adapters(calls.plan)
        return state.adapter_names if alone else state.names

    def prepare(average: Readable) -> None:
        calls.merged_state.check_values(op, calls.ranks.size if all_ranks else 1)
        contents, names_of = calls.contents(average, dtype), names()
        if names_of != calls.merged_state.adapter_names:
            calls.refuse_merged(op)
        numbered = enumerate(contents.plan.items)
        contents = contents.only([index for index, item in numbered if names_of(item)])
        apart = transfer.apart(op, contents, all_ranks)
        gathered = contents.only([index for index in contents.chosen if index not in apart])
        ready = transfer.prepare(gathered, limit=transfer.BUCKET_BYTES, all_ranks=all_ranks)
        made[:] = [(contents, gathered, ready)]

    average = calls.begin(
        Call(
            op,
            name,
            dtype=dtype,
            given=given,
            files=files,
            compared=lambda average: average.components,
            prepare=prepare,
        )
    )
    contents, gathered, ready = made.pop()
    tensors = _stream(calls, op, contents, gathered, ready, names(), all_ranks)
    return Full(average, contents, names(), tensors)


def _stream(
    calls: Calls,
    op: str,
    contents: Contents,
    gathered: Contents,
    ready: Prepared,
    names: Callable[[Item], Sequence[str]],
    all_ranks: bool,
) -> Generator[tuple[str, Any]]:
    values = calls.own.values
    with writable():
        arriving = transfer.stream(ready, op)
        if not (all_ranks or calls.ranks.leader):
            for _ in arriving:
                raise AssertionError("only receivers get tensors")
            return
        own = {shard.fqn: shard.own for shard in calls.weights.shards if shard.opaque}
        full = transfer.with_apart(contents, transfer.assemble(gathered, arriving), own)
    yield from _one_by_one(calls, op, arriving, full, names)
    yield from values.items()


def _one_by_one(
    calls: Calls,
    op: str,
    arriving: Generator[tuple[transfer.TransferChunk, Tensor]],
    full: Iterator[tuple[Item, Tensor]],
    names: Callable[[Item], Sequence[str]],
) -> Iterator[tuple[str, Tensor]]:
    """Each full tensor under each of its names, until another call ends the iteration."""
    iteration = Iteration(arriving)
    calls.iterations.add(iteration)
    try:
        while True:
            if iteration.ended_by:
                raise CallError(
                    f"rank {calls.ranks.rank}: {op}: {iteration.ended_by} was called before "
                    "its last tensor, which ended it; call that after the loop"
                )
            with writable():
                try:
                    item, tensor = next(full, (None, None))
                except BaseException as error:
                    arriving.throw(error)  # so that all ranks raise
                    raise
            if item is None or tensor is None:
                return
            for fqn in names(item):
                yield fqn, tensor
    finally:
        calls.iterations.discard(iteration)
        with writable():
            iteration.end("close")
