"""Does averaging afterwards stand for a decay of the learning rate? One experiment, three seeds.

    run at a constant rate  -block means, online windows->  snapshots  -posthoc windows->  losses
          \\-- the same run, its rate really decayed over the last LENGTH steps ---------->  losses

Every run of a seed ends at the same step with the same batches, so their losses can be compared.
Prints rows of loss by length, and adds them to a CSV; see decay_afterwards.sh and docs/decay.md.
"""

import csv
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from shardema import ShardedEMA, posthoc, schedules
from shardema.snapshots import Snapshots
from torch import Tensor, nn
from tqdm import tqdm

import chars
from gpt import GPT, GPTConfig

CONFIG = GPTConfig(layers=2, width=96, heads=4, context=64)
BATCH, WARMUP, WINDOWS = 8, 20, 256
COLUMNS = ("seed", "kind", "curve", "length", "loss", "residual")
CURVES: dict[str, Callable[[float], float]] = {  # rate at a share x of the decay
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
}


class Run:
    """A GPT in training: model, optimizer and the steps that it has made."""

    def __init__(self, seed: int, lr: float, corpus: chars.Corpus) -> None:
        torch.manual_seed(seed)
        self.seed, self.lr, self.corpus = seed, lr, corpus
        self.model: nn.Module = GPT(CONFIG)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95))

    def step(self, number: int, rate: float = 1.0) -> None:
        """Step ``number``, 1, 2, ..., at a share ``rate`` of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.lr * rate * min(1, number / WARMUP)
        place = (self.seed, number)
        x, y = chars.batch(self.corpus.train, CONFIG.context, BATCH, place)
        loss_of(self.model, x, y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return torch.utils._pytree.tree_map(copied, held)

    def restore(self, state: dict[str, Any]) -> None:
        state = torch.utils._pytree.tree_map(copied, state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows."""
        starts = chars.validation_starts(self.corpus.validation, CONFIG.context, WINDOWS)
        x, y = chars.windows(self.corpus.validation, CONFIG.context, starts)
        return loss_of(self.model, x, y).item()


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# ---- the runs of one seed ---------------------------------------------------------------------


def constant_run(
    run: Run, steps: int, lengths: list[int], block: int, folder: str
) -> tuple[ShardedEMA, dict[int, dict[str, Any]]]:
    """Trains at a constant rate; returns the averages and the states where decays may begin."""
    rules: dict[str, Any] = {"blocks": schedules.block_mean(block)}
    for length in lengths:
        for curve, gamma in (("linear", 0.0), ("minus-sqrt", -0.5)):
            rule = schedules.power(gamma=gamma)
            rules[f"{curve}.{length}"] = schedules.start(rule, at=steps - length)
    ema = ShardedEMA(run.model, rules)
    states = {}
    with Snapshots(ema, folder, names=["blocks"]) as snapshots:
        for number in tqdm(range(1, steps + 1), desc=f"seed {run.seed}, constant", disable=None):
            run.step(number)
            ema.update()
            snapshots.step(number)
            if steps - number in lengths:
                states[steps - number] = run.state()
    return ema, states


def decayed(run: Run, state: dict[str, Any], steps: int, length: int, curve: str) -> float:
    """Loss of the same run with its rate decayed over the last ``length`` steps."""
    run.restore(state)
    for number in range(steps - length + 1, steps + 1):
        share = (number - (steps - length)) / length
        run.step(number, CURVES[curve](share - 1 / (2 * length)))  # at the middle of the step
    return run.validate()


