"""Draws the newest rows of each file in results/: one picture for each layout and question.

::

    python benchmarks/plot.py --out pictures

A bar is the median of the turns, its whisker goes from p20 to p80. A provider without a number has
its reason in the place of the bar.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rows
from rows import HERE, Row

OURS = "shardema"
_COLUMNS = 3  # panels beside each other


@dataclass(frozen=True)
class Picture:
    """What one picture shows of a file.

    Attributes:
        metric: the rows that are bars.
        case: matches the cases that are meant; a panel for each of its first groups, a word of
            the second group, if there is one, belongs to the label of a bar.
    """

    name: str
    file: str
    metric: str
    label: str
    case: str = "(.*)"


PICTURES = (
    Picture("update-plain", "update", "time_to_limit", "time / one flat lerp_", r"(plain [^,]*)"),
    Picture("update-fsdp2", "update", "time_to_limit", "time / one flat lerp_", r"(fsdp2 [^,]*)"),
    Picture(
        "update-averages", "update", "time_to_one_average", "time / one average", r"(.*), (\d+).*"
    ),
    Picture("wrappers", "wrappers", "time", "us of an update", r"(?=.* (\d+ MiB))(.*) .*/.*"),
    Picture(
        "plan", "plan", "planned_to_average", "planned / allocated", r"(?=.* (\d+ MiB))(.*) .*/.*"
    ),
    Picture("commands", "commands", "time", "s of the process"),
    Picture("step", "step", "overhead", "% of a training step"),
    Picture("swap", "swap", "time", "ms for a swap, in and out"),
    Picture("gather", "gather", "time", "s to the first rank"),
    Picture("checkpoint", "checkpoint", "time_to_raw", "time / the disk alone"),
    Picture("merge", "merge", "time", "s to merge the checkpoints"),
    Picture("replicas", "replicas", "time_to_limit", "time / one sum of the bits"),
    Picture("publish", "publish", "time", "s to the reader's side"),
    Picture(
        "calls",
        "calls",
        "cpu_of_leader",
        "s of a core for the first rank and the store",
        "(call) of (.*)",
    ),
    Picture("arithmetic", "arithmetic", "max_error", "largest relative error", r"(noise .*)"),
    Picture("export", "export", "time", "s to one file"),
    Picture(
        "memory", "memory", "peak_memory", "MiB at the peak, on the worst rank", r"(.*MiB) (.*)"
    ),
)


# ---- bars -------------------------------------------------------------------------------------


def bars(picture: Picture, found: Sequence[Row]) -> Figure | None:
    """The picture; None where there is no row for it."""
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in found:
        match = re.fullmatch(picture.case, row.case)
        if match is None or not (row.metric == picture.metric or not row.unit):
            continue
        panel, *more = match.groups()
        label = " ".join([*more, row.provider])
        ranks = "1 rank" if row.world_size == 1 else f"{row.world_size} ranks"
        panels.setdefault(f"{panel}, {ranks}", []).append((label, row))
    panels = {name: _in_order(bars) for name, bars in panels.items()}
    panels = {name: bars for name, bars in panels.items() if bars[0][1].unit}
    if not panels:
        return None
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(bars) for bars in panels.values())
    size = (5.2 * columns, lines * (0.9 + 0.24 * tallest))
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for place, (name, bars) in zip(axes, panels.items(), strict=False):
        draw_panel(place, bars, picture)
        place.set_title(name, fontsize=9)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    newest = found[-1]
    figure.suptitle(f"{newest.device}, torch {newest.torch}", fontsize=8)
    return figure


def _in_order(bars: Sequence[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Case by case, as they came; those without a number at the end."""
    cases = [row.case for _, row in bars]
    return sorted(bars, key=lambda bar: (not bar[1].unit, cases.index(bar[1].case)))


def draw_panel(axes: Axes, bars: Sequence[tuple[str, Row]], picture: Picture) -> None:
    """Horizontal bars in the order of the rows, those without a number as their reason."""
    for y, (_, row) in enumerate(bars):
        if row.unit:
            color = "tab:blue" if row.provider.startswith(OURS) else "0.7"
            axes.barh(y, row.p50, color=color)
            axes.plot([row.p20, row.p80], [y, y], color="black", linewidth=1)
            axes.annotate(
                f"{row.p50:.3g}", (max(row.p80, 0), y), (3, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
        else:
            axes.annotate(
                _shortened(row.metric), (0, y), (3, 0), textcoords="offset points",
                va="center", fontsize=6, color="tab:red",
            )  # fmt: skip
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel(picture.label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if picture.metric == "time_to_limit":
        axes.axvline(1, color="black", linewidth=0.6, linestyle=":")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# ---- growth -----------------------------------------------------------------------------------


def growth(found: Sequence[Row]) -> Figure | None:
    """Plans and shadows over the number of ranks and tensors."""
    plans = points(found, r"plan (\d+) ranks x (\d+) tensors", "time")
    if not plans:
        return None
    most_ranks, most_tensors = max(r for r, _ in plans), max(t for _, t in plans)
    over: dict[str, tuple[str, dict[int, float]]] = {
        "ranks": (
            f"s to plan for {most_tensors} tensors",
            {r: y for (r, t), y in plans.items() if t == most_tensors},
        ),
        "tensors": (
            f"s to plan for {most_ranks} ranks",
            {t: y for (r, t), y in plans.items() if r == most_ranks},
        ),
        "ranks of a llama": (
            "MiB of shadows on a rank",
            {key[0]: y for key, y in points(found, r"llama.* (\d+) ranks", "shadows").items()},
        ),
        "ranks of a llama ": (
            "s to read the shards of a rank",
            {key[0]: y for key, y in points(found, r"llama.* (\d+) ranks", "read").items()},
        ),
    }
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, (x, (y, line)) in zip(figure.subplots(1, len(over)), over.items(), strict=True):
        axes.plot(list(line), list(line.values()), "o-", color="tab:blue")
        axes.set(xlabel=x.strip(), ylabel=y)
        if "shadows" in y:
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(0, 1.08 * max(line.values()))
        axes.grid(alpha=0.3)
    return figure


def points(found: Sequence[Row], case: str, metric: str) -> dict[tuple[int, ...], float]:
    """Medians by the numbers in their case, ascending."""
    matched = ((re.fullmatch(case, row.case), row) for row in found if row.metric == metric)
    return dict(sorted((tuple(map(int, m.groups())), row.p50) for m, row in matched if m))


def main(argv: Sequence[str] | None = None) -> int:
    """Draws what there is, and says so."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of CSV files"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of pictures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    todo: list[tuple[str, str, Callable[[Sequence[Row]], Figure | None]]] = [
        (p.name, p.file, lambda found, p=p: bars(p, found)) for p in PICTURES
    ]
    todo.append(("scale", "scale", growth))
    for name, file, draw in todo:
        source = args.results / f"{file}.csv"
        figure = draw(rows.newest(rows.read(source))) if source.exists() else None
        if figure is None:
            print(f"{name}: no rows in {source}")
            continue
        figure.savefig(args.out / f"{name}.png", dpi=110)
        print(f"{name}: {args.out / name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
