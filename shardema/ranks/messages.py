"""The messages of a round: errors and arrays as JSON, comparison of the ranks' calls, arguments."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import traceback
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shardema.errors import ArgumentError, ArgumentTypeError, CallError, CheckpointError, RankError

_RAISED: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "RuntimeError": RuntimeError,
    "ArgumentError": ArgumentError,
    "ArgumentTypeError": ArgumentTypeError,
    "CallError": CallError,
    "CheckpointError": CheckpointError,
    "RankError": RankError,
}
OTHERS = 4  # errors of other ranks that are reported beside the first one
LONG = 400  # characters of each of them
_TRACE = 3000  # characters of a traceback, its end


def different(came: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Describes ranks in different calls, or in the same call of different EMAs; else ""."""
    calls: dict[str, list[int]] = {}
    for rank, message in came:
        calls.setdefault(message["op"], []).append(rank)
    if len(calls) > 1:
        listed = "; ".join(f"{_ranks(ranks)} {_calls(ranks)} {op}" for op, ranks in calls.items())
        return f"ranks differ: {listed}{_missed(came)}"
    objects: dict[Any, list[int]] = {}
    for rank, message in came:
        who, before = message["who"]
        if who is not None or not before:  # else the reply with its number did not arrive
            objects.setdefault(who, []).append(rank)
    if len(objects) > 1:
        (one, other) = list(objects.values())[:2]
        return (
            f"ranks differ: {_ranks(other)} {_calls(other)} {came[0][1]['op']} of another EMA than "
            f"{_ranks(one)}{_missed(came)}; build and use the EMAs in the same order on all ranks"
        )
    return ""


def unequal(op: str, came: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any] | None:
    """The error if an argument or a clock differs between ranks; else None."""
    leader, first = came[0]
    for name in first["same"] or {}:
        values: dict[str, list[int]] = {}
        for rank, message in came:
            value = (message["same"] or {}).get(name)
            values.setdefault(json.dumps(value), []).append(rank)
        if len(values) == 1:
            continue
        each = [f"{_ranks(ranks)}: {value}" for value, ranks in values.items()]
        listed = "; ".join(each[:8]) + (f"; and {len(each) - 8} more" if len(each) > 8 else "")
        listed += _missed(came)
        if name.startswith("clock"):
            return rank_error(
                next(rank for rank, message in came if message["same"] != first["same"]),
                f"{op}: the ranks are out of step: {name} is {listed}; every rank must update as "
                "often (not under `if rank == 0`; uneven inputs under Join, and local SGD, step "
                "some ranks more often): load a checkpoint or call reset() on all ranks",
            )
        text = f"{op}: the ranks got different arguments: {name} is {listed}; give the same "
        return {**rank_error(leader, f"{text}{name} on every rank"), "type": "ArgumentError"}
    return None


def _missed(came: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Describes a missed call if the ranks' numbers of calls differ; else ""."""
    behind, message = min(came, key=lambda pair: int(pair[1]["who"][1]))
    ahead, most = max(came, key=lambda pair: int(pair[1]["who"][1]))
    if message["who"][1] == most["who"][1]:
        return ""
    return (
        f" (rank {behind} has missed a call of this EMA: the last one on rank {ahead} was "
        f"{most['last']}, on rank {behind} {message.get('last', 'none')})"
    )


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {list(ranks[:8])}{more}"


def _calls(ranks: Sequence[int]) -> str:
    return "calls" if len(ranks) == 1 else "call"


def everywhere(text: str, op: str) -> str:
    return f"{text}; {op} is collective: call it on every rank that shares the model"


def rank_error(rank: int, text: str) -> dict[str, Any]:
    return {"type": "RankError", "text": text, "rank": rank, "path": "", "errno": None}


def packed(error: BaseException, rank: int) -> dict[str, Any]:
    kind = type(error).__name__
    text = str(error)
    trace = ""
    if _RAISED.get(kind) is not type(error):
        text = f"{kind}: {text}"
        kind = "RankError"
        trace = "".join(traceback.format_exception(error))[-_TRACE:]
    if not text.startswith("rank "):
        text = f"rank {rank}: {text}"
    path = getattr(error, "path", None) or getattr(error, "filename", None) or ""
    errno = getattr(error, "errno", None)
    known = getattr(error, "rank", -1)
    return {
        "type": kind,
        "text": text,
        "rank": rank if known < 0 else known,
        "path": str(path),
        "errno": errno,
        "traces": {str(rank): trace} if trace else {},
    }


def joined(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first error, with the texts and tracebacks of the others."""
    first = errors[0]
    seen = {_bare(first["text"])}
    texts = [first["text"]]
    alike = 0
    for error in errors[1:]:
        if _bare(error["text"]) in seen:
            alike += 1
            continue
        seen.add(_bare(error["text"]))
        texts.append(error["text"] if len(error["text"]) <= LONG else error["text"][:LONG] + "...")
    more = len(texts) - 1 - OTHERS
    text = "; ".join(texts[: 1 + OTHERS]) + (f"; and {more} more errors" if more > 0 else "")
    if alike:
        text += f" (and so on {alike} more rank{'s' if alike > 1 else ''})"
    traces: dict[str, str] = {}
    for error in errors[: 1 + OTHERS]:
        traces.update(error.get("traces", {}))
    return {**first, "text": text, "traces": traces}


def _bare(text: str) -> str:
    return re.sub(r"^rank \d+: ", "", text)


def unpacked(message: dict[str, Any], rank: int) -> Exception:
    cls = _RAISED[message["type"]]
    if issubclass(cls, RankError):
        error: Exception = cls(
            message["text"], rank=message["rank"], path=message["path"], errno=message["errno"]
        )
    else:
        error = cls(message["text"])
    for other, trace in message.get("traces", {}).items():
        if int(other) != rank and hasattr(error, "add_note"):  # its own is the cause
            error.add_note(f"on rank {other}:\n{trace}")
    return error


def text_of(values: Sequence[int], dtype: DTypeLike) -> str:
    """Integers as a text, shorter than they are as JSON."""
    return base64.b64encode(zlib.compress(np.array(values, dtype).tobytes())).decode()


def array_of(text: str, dtype: DTypeLike) -> NDArray[Any]:
    """The integers of which `text_of` made a text, ``[number of them]``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


_SHARED = "_shardema_shared"  # marks an error that is raised on all ranks
_E = TypeVar("_E", bound=BaseException)


def mark_shared(error: _E) -> _E:
    with contextlib.suppress(AttributeError):
        setattr(error, _SHARED, True)
    return error


def is_shared(error: BaseException) -> bool:
    """Whether the error is raised on all ranks."""
    return getattr(error, _SHARED, False)
