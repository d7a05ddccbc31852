"""`ShardedEMA.publish`: an average to a sink, as one version."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardema import saving
from shardema.calls import Calls
from shardema.errors import ArgumentTypeError, CallError, RankError, logger
from shardema.gathering import Full, begin_full
from shardema.publishing.folder import FolderSink
from shardema.publishing.loader import Load, Loader
from shardema.publishing.publication import Header, Publication, Sink, version_name
from shardema.ranks.messages import is_shared
from shardema.ranks.plan import refuse_opaque
from shardema.update.mixture import Mixture

log = logger(__name__)

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


def _given(version: Any, text: str) -> str | None:
    """What the ranks compare: not a number of updates that nobody gave, which clocks say better."""
    return None if version is None else text


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
        return {"sink": sink.folder, "version": _given(version, text)}

    average = calls.begin(saving.export_call(calls, _OP, name, dtype, given))
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
        return {"sink": "a stream", "version": _given(version, text)}

    full = begin_full(calls, _OP, name, dtype, given=given, files=True, adapters=True)
    text = version_name(version, full.average.num_updates)
    headers = tuple(
        Header(key, full.contents.dtype(item), item.shape)
        for item in full.contents.items
        for key in full.names(item)
    )
    sink = sinks[0] if ranks.leader else _Nowhere()
    publication = Publication(text, full.average.name, headers, ranks.timeout)
    try:
        _send(calls, full, sink, publication)
    except BaseException:
        try:
            sink.discard(publication)
        except Exception as error:  # the first error is raised
            log.warning("version %s: the sink could not discard it: %s", text, error)
        raise
    return text


def _send(calls: Calls, full: Full, sink: Sink, publication: Publication) -> None:
    """The steps of publication.py. Collective."""
    failed: list[BaseException] = []

    def prepare() -> None:
        calls.merged_state.check_tensors(_OP, "make it a tensor")
        refuse_opaque(_OP, full.contents.plan, full.contents.chosen, "use ema.iter_full()")
        with _sink_errors():
            sink.prepare(publication)

    def finish() -> None:
        for error in failed:
            raise error

    def commit(_: list[None]) -> None:
        with _sink_errors():
            sink.commit(publication)

    calls.ranks.agree(f"{_OP} (preparing the sink)", prepare)
    failed += _write(sink, publication, full.tensors, calls.ranks.leader)
    calls.ranks.agree(f"{_OP} (committing)", finish, commit)


class _Nowhere:
    """The sink of a rank that gets no tensors."""

    def prepare(self, publication: Publication) -> None:
        pass

    def write(self, publication: Publication, tensors: Iterator[tuple[str, Tensor]]) -> None:
        for _ in tensors:
            raise AssertionError("only the first rank gets tensors")

    def commit(self, publication: Publication) -> None:
        pass

    def discard(self, publication: Publication) -> None:
        pass


def as_sink(sink: Any) -> Sink:
    """A callable as a `Loader`; a sink is itself. Raises TypeError."""
    if isinstance(sink, Sink) and not isinstance(sink, type):
        return sink
    if not callable(sink) or isinstance(sink, nn.Module | type):
        raise ArgumentTypeError(
            f"{_OP}: got the sink {sink!r:.200}, expected a callable that takes an iterator of "
            "(name, tensor), such as model.load_weights of an engine, or one of "
            "shardema.publishing: FolderSink(path), GroupSink(group), SharedMemorySink(name), or "
            "an object with the methods of publishing.Sink"
        )
    return Loader(sink)


def _write(
    sink: Sink, publication: Publication, tensors: Iterator[tuple[str, Tensor]], receives: bool
) -> list[BaseException]:
    """Gives the tensors to the sink; returns its error, to be raised on all ranks."""
    counted = _Counted(tensors)
    failed: list[BaseException] = []
    try:
        with torch.no_grad(), _sink_errors():
            sink.write(publication, counted)
        if receives and counted.count < len(publication.headers):
            raise CallError(
                f"{_OP}: the sink took {counted.count} of {len(publication.headers)} tensors, "
                "expected all; it must loop over what it is given before it returns"
            )
    except BaseException as error:  # also an interrupt: it must be raised on all ranks
        failed.append(counted.error or error)
    for (
        _
    ) in tensors:  # what the sink did not take; to close an iterator that never ran does nothing
        pass
    for told in failed:
        if is_shared(told):  # the other ranks have it
            raise told
    return failed


@contextlib.contextmanager
def _sink_errors() -> Iterator[None]:
    """Says of an error that is none of this library that the sink raised it."""
    try:
        yield
    except (RankError, ValueError):
        raise
    except Exception as error:
        raise CallError(
            f"{_OP}: the sink raised {type(error).__name__}: {error}; readers have the version "
            "before, but a callable's engine has what it has taken: see publishing.Loader(staged=)"
        ) from error


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
