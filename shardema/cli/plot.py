"""Plots of averages: weight profiles, decays, and learning curves.

::

    profile   weight of each step of a run in the average at its end, by schedule
    profiles  the same of averages that were saved, whatever happened to them
    decay     decay of each update, by schedule
    curves    raw and averaged learning curves of a log

Each returns a ``matplotlib.figure.Figure`` without pyplot: ``figure.savefig("picture.png")``.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardema.cli import logs, spec
from shardema.cli.texts import describe, unit_of
from shardema.errors import ArgumentError, linked
from shardema.profiles import Profile
from shardema.schedules import Schedule, as_schedule
from shardema.schedules.base import check_positive
from shardema.schedules.profiles import StepWeights, decays, weight_profile

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import StepPatch
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
except ImportError as error:
    raise linked(
        ImportError(
            "shardema.cli.plot needs matplotlib: pip install 'shardema[plot]'", name=error.name
        )
    ) from error

_SEEN = 0.005  # weight of the initial values from which the legend mentions it
_WIDTH = 104  # characters of a line of the legend


def profile(
    rules: Sequence[Any] | Mapping[str, Any],
    steps: int,
    *,
    dt: float | None = None,
    log: bool = False,
) -> Figure:
    """Plots how much each step of a run contributes to the average at its end.

    The area below a curve and the weight of the initial values, given in the legend, sum to 1. The
    peak of a step that copied the weights is clipped; the legend gives its weight.

    Args:
        rules: schedules, decays, callables ``(t, dt) -> decay``, or strings that
            `shardema.cli.spec.rules` parses, also presets; the keys of a mapping are labels.
        steps: updates of the run.
        dt: samples or tokens per step, for schedules that count them.
        log: logarithmic vertical axis, for averages of very different lengths.

    Raises:
        ValueError: no rules, a string that cannot be parsed, or a ``dt`` that is missing or that
            no schedule uses.

    >>> figure = profile(["power(std=0.10)", 0.999], 1000)
    >>> figure.axes[0].get_xlabel()
    'step'
    """
    clocks = _clocks(rules, dt)
    figure, axes = _figure()
    highest = lowest = 0.0
    for number, (label, (rule, increment)) in enumerate(clocks.items()):
        found = weight_profile(rule, steps, dt=increment)
        edges, heights = _merged(found)
        rest = heights[edges[1:] != found.began]
        peak = float((rest if rest.any() else heights).max())
        label = f"{label}:  {_summary(found, peak)}"
        axes.stairs(heights, edges, baseline=None, label=label, **_style(number))
        highest, lowest = max(highest, peak), min(lowest or peak, peak)
    axes.set(xlim=(0, steps), ylim=(0, 1.08 * highest or 1))
    if log and highest:
        axes.set(yscale="log", ylim=((lowest or highest) / 1000, 2 * highest))
    axes.set_title(f"What the average after {steps:,} {_plural(steps, 'step')} is made of")
    axes.set_ylabel("weight of one step in the average")
    return _finish(figure, axes, clocks)


def profiles(found: Mapping[str, Profile], *, log: bool = False) -> Figure:
    """Plots the profiles of averages as they became, such as `shardema.read_profile` reads.

    The area below a curve, the mass of the initial weights and that of what was imported, given in
    the legend, sum to 1.

    Args:
        found: profiles by label.
        log: logarithmic vertical axis.

    Raises:
        ValueError: none is given, or none of them has an update.
    """
    figure, axes = _figure()
    highest = 0.0
    for number, (label, one) in enumerate(found.items()):
        edges, _ = one.points()
        if len(edges) < 2:
            continue
        heights = one.mass(edges) / np.diff(edges)
        label = f"{label}:  {describe(one)}"
        axes.stairs(heights, edges, baseline=None, label=label, **_style(number))
        highest = max(highest, float(heights.max()))
    if not highest:
        raise ArgumentError(f"profiles: got {list(found)}, of which none has the mass of an update")
    axes.set(ylim=(0, 1.08 * highest))
    if log:
        axes.set(yscale="log", ylim=(highest / 1e6, 2 * highest))
    units = sorted({unit_of(one) for one in found.values()})
    axes.set_title("What the averages are made of")
    axes.set_ylabel(f"mass of one {' or '.join(units)} in the average")
    return _finish(figure, axes, {}, " or ".join(units))


def decay(
    rules: Sequence[Any] | Mapping[str, Any], steps: int, *, dt: float | None = None
) -> Figure:
    """Plots the decay of the updates of a run; the right axis is the horizon, 1 / (1 - decay).

    The axis is logarithmic in 1 - decay: 0.9, 0.99 and 0.999 are equally spaced. Updates that do
    not change the average have no point.

    Args:
        rules: as in `profile`.
        steps: updates of the run.
        dt: samples or tokens per step, for schedules that count them.

    Raises:
        ValueError: as `profile`.

    >>> figure = decay({"slow": 0.999, "fast": 0.9}, 1000)
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['slow', 'fast']
    """
    clocks = _clocks(rules, dt)
    figure, axes = _figure()
    nines = [0.0]
    for number, (label, (rule, increment)) in enumerate(clocks.items()):
        at, values = decays(rule, steps, dt=increment)
        label = label if len(at) else f"{label}:  never changes"
        axes.plot(at, values, label=label, marker=_dots(at, 50), **_style(number))
        nines += _nines(values).tolist()
    axes.set(xscale="log" if steps >= 10 else "linear", xlim=(1, max(2, steps)))
    axes.set_title(f"Decay of each update, over {steps:,} {_plural(steps, 'step')}")
    _nines_axis(axes, "decay", "{decay}", max(nines))
    _nines_axis(axes.twinx(), "horizon, 1 / (1 - decay), in updates", "{horizon:,}", max(nines))
    return _finish(figure, axes, clocks)


def reached(
    edges: NDArray[np.float64],
    wanted: NDArray[np.float64],
    found: NDArray[np.float64],
    *,
    target: str,
    residual: float,
    unit: str = "step",
) -> Figure:
    """Plots the profile that was wanted and the one that snapshots reach.

    Args:
        edges: of cells of time, [n + 1].
        wanted, found: their masses, [n].
        target, residual: for the title.
        unit: of the time.

    >>> figure = reached(np.arange(3.0), np.array([0.0, 1.0]), np.array([0.1, 0.9]), target="x",
    ...                  residual=0.1)
    >>> figure.axes[0].get_xlabel()
    'step'
    """
    figure, axes = _figure()
    last = len(edges) - 1
    coarse = np.unique(np.append(np.arange(0, last, max(1, last // 1000)), last))
    for number, (label, masses) in enumerate((("wanted", wanted), ("reached", found))):
        heights = np.diff(np.append(0, np.cumsum(masses))[coarse]) / np.diff(edges[coarse])
        axes.stairs(heights, edges[coarse], baseline=None, label=label, **_style(number))
    held = np.flatnonzero(np.abs(wanted) + np.abs(found) > 1e-9)
    start = edges[held[0]] if len(held) else edges[0]
    axes.set_xlim(start - 0.05 * (edges[-1] - start), edges[-1])
    axes.set_title(f"{target} at {edges[-1]:,.0f}: residual {residual:.2g}", parse_math=False)
    axes.set_ylabel(f"weight of one {unit}", parse_math=False)
    axes.set_xlabel(unit, parse_math=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def curves(
    log: str | os.PathLike[str] | Sequence[logs.Row],
    *,
    raw: str | None = None,
    averaged: str | None = None,
    step: str | None = None,
    unit: str = "",
) -> Figure:
    """Plots the raw and averaged learning curves of a log, one panel per quantity.

    A column ``..._distance``, between average and weights, has its own panel.

    Args:
        log: a file that `shardema.cli.logs.read` reads, or its rows, ``{column: number}``.
        raw: column of the raw weights; None uses all pairs found by name, such as ``raw_loss``
            and ``ema_loss``, ``eval_loss`` and ``eval_ema_loss``.
        averaged: column of the average.
        step: column of the horizontal axis; None uses step, global_step or epoch.
        unit: of the quantities, for the vertical axis.

    Raises:
        ValueError: another format, a missing column, or no pair of columns.
        OSError: the log cannot be read.

    >>> rows = [{"step": 10.0, "raw_loss": 2.0, "ema_loss": 1.5}]
    >>> [axes.get_ylabel() for axes in curves(rows, unit="nats").axes]
    ['loss (nats)']
    """
    rows = logs.read(log) if isinstance(log, str | os.PathLike) else list(log)
    across = logs.step_column(rows, step)
    found = logs.pairs(rows, raw, averaged)
    apart = [n for n in logs.columns(rows) if n.endswith("distance")]
    apart = [n for n in apart if np.isfinite(logs.curve(rows, across, n)[1]).any()]
    figure = Figure(figsize=(6 * len(found + apart) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(found) + len(apart), squeeze=False)[0]
    for axes, pair in zip(panels, found, strict=False):
        for name, kind, color in zip(pair, ("raw", "average"), ("0.55", "C0"), strict=True):
            steps, values = logs.curve(rows, across, name)
            label = f"{kind}: {name}, {values[-1]:.4g} at the end" if len(values) else kind
            axes.plot(steps, values, color=color, marker=_dots(steps), label=label)
        quantity = _quantity(*pair)
        axes.set_title(f"Raw and averaged weights: {quantity}", parse_math=False)
        axes.set_ylabel(f"{quantity} ({unit})" if unit else quantity, parse_math=False)
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
    for axes, name in zip(panels[len(found) :], apart, strict=True):
        steps, values = logs.curve(rows, across, name)
        axes.plot(steps, values, color="C0", marker=_dots(steps))
        axes.set_title("How far the average is from the weights")
        axes.set_ylabel(f"{name} (share of their norm)", parse_math=False)
        axes.set_ylim(bottom=0)
    for axes in panels:
        axes.set_xlabel(across, parse_math=False)
        axes.grid(alpha=0.3)
    return figure


def _clocks(rules: Any, dt: float | None) -> dict[str, tuple[Schedule, float]]:
    """Schedules by label, each with the progress of one step in its unit."""
    found: dict[str, Schedule] = {}
    for label, rule in _labelled(rules):
        if label in found:
            raise ArgumentError(f"rules: got {label!r} twice, expected each once")
        found[label] = rule
    if not found:
        raise ArgumentError("rules: got none, expected one schedule or more")
    units = sorted({rule.unit for rule in found.values()} - {"step"})
    if len(units) > 1:
        raise ArgumentError(f"rules: got schedules in {units}, expected steps and one other unit")
    if units and dt is None:
        raise ArgumentError(f"dt: a schedule counts {units[0]}s, so say how many one step has")
    if not units and dt is not None:
        raise ArgumentError(f"dt: got {dt}, but every schedule counts steps")
    if dt is not None:
        check_positive(dt, "dt")
    increment = 1 if dt is None else int(dt) if dt == int(dt) else dt
    return {label: (rule, 1 if rule.unit == "step" else increment) for label, rule in found.items()}


def _labelled(rules: Any) -> Iterable[tuple[str, Schedule]]:
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise ArgumentError(f"rules: got {rules!r}, expected a list of schedules or a mapping")
    if isinstance(rules, Mapping):
        for label, rule in rules.items():
            yield str(label), spec.schedule(rule) if isinstance(rule, str) else as_schedule(rule)
        return
    for rule in rules:
        if isinstance(rule, str):
            yield from spec.rules(rule).items()
        else:
            yield str(rule), as_schedule(rule)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), layout="constrained")  # not pyplot: there may be no display
    return figure, figure.subplots()


def _finish(
    figure: Figure,
    axes: Axes,
    clocks: Mapping[str, tuple[Schedule, float]],
    across: str = "step",
) -> Figure:
    units = {rule.unit: increment for rule, increment in clocks.values() if rule.unit != "step"}
    per_step = "".join(f" (of {n:,} {_plural(n, unit)})" for unit, n in units.items())
    axes.set_xlabel(f"{across}{per_step}", parse_math=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    wrapped = [textwrap.fill(label, _WIDTH, subsequent_indent="    ") for label in labels]
    legend = figure.legend(handles, wrapped, loc="outside lower left", frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _style(number: int) -> dict[str, Any]:
    # equal curves stay visible below one another
    style = ("-", "--", "-.", ":")[number % 4]
    return {"linestyle": style, "color": f"C{number % 10}", "linewidth": 1.6}


def _plural(count: float, unit: str) -> str:
    return unit if count == 1 else f"{unit}s"


def _merged(found: StepWeights) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Edges [n + 1], and the weight per step [n] between them.

    Steps that do not change the average are merged with the next one that does: if it changes
    every k steps, its weight is spread over k steps.
    """
    changes = found.kept < 1
    if not changes.any():
        changes[-1] = True
    edges = np.append(0, found.edges[1:][changes])
    return edges, found.mass[changes] / np.diff(edges)


