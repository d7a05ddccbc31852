"""Keeps and draws raw and averaged validation loss of several seeds, as the README shows them.

launch/README.md, "Raw and averaged weights", has the runs, and keeps their curves. Then:
python benchmarks/demo_curves.py draw docs/demo.png
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure

import rows

RESULTS = rows.HERE / "results/demo.csv"
LOSSES = ["train_loss", "raw_loss", "ema_loss"]  # nats per byte
COLUMNS = ["commit", "date", "torch", "device", "world_size", "seed", "step", *LOSSES]


@click.group()
def main() -> None:
    """Curves of the demo."""


@main.command()
@click.argument("seed", type=int)
@click.argument("log", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def keep(seed: int, log: Path) -> None:
    """Append the whole curve of the demo with SEED, from its LOG, to results/demo.csv."""
    start = {
        "commit": rows.commit(),
        "date": rows.today(),
        "torch": torch.__version__,
        "device": "cpu",
        "world_size": 2,
        "seed": seed,
    }
    new = not RESULTS.exists()
    with log.open() as source, RESULTS.open("a", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS)
        if new:
            writer.writeheader()
        for row in csv.DictReader(source):
            writer.writerow(start | {key: row[key] for key in ["step", *LOSSES]})


@main.command()
@click.argument("picture", type=click.Path(path_type=Path))
def draw(picture: Path) -> None:
    """Draw results/demo.csv: one panel for each seed."""
    curves: dict[str, list[dict[str, str]]] = defaultdict(list)
    with RESULTS.open() as source:
        for row in csv.DictReader(source):
            curves[row["seed"]].append(row)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (seed, curve) in zip(panels, sorted(curves.items()), strict=True):
        steps = [int(row["step"]) for row in curve]
        axes.plot(steps, [float(r["raw_loss"]) for r in curve], ".-", color="0.6", label="raw")
        axes.plot(
            steps, [float(r["ema_loss"]) for r in curve], ".-", color="tab:blue", label="average"
        )
        axes.set(title=f"seed {seed}", xlabel="step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per byte)")
    panels[0].legend()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
