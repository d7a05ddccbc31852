"""The history of an average as JSON, in a manifest or as a text in a state dict."""

from __future__ import annotations

import json
import reprlib
import sys
from typing import Any

from shardema.files.safetensors import checked_int, checked_list, checked_text, parse_json
from shardema.profiles import History, Run, Segment

_MAX_DEPTH = 100  # of objects and lists in a schedule


def pack(history: History) -> dict[str, Any]:
    """The history as JSON can hold it."""
    return {
        "begin": history.begin,
        "imported": history.imported,
        "segments": [
            {
                "schedule": segment.description,
                "runs": [[run.end, run.count, run.even, run.kept] for run in segment.runs],
            }
            for segment in history.segments
        ],
    }


def parse(value: Any, end: float) -> History:
    """The history that `pack` packed, checked.

    Args:
        end: its last update point.

    Raises:
        KeyError, TypeError, ValueError: it is none, or ends at another time.
    """
    begin = reached = checked_number(value["begin"])
    segments: list[Segment] = []
    for one in checked_list(value["segments"]):
        runs = []
        for run in checked_list(one["runs"]):
            runs.append(_run(run, reached))
            reached = runs[-1].end
        if not runs:
            raise ValueError("a segment without runs")
        first = segments[-1].end if segments else begin
        segments.append(Segment(checked_schedule(one["schedule"]), first, tuple(runs)))
    if reached != end:
        raise ValueError(f"a history up to {reached}, expected {end}")
    return History(begin, checked_bool(value["imported"]), tuple(segments))


def to_text(history: History) -> str:
    """The history as one text, which torch.distributed.checkpoint stores as a whole."""
    return json.dumps(pack(history), allow_nan=False)


def from_text(text: Any, end: float) -> History:
    """The history that `to_text` wrote.

    Raises:
        KeyError, TypeError, ValueError: as `parse`.
    """
    return parse(parse_json(memoryview(checked_text(text).encode())), end)


def _run(value: Any, begin: float) -> Run:
    end, count, even, kept = checked_list(value)
    end, count = checked_number(end), checked_int(count)
    if end < begin or count < 1:
        raise ValueError(f"{count} updates from {begin} to {end}")
    if kept is not None:
        kept = tuple(float(checked_number(share)) for share in checked_list(kept))
        if not kept or max(kept) > 1:
            raise ValueError(f"retentions {reprlib.repr(kept)}, expected numbers in [0, 1]")
    return Run(end, count, checked_bool(even), kept)


def checked_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"expected true or false, got {reprlib.repr(value)}")
    return value


def checked_number(value: Any) -> float:
    """A finite number of 0 or more. Raises ValueError."""
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"expected a number, got {reprlib.repr(value)}")
    number: float = value
    return number


def checked_schedule(value: Any) -> dict[str, Any]:
    """A schedule as `schedules.describe` returns it. Raises ValueError."""
    checked_text(value["name"])
    if type(value["params"]) is not dict:
        raise ValueError(f"params of a schedule: {reprlib.repr(value['params'])}, expected a dict")
    _check_depth(value, _MAX_DEPTH)
    return dict(value)


def _check_depth(value: Any, left: int) -> None:
    """A schedule is shown and compared, which recursion does; its depth is that of its parts."""
    if left == 0:
        raise ValueError("a schedule that is nested too deep")
    if isinstance(value, dict):
        for name in value:
            checked_text(name)
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, (dict, list)):
            _check_depth(part, left - 1)
        elif isinstance(part, str):
            checked_text(part)