def _summary(found: StepWeights, peak: float) -> str:
    """Width and mean age of a profile, and the weight of its beginning if that stands out."""
    text = f"relative std {found.relative_std:#.3g}, mean age {_steps(found.mean_age)}"
    if found.began and found.beginning > 2 * peak:
        return f"{text}, {100 * found.beginning:.3g} % from step {found.began:,}, a copy"
    if not found.began and found.initial >= _SEEN:
        return f"{text}, {100 * found.initial:.3g} % from before step 1"
    return text


def _steps(count: float) -> str:
    digits = 0 if count >= 1000 else 1
    return f"{count:,.{digits}f} steps"


def _nines(decay: NDArray[np.float64]) -> NDArray[np.float64]:
    """``-log10(1 - decay)``: 0 for 0, 1 for 0.9, 2 for 0.99."""
    return -np.log10(np.clip(1 - np.asarray(decay, np.float64), 1e-17, None))


def _decay_of(nines: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 - 10.0 ** -np.asarray(nines, np.float64)


def _nines_axis(axes: Axes, label: str, tick: str, most: float) -> None:
    """A vertical axis of decays, linear in `_nines`, up to ``most`` of them."""
    top = max(1, math.ceil(most - 1e-9))
    axes.set_yscale("function", functions=(_nines, _decay_of))
    numbers = range(top + 1)
    written = [f"{1 - 10.0**-n:.{n}f}" for n in numbers]
    labels = [tick.format(decay=written[n], horizon=10**n) for n in numbers]
    axes.set_yticks([float(text) for text in written], labels)
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = _decay_of(np.array([-0.04 * top, 1.04 * top]))
    axes.set_ylim(low, high)
    axes.set_ylabel(label)


def _dots(steps: NDArray[Any], most: int = 200) -> str:
    """Markers if there are few points: a single point has no line."""
    return "." if len(steps) <= most else ""


def _quantity(raw: str, averaged: str) -> str:
    """The common part of both names: loss for raw_loss and ema_loss."""
    if raw.replace("raw", "") == raw:
        return raw
    return raw.replace("raw", "").strip("_/.- ") or "value"


def series(figure: Figure) -> list[dict[str, Any]]:
    """What a figure of this module shows, as lists: of each curve its panel, label, x and y.

    A profile is constant between its edges; each edge is a point with the height after it.

    >>> [(one["label"], one["x"][0], one["y"][0]) for one in series(decay([0.9], 10))]
    [('0.9', 1.0, 0.9)]
    """
    found = []
    for axes in figure.axes:
        panel = {"title": axes.get_title(), "across": axes.get_xlabel(), "up": axes.get_ylabel()}
        for line in axes.lines:
            label, (x, y) = str(line.get_label()), line.get_data()
            found.append({**panel, "label": label, "x": _floats(x), "y": _floats(y)})
        for patch in axes.patches:
            if isinstance(patch, StepPatch):
                heights, edges, _ = patch.get_data()
                label, y = str(patch.get_label()), [*heights, *heights[-1:]]
                found.append({**panel, "label": label, "x": _floats(edges), "y": _floats(y)})
    return found


def _floats(values: Any) -> list[float | None]:
    """Numbers of a curve; None for what is not finite."""
    return [float(value) if math.isfinite(value) else None for value in values]