def seed_rows(seed: int, steps: int, lr: float, block: int, lengths: list[int]) -> list[Any]:
    """Every loss of one seed, as rows of `COLUMNS`."""
    run = Run(seed, lr, chars.read(None, CONFIG.context))
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        ema, states = constant_run(run, steps, lengths, block, folder)
        rows.append((seed, "raw", "", 0, run.validate(), 0.0))
        for name in ema.names[1:]:
            curve, length = name.split(".")
            with ema.swap(name):
                rows.append((seed, "online", curve, int(length), run.validate(), 0.0))
        snapshots = posthoc.open(folder)
        for curve in CURVES:
            for length in range(2 * block, steps * 3 // 4 + 1, 2 * block):
                found = snapshots.target(posthoc.window(length, curve), allow_residual=True)
                with ema.swap(found):
                    loss = run.validate()
                rows.append((seed, "afterwards", curve, length, loss, found.residual))
    pairs = [(length, curve) for length in lengths for curve in CURVES]
    for length, curve in tqdm(pairs, desc=f"seed {seed}, decays", disable=None):
        loss = decayed(run, states[length], steps, length, curve)
        rows.append((seed, "decayed", curve, length, loss, 0.0))
    return rows


# ---- what they show ---------------------------------------------------------------------------


def draw(rows: list[dict[str, str]], picture: Path) -> None:
    """Mean and range over the seeds of each kind of loss, over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, curve in zip(figure.subplots(1, 3, sharey=True), CURVES, strict=True):
        raw = [float(row["loss"]) for row in rows if row["kind"] == "raw"]
        axes.axhline(sum(raw) / len(raw), color="0.6", label="raw, constant rate")
        for kind, style in (("afterwards", "-"), ("online", "s"), ("decayed", "o")):
            found: dict[int, list[float]] = {}
            for row in rows:
                if (row["kind"], row["curve"]) == (kind, curve):
                    found.setdefault(int(row["length"]), []).append(float(row["loss"]))
            if found:
                lengths = sorted(found)
                means = [sum(found[n]) / len(found[n]) for n in lengths]
                color = "tab:red" if kind == "decayed" else "tab:blue"
                axes.plot(lengths, means, style, color=color, label=LABELS[kind])
                if kind == "afterwards":
                    low, high = ([f(found[n]) for n in lengths] for f in (min, max))
                    axes.fill_between(lengths, low, high, color=color, alpha=0.2)
        axes.set(title=curve, xlabel="length of the decay or window, steps")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("validation loss at the end (nats per byte)")
    figure.savefig(picture, dpi=110)


LABELS = {
    "afterwards": "window, chosen afterwards",
    "online": "window, kept online",
    "decayed": "rate really decayed",
}


def table(rows: list[dict[str, str]]) -> str:
    """The mean loss over the seeds, by kind, curve and length."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"{len(seeds)} seeds; loss at the end, mean over the seeds"]
    cells: dict[tuple[str, str, int], list[float]] = {}
    for row in rows:
        key = (row["kind"], row["curve"], int(row["length"]))
        cells.setdefault(key, []).append(float(row["loss"]))
    decays = {length for kind, _, length in cells if kind == "decayed"}
    for (kind, curve, length), found in sorted(cells.items()):
        if not decays or length in {0, *decays}:
            mean = sum(found) / len(found)
            lines.append(f"{kind:12}{curve:12}{length:6d}{mean:10.4f}")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2))
@click.option("--steps", type=click.IntRange(100), default=2400, help="Of every run.")
@click.option("--lr", type=float, default=4e-3, help="The constant learning rate.")
@click.option("--block", type=click.IntRange(1), default=50, help="Steps in a block mean.")
@click.option("--length", "lengths", multiple=True, type=int, default=(300, 600, 1200))
@click.option("--rows", type=click.Path(path_type=Path), default="runs/decay_afterwards.csv")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the rows of ROWS.")
@click.option("--only-draw", is_flag=True, help="Train nothing: draw what ROWS has.")
def main(
    seeds: tuple[int, ...],
    steps: int,
    lr: float,
    block: int,
    lengths: tuple[int, ...],
    rows: Path,
    picture: Path | None,
    only_draw: bool,
) -> None:
    """Compare averages chosen afterwards with real decays; append the losses to ROWS."""
    wrong = [n for n in lengths if not WARMUP < n < steps or n % block]
    if wrong or steps % block:
        raise click.UsageError(f"steps and lengths must be multiples of --block: {wrong or steps}")
    torch.set_num_threads(1)
    rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in () if only_draw else seeds:
        found = seed_rows(seed, steps, lr, block, sorted(lengths))
        new = not rows.exists()
        with open(rows, "a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS, *found] if new else found)
    with open(rows, newline="") as file:
        stored = list(csv.DictReader(file))
    if picture is not None:
        click.echo(table(stored))
        draw(stored, picture)
        click.echo(f"drawn in {picture}")


if __name__ == "__main__":
    main()
