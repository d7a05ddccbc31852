"""`ShardedEMA.publish`: an average to a sink, as one version."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardema import saving
from shardema.calls import Calls
from shardema.gathering import Full, begin_full
from shardema.publishing.folder import FolderSink
from shardema.publishing.loader import Load, Loader
from shardema.publishing.publication import Header, Publication, Sink, version_name
from shardema.ranks.messages import is_shared
from shardema.ranks.plan import refuse_opaque
from shardema.update.mixture import Mixture

_OP = "publish"


def publish(
    calls: Calls,
    sink: Sink | FolderSink | Load | None,
    name: str | Mixture | None,
    dtype: Any,
    version: int | str | None,
) -> str:
    """See `ShardedEMA.publish`. Collective."""
    if isinstance(sink, FolderSink):
        return _publish_folder(calls, sink, name, dtype, version)
    return _publish_stream(calls, sink, name, dtype, version)


# ---- a folder ---------------------------------------------------------------------------------


def _publish_folder(
    calls: Calls, sink: FolderSink, name: str | Mixture | None, dtype: Any, version: Any
) -> str:
    """Exports into the folder of the version, then shows it to readers."""
    ranks = calls.ranks

    def given() -> dict[str, Any]:
        text = version_name(version, calls.averages.readable(name).num_updates)
        if ranks.leader:
            sink.prepare(text)
        return {"sink": sink.folder, "version": text}

    average = calls.begin(saving.export_call(_OP, name, dtype, given))
    text = version_name(version, average.num_updates)
    saving.export(
        calls,
        _OP,
        average,
        sink.path(text),
        dtype,
        max_shard_size=sink.max_shard_size,
        mode=sink.mode,
        also=lambda place: sink.note(text, average.name, place),
    )
    ranks.agree(f"{_OP} (committing)", None, lambda _: sink.commit(text))
    return text


# ---- a stream ---------------------------------------------------------------------------------


def _publish_stream(
    calls: Calls,
    given_sink: Sink | Load | None,
    name: str | Mixture | None,
    dtype: Any,
    version: Any,
) -> str:
    """Gathers the tensors to the first rank's sink; shows them to readers once all have come."""
    ranks, sinks = calls.ranks, list[Sink]()

    def given() -> dict[str, Any]:
        sinks[:] = [] if given_sink is None and not ranks.leader else [as_sink(given_sink)]
        text = version_name(version, calls.averages.readable(name).num_updates)
        return {"sink": "a stream", "version": text}

    full = begin_full(calls, _OP, name, dtype, given=given, files=True, adapters=True)
    text = version_name(version, full.average.num_updates)
    headers = tuple(
        Header(key, full.contents.dtype(item), item.shape)
        for item in full.contents.items
        for key in full.names(item)
    )
    publication = Publication(text, full.average.name, headers, ranks.timeout)

    def prepare() -> None:
        _check_streamable(calls, full)
        if ranks.leader:
            sinks[0].prepare(publication)

    try:
        ranks.agree(f"{_OP} (preparing the sink)", prepare)
        failed = _write(sinks[0] if ranks.leader else None, publication, full.tensors)

        def finish() -> None:
            if failed is not None:
                raise failed

        ranks.agree(f"{_OP} (committing)", finish, lambda _: sinks[0].commit(publication))
    except BaseException:
        if ranks.leader:
            sinks[0].discard(publication)
        raise
    return text


def as_sink(sink: Any) -> Sink:
    """A callable as a `Loader`; a sink is itself. Raises TypeError."""
    if isinstance(sink, Sink) and not isinstance(sink, type):
        return sink
    if not callable(sink) or isinstance(sink, nn.Module | type):
        raise TypeError(
            f"{_OP}: got the sink {sink!r:.200}, expected a callable that takes an iterator of "
            "(name, tensor), such as model.load_weights of an engine, or one of "
            "shardema.publishing: FolderSink(path), GroupSink(group), SharedMemorySink(name), or "
            "an object with the methods of publishing.Sink"
        )
    return Loader(sink)


def _check_streamable(calls: Calls, full: Full) -> None:
    """Raises RuntimeError or ValueError if the model has more than tensors of numbers."""
    calls.merged_state.check_tensors(_OP, "make it a tensor")
    refuse_opaque(_OP, full.contents.plan, full.contents.chosen, "use ema.iter_full()")


def _write(
    sink: Sink | None, publication: Publication, tensors: Generator[tuple[str, Tensor]]
) -> BaseException | None:
    """Gives the tensors to the first rank's sink; returns its error, to be raised on all ranks."""
    if sink is None:
        for _ in tensors:
            raise AssertionError("only the first rank gets tensors")
        return None
    counted = _Counted(tensors)
    failed: BaseException | None = None
    try:
        with torch.no_grad():
            sink.write(publication, counted)
        if counted.count < len(publication.headers):
            raise RuntimeError(
                f"{_OP}: the sink took {counted.count} of {len(publication.headers)} tensors, "
                "expected all; it must loop over what it is given before it returns"
            )
    except BaseException as error:  # also an interrupt: it must be raised on all ranks
        failed = counted.error or error
    tensors.close()  # receives what the sink did not take
    if failed is not None and is_shared(failed):  # the other ranks have it
        raise failed
    return failed


class _Counted(Iterator[tuple[str, Tensor]]):
    """An iterator that counts, and keeps its own error, which a sink may hide in another."""

    def __init__(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.count = 0
        self.error: BaseException | None = None
        self._tensors = tensors

    def __next__(self) -> tuple[str, Tensor]:
        try:
            found = next(self._tensors)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise
        self.count += 1
        return found
