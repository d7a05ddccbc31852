"""Lengths of time as MosaicML Composer writes them: ``"1000ba"``, ``"1ep"``, ``"0.1dur"``."""

from __future__ import annotations

import re

from shardema.schedules.base import check_positive

_CLOCKS = {"ba": "step", "sp": "sample", "tok": "token"}
_TEXT = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)(ba|sp|tok|ep|dur)")


def parse_length(
    text: str, unit: str, epoch: float | None, run: float | None, what: str
) -> tuple[float, str]:
    """A text as progress and its unit.

    ============  ====================================================
    ``"1000ba"``  batches, the steps of the clock
    ``"512sp"``   samples
    ``"1e6tok"``  tokens
    ``"1ep"``     epochs, each ``epoch`` units long
    ``"0.1dur"``  a share of the run, which is ``run`` units long
    ============  ====================================================

    Raises:
        ValueError: no such text, a length that it needs is missing, or another clock.

    >>> parse_length("0.1dur", "step", None, 5000, "half_life")
    (500.0, 'step')
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{what}: got {text!r}, expected a number and a unit: 1000ba (batches), 512sp "
            "(samples), 1e6tok (tokens), 1ep (epochs) or 0.1dur (a share of the run)"
        )
    value, suffix = float(match[1]), match[2]
    if suffix in _CLOCKS:
        clock = _CLOCKS[suffix]
        if unit not in ("step", clock):
            raise ValueError(f"{what}: got {text!r} and unit={unit!r}, expected unit={clock!r}")
        return value, clock
    if suffix == "ep" and unit == "epoch":
        return value, unit
    name, length = ("epoch", epoch) if suffix == "ep" else ("run", run)
    if length is None:
        raise ValueError(f"{what}: got {text!r}, so give the length too: {name}=<{unit}s>")
    check_positive(length, f"{what}, {name}")
    return value * length, unit
