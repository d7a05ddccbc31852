"""Print and draw what a run has logged: curves.py LOG.csv PICTURE.png."""

from pathlib import Path

import click
from matplotlib.figure import Figure

import record


@click.command()
@click.argument("log", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("picture", type=click.Path(path_type=Path))
def main(log: Path, picture: Path) -> None:
    """Print LOG as a table; draw its validation losses and the average's distance into PICTURE."""
    rows = record.read(log)
    if not rows:
        raise click.ClickException(f"{log} has no rows")
    watched = {f"{name}_loss": name for name in record.watched(log)}
    titles = {"raw_loss": "raw loss", "ema_loss": "EMA loss", **watched}
    widths = {column: max(12, len(title) + 2) for column, title in titles.items()}
    click.echo(f"{'step':>8}" + "".join(f"{titles[c]:>{w}}" for c, w in widths.items()))
    for row in rows:
        cells = [f"{row[c]:{w}.6f}" if c in row else f"{'-':>{w}}" for c, w in widths.items()]
        click.echo(f"{row['step']:8.0f}" + "".join(cells))
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(11, 4), layout="constrained")  # not pyplot: there may be no display
    axes, beside = figure.subplots(1, 2, width_ratios=(3, 2))
    axes.plot(steps, [row["raw_loss"] for row in rows], color="0.6", marker=".", label="raw")
    axes.plot(steps, [row["ema_loss"] for row in rows], color="tab:blue", marker=".", label="EMA")
    for number, (column, name) in enumerate(watched.items(), 1):  # C0 is the blue of the first
        points = [(row["step"], row[column]) for row in rows if column in row]
        places, losses = [s for s, _ in points], [loss for _, loss in points]
        axes.plot(places, losses, color=f"C{number}", marker=".", label=name)
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)")
    axes.set_title("The same run, evaluated with raw and with averaged weights")
    axes.grid(alpha=0.3)
    axes.legend()
    beside.plot(steps, [row["ema_distance"] for row in rows], color="tab:blue", marker=".")
    beside.set(xlabel="step", ylabel="distance / norm of the weights", ylim=(0, None))
    beside.set_title("How far the average is from the weights")
    beside.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    click.echo(f"drawn in {picture}")


if __name__ == "__main__":
    main()
