"""Plots in the terminal, of the curves that `plot.series` gives; needs plotext."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from shardema.errors import linked

try:
    import plotext
except ImportError as error:
    raise linked(
        ImportError(
            "--format terminal needs plotext: pip install 'shardema[terminal]'", name=error.name
        )
    ) from error

_HEIGHT = 20  # lines of a panel
_WIDEST = 120  # columns


def draw(series: Sequence[Mapping[str, Any]], *, color: bool) -> str:
    """One panel below the other, as wide as the terminal.

    Args:
        color: curves have colors; else only their markers tell them apart.
    """
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in series:
        panels.setdefault((one["title"], one["up"]), []).append(one)
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    return "\n\n".join(_panel(title, curves, width, color) for (title, _), curves in panels.items())


def _panel(title: str, curves: Sequence[Mapping[str, Any]], width: int, color: bool) -> str:
    plotext.clear_figure()
    plotext.plotsize(width, _HEIGHT)
    plotext.theme("pro" if color else "clear")
    plotext.title(title)
    plotext.xlabel(curves[0]["across"])
    for one, marker in zip(curves, _markers(len(curves)), strict=True):
        points = [(x, y) for x, y in zip(one["x"], one["y"], strict=True) if y is not None]
        label = one["label"][: width // 2]
        plotext.plot(*zip(*points, strict=True), label=label, marker=marker)
    built: str = plotext.build()
    return built


def _markers(count: int) -> list[str]:
    return ["*" if count == 1 else chr(ord("a") + number % 26) for number in range(count)]
