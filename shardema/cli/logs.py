"""Reads learning curves from the logs of scripts in launch/, Lightning and transformers.

::

    log.csv, metrics.csv      step,raw_loss,ema_loss,...          launch/record.py, Lightning
    lines of JSON             {"step": 50, "raw_loss": ...}
    trainer_state.json        {"log_history": [{"step": 50, "eval_loss": ...}, ...]}
        -> rows {column: number} -> (steps, values) of a column -> pairs, raw beside averaged
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shardema.errors import ArgumentError

Row = Mapping[str, float]
_STEPS = ("step", "global_step", "epoch")  # columns that order the rows; the first found is used
_AVERAGED = ("ema", "averaged", "average", "avg")


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The numeric cells of each row of a log, by column.

    Args:
        path: CSV with a header line, JSON lines, or the ``trainer_state.json`` of transformers.

    Raises:
        ValueError: another format, or no row has a number.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            text = file.read()
            found = (
                _objects(text)
                if text.lstrip()[:1] in ("{", "[")
                else list(csv.DictReader(io.StringIO(text)))
            )
        except (ValueError, csv.Error, RecursionError) as error:
            raise ArgumentError(f"{path} is not a log: {error}") from error
    rows = [{k: n for k, v in row.items() if (n := _number(v)) is not None} for row in found]
    if not any(rows):
        raise ArgumentError(
            f"{path} has no rows with numbers, expected CSV with a header line, JSON lines, or a "
            "trainer_state.json"
        )
    return [row for row in rows if row]


def _objects(text: str) -> list[dict[str, object]]:
    """Parses one JSON document or JSON lines; an incomplete last line is dropped."""
    try:
        found = json.loads(text)
    except ValueError:
        lines = text.splitlines()
        found = [json.loads(line) for line in lines[:-1] if line.strip()]
        with contextlib.suppress(ValueError):
            found.append(json.loads(lines[-1]))
    if isinstance(found, dict):
        found = found.get("log_history", [found])
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def columns(rows: Sequence[Row]) -> list[str]:
    """The column names of a log, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def step_column(rows: Sequence[Row], given: str | None = None) -> str:
    """The column that orders the rows: ``given``, else step, global_step or epoch.

    Raises:
        ValueError: there is none.
    """
    there = columns(rows)
    if given is not None:
        return _known(given, there)
    found = [name for name in _STEPS if name in there]
    if not found:
        raise ArgumentError(
            f"the log has no column {' or '.join(_STEPS)}; it has {', '.join(there)}"
        )
    return found[0]


def curve(
    rows: Sequence[Row], step: str, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps [n], increasing, and the values [n] of a column; the last row of a step counts.

    Raises:
        ValueError: no such column.
    """
    for column in (step, name):
        _known(column, columns(rows))
    points = sorted({row[step]: row[name] for row in rows if step in row and name in row}.items())
    return np.array([s for s, _ in points]), np.array([value for _, value in points])


def pairs(
    rows: Sequence[Row], raw: str | None = None, averaged: str | None = None
) -> list[tuple[str, str]]:
    """Columns (raw, averaged) of the same quantity: the two given, or all pairs found by name.

    ``ema_loss`` belongs to ``raw_loss`` or ``loss``, ``eval_ema_loss`` to ``eval_loss``,
    ``loss/ema`` to ``loss/raw``.

    Raises:
        ValueError: no such column, or no pair.

    >>> pairs([{"step": 1.0, "train_loss": 2.0, "raw_loss": 2.0, "ema_loss": 1.9}])
    [('raw_loss', 'ema_loss')]
    """
    there = columns(rows)
    if raw is not None and averaged is not None:
        return [(_known(raw, there), _known(averaged, there))]
    found = [(mate, name) for name in there if (mate := _mate(name, there)) is not None]
    if raw is not None:
        found = [pair for pair in found if pair[0] == _known(raw, there)]
    if averaged is not None:
        found = [pair for pair in found if pair[1] == _known(averaged, there)]
    if not found:
        raise ArgumentError(
            "no pair of columns has names such as raw_loss and ema_loss: give the raw and the "
            f"averaged one; the log has {', '.join(there)}"
        )
    return found


def _known(name: str, there: Sequence[str]) -> str:
    if name not in there:
        raise ArgumentError(f"got column {name!r}, expected one of {', '.join(there)}")
    return name


def _mate(name: str, there: Sequence[str]) -> str | None:
    """The raw column that belongs to the averaged column ``name``; None if there is none."""
    words = re.split(r"([_/.\- ])", name)
    for place, word in enumerate(words):
        if word.lower() in _AVERAGED:
            before, after = words[:place], words[place + 1 :]
            without = before + after[1:] if after else before[:-1]
            for mate in ("".join([*before, "raw", *after]), "".join(without)):
                if mate in there:
                    return mate
    return None
